"""Collection: complete, the same however it is cut up, and continued after a kill."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.pipeline.corpus import Corpus
from dmagent_loader.pipeline.feedback import FeedbackConfig, FeedbackRecord, collect_feedback
from dmagent_loader.pipeline.proxies import ProxyTrainer, StackedProxies
from dmagent_loader.pipeline.questions import ProxyQuestions
from dmagent_loader.pipeline.streams import TrajectoryStream
from dmagent_loader.pipeline.trajectories import Trajectories


@pytest.fixture(scope="module")
def record(
    trajectories: Trajectories,
    corpus: Corpus,
    questions: ProxyQuestions,
    small: FeedbackConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> FeedbackRecord:
    return collect_feedback(trajectories, corpus, questions, small, tmp_path_factory.mktemp("whole"), progress=False)


def test_there_is_feedback_for_every_step_and_none_after_the_end(record: FeedbackRecord, small: FeedbackConfig) -> None:
    lengths = record.trajectories.lengths
    assert len(set(lengths)) > 1
    finite = np.isfinite(record.feedback).all(axis=-1)
    assert np.array_equal(finite.sum(axis=1), lengths + 1)
    assert all(row[: n + 1].all() for row, n in zip(finite, lengths, strict=True))
    assert np.array_equal(np.isfinite(record.losses)[:, 1:], finite[:, 1:])
    assert record.num_feedbacks == lengths.sum()


def test_the_start_state_has_the_untrained_proxys_feedback(
    record: FeedbackRecord, questions: ProxyQuestions, small: FeedbackConfig
) -> None:
    untrained = questions.feedback(StackedProxies(1, small.proxy))
    assert np.allclose(record.feedback[:, 0], untrained, atol=1e-6)


def test_feedback_is_what_one_proxy_alone_gets_along_its_trajectory(
    record: FeedbackRecord, corpus: Corpus, questions: ProxyQuestions, small: FeedbackConfig
) -> None:
    """One trajectory by hand: catches rows of another trajectory, a step off by one, and proxies that change places
    when a shorter neighbour leaves the batch."""
    lengths = record.trajectories.lengths
    number = next(i for i in range(1, len(lengths)) if i % 3 and lengths[i] > lengths[i // 3 * 3])
    stream = TrajectoryStream(
        corpus, record.trajectories.mixes[number], rows_per_step=8, row_tokens=8, seed=0, number=number
    )
    trainer = ProxyTrainer(1, small.proxy)
    for step in range(1, lengths[number] + 1):
        loss = trainer.train(torch.from_numpy(stream.rows(step)[None]))
        assert np.allclose(record.feedback[number, step], questions.feedback(trainer.model)[0], atol=1e-4)
        assert np.isclose(record.losses[number, step], float(loss), atol=1e-4)


def test_the_result_does_not_depend_on_how_many_run_at_once(
    record: FeedbackRecord, corpus: Corpus, questions: ProxyQuestions, small: FeedbackConfig, tmp_path: Path
) -> None:
    one_by_one = dataclasses.replace(small, proxies_at_once=1)
    alone = collect_feedback(record.trajectories, corpus, questions, one_by_one, tmp_path, progress=False)
    assert np.allclose(alone.feedback, record.feedback, atol=1e-4, equal_nan=True)


def test_a_killed_collection_continues_to_the_same_numbers(
    record: FeedbackRecord, corpus: Corpus, questions: ProxyQuestions, small: FeedbackConfig, tmp_path: Path
) -> None:
    """A process is killed with SIGKILL in the middle of a group; the next one goes on from its file."""
    (tmp_path / "inputs").write_bytes(pickle.dumps((record.trajectories, corpus, questions, small)))
    directory = tmp_path / "feedback"
    program = (
        "import os, pickle, sys, time, torch\n"
        "from pathlib import Path\n"
        "torch.set_num_threads(1)\n"
        "from dmagent_loader.pipeline import feedback\n"
        "inputs = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "save = feedback.save_file\n"
        "def slowly(*args):\n"
        "    save(*args)\n"
        "    time.sleep(0.05)\n"
        "feedback.save_file = slowly\n"
        "feedback.collect_feedback(*inputs, Path(sys.argv[2]), progress=False)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "inputs"), str(directory)],
        env={**os.environ, "PYTHONPATH": path},
    )
    second = directory / "group-0001.safetensors"
    deadline = time.monotonic() + 60
    while not second.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the process ended before it could be killed"
    before = {file.name: file.read_bytes() for file in directory.glob("group-0000*")}
    left = load_file(str(second))
    assert 0 < int(left["step"]) < record.trajectories.lengths[3:6].max()

    resumed = collect_feedback(record.trajectories, corpus, questions, small, directory, progress=False)
    assert np.array_equal(resumed.feedback, record.feedback, equal_nan=True)
    assert np.array_equal(resumed.losses, record.losses, equal_nan=True)
    assert {file.name: file.read_bytes() for file in directory.glob("group-0000*")} == before, "work was done again"


def test_a_directory_of_another_collection_is_refused(
    record: FeedbackRecord, corpus: Corpus, questions: ProxyQuestions, small: FeedbackConfig, tmp_path: Path
) -> None:
    collect_feedback(record.trajectories, corpus, questions, small, tmp_path, progress=False)
    other = dataclasses.replace(small, seed=1)
    with pytest.raises(StateError, match="other collection"):
        collect_feedback(record.trajectories, corpus, questions, other, tmp_path, progress=False)
    shifted = dataclasses.replace(record.trajectories, lengths=np.maximum(record.trajectories.lengths - 1, 1))
    with pytest.raises(StateError, match="other trajectories"):
        collect_feedback(shifted, corpus, questions, small, tmp_path, progress=False)


def test_sizes_that_do_not_fit_are_refused(
    trajectories: Trajectories, corpus: Corpus, questions: ProxyQuestions, small: FeedbackConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="tokens_per_step 64 is no multiple"):
        collect_feedback(trajectories, corpus, questions, dataclasses.replace(small, row_tokens=7), tmp_path)
    tiny = dataclasses.replace(small, proxy=dataclasses.replace(small.proxy, vocab_size=50))
    with pytest.raises(ConfigurationError, match="104 tokens, the proxies 50"):
        collect_feedback(trajectories, corpus, questions, tiny, tmp_path)


def test_a_saved_record_loads_with_everything(record: FeedbackRecord, tmp_path: Path) -> None:
    record.save(tmp_path / "recorded.safetensors")
    loaded = FeedbackRecord.load(tmp_path / "recorded.safetensors")
    assert np.array_equal(loaded.feedback, record.feedback, equal_nan=True)
    assert np.array_equal(loaded.losses, record.losses, equal_nan=True)
    assert loaded.trajectories.fingerprint == record.trajectories.fingerprint
    assert loaded.trajectories.config == record.trajectories.config
    assert (loaded.fields, loaded.seconds, loaded.settings) == (("general", "math"), record.seconds, record.settings)
    record.trajectories.save(tmp_path / "trajectories.safetensors")
    with pytest.raises(StateError, match="has schema trajectories/1, not feedback/1"):
        FeedbackRecord.load(tmp_path / "trajectories.safetensors")


def test_statistics_are_over_all_steps_of_all_trajectories(record: FeedbackRecord) -> None:
    """Catches statistics of one set, or with the padding after the ends."""
    values = np.concatenate([f[: n + 1] for f, n in zip(record.feedback, record.trajectories.lengths, strict=True)])
    statistics = record.statistics()
    assert statistics.count == record.num_feedbacks + len(record.feedback)
    assert np.allclose(statistics.mean, values.mean(axis=0))
    assert np.allclose(statistics.std, values.std(axis=0))
