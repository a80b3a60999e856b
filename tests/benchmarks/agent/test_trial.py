"""Trials: paired runs, their end, what is measured when, and results that stay when more policies are added."""

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
from launching import REPOSITORY
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from training_fixtures import ROW

from benchmarks.agent.held_out import HeldOutRows
from benchmarks.agent.stream_numbers import TRIAL
from benchmarks.agent.trial import TrialConfig, run_trial, static_policies
from benchmarks.agent.trial_record import TrialRecord
from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.environment.questions import Question
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import FeedbackStatistics, History
from dmagent_loader.policies import LinearSchedule, Policy, StaticPolicy
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.data.streams import MixStream
from dmagent_loader.training.proxies.bases import STATE_FILE, BaseConfig
from dmagent_loader.training.proxies.model import ProxyConfig
from dmagent_loader.training.proxies.questions import ProxyQuestions, QuestionConfig
from dmagent_loader.training.proxies.trainer import ProxyTrainer
from dmagent_loader.training.proxies.workers import Workers

MODEL = ProxyConfig(vocab_size=104, width=16, layers=2, heads=2, feed_forward=24, warmup_updates=2, averaging=0.8)
CONFIG = TrialConfig(
    model=MODEL,
    base=BaseConfig(tokens=20 * 8 * ROW, rows_per_update=2, learning_rate=1e-2),
    seeds=2,
    steps=12,
    tokens_per_step=8 * ROW,
    target_tokens=40 * ROW,
    row_tokens=ROW,
    random_mixes=3,
    runs_at_once=2,
    evaluate_every=4,
    marks=(0.5,),
    held_out_rows=30,
)


@pytest.fixture(scope="module")
def policies(corpus: Corpus) -> dict[str, Policy]:
    """The static ones, an agent, and another that is asked at every step."""
    statistics = FeedbackStatistics(mean=(-4.6, -4.6), std=(0.1, 0.1), count=10)
    torch.manual_seed(0)
    agent = MixingAgent(AgentConfig(d_model=32, num_heads=2, d_ff=64, max_steps=16, statistics=statistics))
    rising = LinearSchedule(corpus.start_state, corpus.target_distribution, 12)
    return {**static_policies(corpus, CONFIG), "agent": agent, "rising": rising}


@pytest.fixture(scope="module")
def unseen(corpus: Corpus) -> ProxyQuestions:
    """Two pairs of each field that the environment does not ask."""
    fields = {
        "general": [Question(question="1 3", answer=f"{5 + i} 7", origin="general") for i in range(2)],
        "math": [Question(question="101 90", answer=f"{70 + i} 60", origin="math") for i in range(2)],
    }
    return ProxyQuestions(fields, corpus.tokenizer(), QuestionConfig(max_tokens=ROW))


