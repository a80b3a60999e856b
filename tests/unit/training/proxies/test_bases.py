"""Base models: each of its own start state, the same whenever they are trained, and after a kill too."""

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

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import NUM_CANONICAL
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.data.streams import TrajectoryStream
from dmagent_loader.training.proxies.bases import SAVE_EVERY, BaseConfig, start_states, train_bases
from dmagent_loader.training.proxies.feedback import FeedbackConfig
from dmagent_loader.training.proxies.model import StackedProxies

ROW = 8
STEPS = 3 * SAVE_EVERY


def natural() -> FloatArray:
    mix = np.zeros(NUM_CANONICAL)
    mix[:20] = np.random.default_rng(0).dirichlet(np.ones(20))
    return mix


def test_start_states_are_source_mixes_around_the_natural_one() -> None:
    """Catches weight on target domains and on topics that the corpus does not have."""
    states = start_states(natural(), BaseConfig(models=5))
    assert states.shape == (5, NUM_CANONICAL)
    assert np.array_equal(states[0], natural())
    assert np.allclose(states.sum(axis=1), 1.0)
    assert (states >= 0).all()
    assert not states[:, 20:].any()
    distances = [0.5 * np.abs(a - b).sum() for i, a in enumerate(states) for b in states[:i]]
    assert min(distances) > 0.1


def test_start_states_are_fixed_by_the_seed_and_spread_more_the_less_sharp() -> None:
    config = BaseConfig(models=30)
    assert np.array_equal(start_states(natural(), config), start_states(natural(), config))
    assert not np.array_equal(start_states(natural(), config), start_states(natural(), BaseConfig(models=30, seed=1)))
    spread = [
        0.5 * np.abs(start_states(natural(), dataclasses.replace(config, sharpness=k))[1:] - natural()).sum(axis=1)
        for k in (0.5, 50.0)
    ]
    assert spread[0].mean() > 3 * spread[1].mean()


def test_without_tokens_a_base_model_is_an_untrained_proxy(
    corpus: Corpus, states: FloatArray, small: FeedbackConfig, tmp_path: Path
) -> None:
    """The paper's proxies start from scratch."""
    config = dataclasses.replace(small.bases, tokens=0)
    path = tmp_path / "bases.safetensors"
    weights = train_bases(corpus, states, config, small.proxy, row_tokens=ROW, path=path, progress=False)
    untrained = StackedProxies(2, small.proxy).state_dict()
    assert weights.keys() == untrained.keys()
    assert all(torch.equal(weights[name], untrained[name]) for name in weights)


def test_each_base_model_knows_its_own_start_state_best(
    corpus: Corpus, bases: dict[str, Tensor], small: FeedbackConfig, tmp_path: Path
) -> None:
    """Two states without a common topic; catches bases that are all trained on the first, or change places."""
    states = np.zeros((2, NUM_CANONICAL))
    states[0, :13], states[1, 13:26] = 1 / 13, 1 / 13
    path = tmp_path / "bases.safetensors"
    weights = train_bases(corpus, states, small.bases, small.proxy, row_tokens=ROW, path=path, progress=False)
    model = StackedProxies(2, small.proxy)
    model.load_state_dict(weights)
    losses = []
    for state in states:
        stream = TrajectoryStream(corpus, np.tile(state, (2, 1)), rows_per_step=32, row_tokens=ROW, seed=9, number=0)
        with torch.no_grad():
            losses.append(model.losses(torch.from_numpy(np.stack([stream.rows(1)] * 2))).numpy())
    assert losses[0][0] < losses[0][1] - 0.1
    assert losses[1][1] < losses[1][0] - 0.1


def test_killed_base_training_continues_to_the_same_bits(
    corpus: Corpus, states: FloatArray, small: FeedbackConfig, tmp_path: Path
) -> None:
    """A process is killed with SIGKILL after its first save; catches lost averages, moments, and rows read again."""
    config = dataclasses.replace(small.bases, tokens=STEPS * 4 * small.bases.rows_per_update * ROW)
    (tmp_path / "inputs").write_bytes(pickle.dumps((corpus, states, config, small.proxy)))
    path = tmp_path / "bases.safetensors"
    program = (
        "import pickle, sys, torch\n"
        "from pathlib import Path\n"
        "torch.set_num_threads(1)\n"
        "from dmagent_loader.training.proxies.bases import train_bases\n"
        "inputs = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        f"train_bases(*inputs, row_tokens={ROW}, path=Path(sys.argv[2]), progress=False)\n"
    )
    search = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "inputs"), str(path)], env={**os.environ, "PYTHONPATH": search}
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
        resumed = train_bases(corpus, states, config, small.proxy, row_tokens=ROW, path=path, progress=False)
        again = train_bases(corpus, states, config, small.proxy, row_tokens=ROW, path=path, progress=False)
        whole = train_bases(
            corpus, states, config, small.proxy, row_tokens=ROW, path=tmp_path / "whole.safetensors", progress=False
        )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize("wrong", [{"models": 0}, {"tokens": -1}, {"sharpness": 0.0}])
def test_settings_that_cannot_work_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="there must be one or more"):
        BaseConfig(**wrong)


def test_tokens_that_are_no_step_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    """They would give untrained base models without a word."""
    settings = BaseConfig(models=1, tokens=100, rows_per_update=8)
    states = start_states(corpus.start_state, settings)
    with pytest.raises(ConfigurationError, match="100 tokens are less than one step of 256"):
        train_bases(corpus, states, settings, FeedbackConfig().proxy, row_tokens=ROW, path=tmp_path / "bases")
