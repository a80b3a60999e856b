"""Training that is killed with SIGKILL continues to the same bits, and does no finished step again."""

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
from safetensors.torch import load_file
from torch import Tensor
from training_fixtures import ROW, Inputs

from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.proxies.bases import SAVE_EVERY, STATE_FILE, train_bases
from dmagent_loader.training.proxies.feedback import Collection, FeedbackConfig, collect_feedback
from dmagent_loader.training.proxies.trainer import ProxyTrainer
from dmagent_loader.training.record import FeedbackRecord

STEPS = 3 * SAVE_EVERY


def steps_of_units(inputs: Inputs, directory: Path) -> list[int]:
    """Steps of each unit of a collection: those of its longest trajectory."""
    trajectories, corpus, questions, bases, config = inputs
    units = Collection(
        trajectories=trajectories,
        corpus=corpus,
        questions=questions,
        bases=bases,
        config=config,
        directory=directory,
        device="cpu",
    )
    return [int(trajectories.lengths[members].max()) for members in units.groups]


@pytest.fixture
def trained_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry, the number of proxies, with each step that is trained in this process."""
    steps: list[int] = []
    train = ProxyTrainer.train

    def counting(self: ProxyTrainer, rows: Tensor) -> Tensor:
        steps.append(len(rows))
        return train(self, rows)

    monkeypatch.setattr(ProxyTrainer, "train", counting)
    return steps


def test_a_killed_collection_continues_to_the_same_bits_and_does_no_step_again(
    collected: FeedbackRecord, inputs: Inputs, tmp_path: Path, trained_steps: list[int]
) -> None:
    """A process is killed with SIGKILL in the middle of its second unit; the next one goes on from its file."""
    (tmp_path / "inputs").write_bytes(pickle.dumps(inputs))
    directory = tmp_path / "feedback"
    program = (
        "import pickle, sys, time, torch\n"
        "from pathlib import Path\n"
        "torch.set_num_threads(int(sys.argv[3]))\n"
        "from dmagent_loader.training.proxies import feedback\n"
        "inputs = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "save = feedback.save_tensors\n"
        "def slowly(*args, **settings):\n"
        "    save(*args, **settings)\n"
        "    time.sleep(0.05)\n"
        "feedback.save_tensors = slowly\n"
        "feedback.collect_feedback(*inputs, Path(sys.argv[2]), progress=False)\n"
    )
    search = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "inputs"), str(directory), str(torch.get_num_threads())],
        env={**os.environ, "PYTHONPATH": search},
    )
    second = directory / "group-0001.safetensors"
    deadline = time.monotonic() + 120
    while not second.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the process ended before it could be killed"
    all_steps = steps_of_units(inputs, directory)
    done = int(load_file(str(second))["step"])
    assert 0 < done < all_steps[1]
    before = (directory / "group-0000.safetensors").read_bytes()

    resumed = collect_feedback(*inputs, directory, progress=False)
    assert len(trained_steps) == sum(all_steps) - all_steps[0] - done
    assert np.array_equal(resumed.feedback, collected.feedback, equal_nan=True)
    assert np.array_equal(resumed.losses, collected.losses, equal_nan=True)
    assert (directory / "group-0000.safetensors").read_bytes() == before


def test_killed_base_training_continues_to_the_same_bits(
    corpus: Corpus, states: FloatArray, small: FeedbackConfig, tmp_path: Path
) -> None:
    """A process is killed with SIGKILL after its first save; catches lost averages, moments, and rows read again."""
    config = dataclasses.replace(small.bases, tokens=STEPS * 4 * small.bases.rows_per_update * ROW)
    (tmp_path / "inputs").write_bytes(pickle.dumps((corpus, states, config, small.proxy)))
    directory = tmp_path / "bases"
    path = directory / STATE_FILE
    program = (
        "import pickle, sys, torch\n"
        "from pathlib import Path\n"
        "torch.set_num_threads(1)\n"
        "from dmagent_loader.training.proxies.bases import train_bases\n"
        "inputs = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        f"train_bases(*inputs, Path(sys.argv[2]), row_tokens={ROW}, progress=False)\n"
    )
    search = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "inputs"), str(directory)],
        env={**os.environ, "PYTHONPATH": search},
    )
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the process ended before it could be killed"
    assert 0 < int(load_file(str(path))["step"]) < STEPS

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed, again, whole = (
            train_bases(corpus, states, config, small.proxy, folder, row_tokens=ROW, progress=False)
            for folder in (directory, directory, tmp_path / "whole")
        )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