@pytest.fixture(scope="module")
def trial(
    policies: dict[str, Policy],
    corpus: Corpus,
    questions: ProxyQuestions,
    unseen: ProxyQuestions,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[TrialRecord, Path]:
    folder = tmp_path_factory.mktemp("trial")
    return run_trial(policies, corpus, questions, unseen, CONFIG, folder, progress=False), folder


def test_every_policy_runs_from_its_seeds_base_model(
    trial: tuple[TrialRecord, Path], questions: ProxyQuestions
) -> None:
    record, folder = trial
    assert record.feedback.shape == (8, 2, 13, 2)
    for seed in range(2):
        saved = load_tensors(str(folder / f"base-{seed}" / STATE_FILE))
        trainer = ProxyTrainer(1, MODEL)
        trainer.load_state({name: tensor for name, tensor in saved.items() if name != "step"})
        expected = questions.feedback(trainer.averaged)[0]
        assert np.allclose(record.feedback[:, seed, 0], expected, atol=1e-6)
    assert np.abs(record.feedback[0, 0, 0] - record.feedback[0, 1, 0]).max() > 1e-3, "both seeds have one base model"


def test_a_run_ends_with_the_step_that_uses_up_the_target_tokens(trial: tuple[TrialRecord, Path]) -> None:
    """40 rows at 8 a step: target data alone last 5 steps, half of them 10, none of them until the last step."""
    record, _ = trial
    lengths = dict(zip(record.names, record.lengths.tolist(), strict=True))
    assert lengths["naive"] == [5, 5]
    assert lengths["static 50/50"] == [10, 10]
    assert lengths["source only"] == [12, 12]
    for number, (first, second) in enumerate(record.lengths):
        for seed, length in enumerate((first, second)):
            used = np.cumsum(record.mixes[number, seed, 1:, 26:].sum(axis=-1)) * 64
            assert length == 12 or used[length - 1] >= 320 - 1e-9
            assert length == 1 or used[length - 2] < 320
            assert not record.mixes[number, seed, length + 1 :].any()
            assert np.isnan(record.feedback[number, seed, length + 1 :]).all()


def test_static_runs_are_measured_now_and_then_and_agents_after_each_step(trial: tuple[TrialRecord, Path]) -> None:
    record, _ = trial
    measured = {n: np.isfinite(record.feedback[i, 0]).all(axis=-1) for i, n in enumerate(record.names)}
    in_full = {n: np.isfinite(record.unseen[i, 0]).all(axis=-1) for i, n in enumerate(record.names)}
    # Half of the target tokens is 20 rows: the third step of 8.
    assert np.flatnonzero(in_full["naive"]).tolist() == [0, 3, 5]
    assert np.flatnonzero(measured["naive"]).tolist() == [0, 3, 4, 5]
    assert np.flatnonzero(in_full["source only"]).tolist() == [0, 12]
    assert measured["agent"].sum() == record.lengths[record.names.index("agent"), 0] + 1
    assert np.array_equal(np.isfinite(record.held_out), np.isfinite(record.unseen))


def test_an_agent_is_asked_with_the_feedback_of_its_own_run(
    trial: tuple[TrialRecord, Path], policies: dict[str, Policy]
) -> None:
    """Catches feedback of a neighbour in the batch, or of the step before."""
    record, _ = trial
    number = record.names.index("agent")
    for seed in range(2):
        for step in range(1, int(record.lengths[number, seed]) + 1):
            past = History(
                domains=DomainSpace.canonical().names,
                fields=record.fields,
                mixes=record.mixes[number, seed, :step],
                feedback=record.feedback[number, seed, :step],
            )
            assert np.allclose(record.mixes[number, seed, step], policies["agent"].propose(past))


def test_runs_of_a_seed_are_paired(
    trial: tuple[TrialRecord, Path], corpus: Corpus, questions: ProxyQuestions, unseen: ProxyQuestions
) -> None:
    """One policy alone, by hand, on the stream of its seed: catches a stream for each policy, and neighbours that
    change a run."""
    record, folder = trial
    number = record.names.index("static 50/50")
    base = load_tensors(str(folder / "base-1" / STATE_FILE))
    averages = {name.removesuffix(".average"): tensor for name, tensor in base.items() if name.endswith(".average")}
    trainer = ProxyTrainer(1, MODEL, start=averages)
    stream = MixStream(corpus, rows_per_step=8, row_tokens=ROW, seed=CONFIG.seed, number=TRIAL + 1)
    for step in range(1, 11):
        trainer.train(torch.from_numpy(stream.next(record.mixes[number, 1, step])[None]))
        if step in (4, 8, 10):
            measured = questions.feedback(trainer.averaged)[0]
            assert np.allclose(record.feedback[number, 1, step], measured, atol=1e-4)
    held_out = HeldOutRows(corpus, rows_per_field=30, row_tokens=ROW)
    assert np.allclose(record.held_out[number, 1, 10], held_out.losses(trainer.averaged)[0], atol=1e-4)
    assert np.allclose(record.unseen[number, 1, 10], unseen.feedback(trainer.averaged)[0], atol=1e-4)


@pytest.mark.slow
def test_more_policies_leave_the_finished_runs_alone(
    trial: tuple[TrialRecord, Path],
    policies: dict[str, Policy],
    corpus: Corpus,
    questions: ProxyQuestions,
    unseen: ProxyQuestions,
    tmp_path: Path,
) -> None:
    """Also in another order: catches batches that are cut anew, and results of another policy."""
    whole, _ = trial
    first = {name: policies[name] for name in ("naive", "static 50/50", "random 01")}
    run_trial(first, corpus, questions, unseen, CONFIG, tmp_path, progress=False)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.glob("seed-*")}
    assert len(before) == 4
    reordered = dict(sorted(policies.items()))
    record = run_trial(reordered, corpus, questions, unseen, CONFIG, tmp_path, progress=False)
    assert {name: (p.stat().st_mtime_ns, p.read_bytes()) for name in before for p in [tmp_path / name]} == before
    assert record.names == tuple(sorted(policies))
    order = [record.names.index(name) for name in whole.names]
    assert np.allclose(record.feedback[order], whole.feedback, atol=1e-4, equal_nan=True)
    assert np.allclose(record.mixes[order], whole.mixes, atol=1e-4)
    fewer = run_trial(first, corpus, questions, unseen, CONFIG, tmp_path, progress=False)
    assert fewer.names == tuple(first)
    assert np.array_equal(fewer.lengths, whole.lengths[[whole.names.index(name) for name in first]])


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(
    trial: tuple[TrialRecord, Path],
    policies: dict[str, Policy],
    corpus: Corpus,
    questions: ProxyQuestions,
    unseen: ProxyQuestions,
    tmp_path: Path,
) -> None:
    whole, _ = trial
    record = run_trial(policies, corpus, questions, unseen, CONFIG, tmp_path, workers=Workers(count=2), progress=False)
    assert np.allclose(record.feedback, whole.feedback, atol=1e-5, equal_nan=True)
    assert np.allclose(record.held_out, whole.held_out, atol=1e-5, equal_nan=True)


