"""Base models: each of its own start state, the same whenever they are trained, and after a kill too."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from training_fixtures import ROW

from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.domains import NUM_CANONICAL
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.data.streams import TrajectoryStream
from dmagent_loader.training.proxies.bases import BaseConfig, start_states, train_bases
from dmagent_loader.training.proxies.feedback import FeedbackConfig
from dmagent_loader.training.proxies.model import StackedProxies


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
    weights = train_bases(corpus, states, config, small.proxy, tmp_path, row_tokens=ROW, progress=False)
    untrained = StackedProxies(2, small.proxy).state_dict()
    assert weights.keys() == untrained.keys()
    assert all(torch.equal(weights[name], untrained[name]) for name in weights)


def test_each_base_model_knows_its_own_start_state_best(
    corpus: Corpus, bases: dict[str, Tensor], small: FeedbackConfig, tmp_path: Path
) -> None:
    """Two states without a common topic; catches bases that are all trained on the first, or change places."""
    states = np.zeros((2, NUM_CANONICAL))
    states[0, :13], states[1, 13:26] = 1 / 13, 1 / 13
    weights = train_bases(corpus, states, small.bases, small.proxy, tmp_path, row_tokens=ROW, progress=False)
    model = StackedProxies(2, small.proxy)
    model.load_state_dict(weights)
    losses = []
    for state in states:
        stream = TrajectoryStream(corpus, np.tile(state, (2, 1)), rows_per_step=32, row_tokens=ROW, seed=9, number=0)
        with torch.no_grad():
            losses.append(model.losses(torch.from_numpy(np.stack([stream.rows(1)] * 2))).numpy())
    assert losses[0][0] < losses[0][1] - 0.1
    assert losses[1][1] < losses[1][0] - 0.1


@pytest.mark.parametrize("wrong", [{"models": 0}, {"tokens": -1}, {"sharpness": 0.0}])
def test_settings_that_cannot_work_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="there must be one or more"):
        BaseConfig(**wrong)


def test_fewer_tokens_than_a_step_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    """They would give untrained base models without a warning."""
    settings = BaseConfig(models=1, tokens=100, rows_per_update=8)
    states = start_states(corpus.start_state, settings)
    with pytest.raises(ConfigurationError, match="100 tokens are less than one step of 256"):
        train_bases(corpus, states, settings, FeedbackConfig().proxy, tmp_path, row_tokens=ROW)


def test_a_directory_of_other_base_models_is_refused(
    corpus: Corpus, states: FloatArray, small: FeedbackConfig, tmp_path: Path
) -> None:
    """Catches base models of other start states or sizes that are taken for the present ones."""
    config = dataclasses.replace(small.bases, tokens=0)
    train_bases(corpus, states, config, small.proxy, tmp_path, row_tokens=ROW, progress=False)
    with pytest.raises(StateError, match="base models of other states"):
        train_bases(corpus, states[::-1], config, small.proxy, tmp_path, row_tokens=ROW, progress=False)
    wider = dataclasses.replace(small.proxy, width=32)
    with pytest.raises(StateError, match="base models of other proxy"):
        train_bases(corpus, states, config, wider, tmp_path, row_tokens=ROW, progress=False)