def test_another_policy_or_setting_under_an_old_name_is_refused(
    trial: tuple[TrialRecord, Path],
    policies: dict[str, Policy],
    corpus: Corpus,
    questions: ProxyQuestions,
    unseen: ProxyQuestions,
) -> None:
    _, folder = trial
    changed = {**policies, "naive": StaticPolicy(corpus.start_state)}
    with pytest.raises(StateError, match="'naive' begins with another mix"):
        run_trial(changed, corpus, questions, unseen, CONFIG, folder, progress=False)
    other = dataclasses.replace(CONFIG, target_tokens=41 * ROW)
    with pytest.raises(StateError, match="runs of other trial"):
        run_trial(policies, corpus, questions, unseen, other, folder, progress=False)
    with pytest.raises(ConfigurationError, match="not a multiple of row_tokens"):
        dataclasses.replace(CONFIG, row_tokens=7)


PROGRAM = """
import pickle, sys, time, torch
from pathlib import Path
torch.set_num_threads(1)
from benchmarks.agent import trial
inputs, folder = pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])
save = trial.save_tensors
def slowly(path, tensors):
    save(path, tensors)
    if "model.updates" in tensors:
        time.sleep(60)
trial.save_tensors = slowly
trial.run_trial(*inputs, folder, progress=False)
"""


def test_a_killed_trial_continues_to_the_same_numbers(
    trial: tuple[TrialRecord, Path],
    policies: dict[str, Policy],
    corpus: Corpus,
    questions: ProxyQuestions,
    unseen: ProxyQuestions,
    tmp_path: Path,
) -> None:
    """SIGKILL in the middle of the agent's batch: catches streams that begin anew, and feedback that is forgotten."""
    whole, _ = trial
    only = {"agent": policies["agent"], "rising": policies["rising"]}
    (tmp_path / "inputs").write_bytes(pickle.dumps((only, corpus, questions, unseen, CONFIG)))
    folder = tmp_path / "trial"
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "inputs"), str(folder)], env={**os.environ, "PYTHONPATH": path}
    )
    broken = folder / "seed-0-batch-000.safetensors"
    deadline = time.monotonic() + 60
    while not broken.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the process ended before it could be killed"
    assert load_file(str(broken))["step"] == 5
    with pytest.raises(ConfigurationError, match="unfinished, but rising is missing"):
        run_trial({"agent": only["agent"]}, corpus, questions, unseen, CONFIG, folder, progress=False)
    resumed = run_trial(only, corpus, questions, unseen, CONFIG, folder, progress=False)
    numbers = [whole.names.index(name) for name in only]
    for name in ("mixes", "feedback", "unseen", "held_out"):
        assert np.allclose(getattr(resumed, name), getattr(whole, name)[numbers], atol=1e-4, equal_nan=True), name
    assert np.array_equal(resumed.lengths, whole.lengths[numbers])


def test_random_mixes_have_every_target_share_and_no_favourites(corpus: Corpus) -> None:
    many = static_policies(corpus, dataclasses.replace(CONFIG, random_mixes=400))
    history = History(
        domains=DomainSpace.canonical().names,
        fields=("general", "math"),
        mixes=corpus.start_state[None],
        feedback=np.zeros((1, 2)),
    )
    mixes = np.stack([many[f"random {i + 1:02d}"].propose(history) for i in range(400)])
    shares = mixes[:, 26:].sum(axis=1)
    assert np.allclose(mixes.sum(axis=1), 1.0)
    assert np.abs(np.quantile(shares, [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.1
    mean = mixes[:, :26].sum(axis=0) / mixes[:, :26].sum()
    assert np.abs(mean - corpus.start_state[:26]).max() < 0.03
