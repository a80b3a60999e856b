"""Every kind of run reads rows of its own."""

from __future__ import annotations

import itertools

import numpy as np
from training_fixtures import ROW

from benchmarks.agent.agent_search import STREAMS
from benchmarks.agent.noise import NoiseConfig
from benchmarks.agent.stream_numbers import NOISE, SEARCH, TRIAL
from benchmarks.agent.trial import TrialConfig
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.data.streams import MixStream
from dmagent_loader.training.proxies.bases import FIRST_STREAM
from dmagent_loader.training.stages import PipelineConfig


def test_the_numbers_of_no_two_kinds_of_runs_overlap() -> None:
    """With the default settings, each kind uses far fewer numbers than there are up to the next."""
    config, noise = PipelineConfig(), NoiseConfig()
    used = {
        0: len(config.trajectories.candidates_per_step) * config.trajectories.trajectories_per_set,
        FIRST_STREAM: config.feedback.bases.models,
        TRIAL: TrialConfig().seeds,
        NOISE: len(noise.shares) * noise.runs,
        SEARCH: STREAMS * config.feedback.bases.models,
    }
    assert len(used) == 5, "two kinds begin at the same number"
    for first, following in itertools.pairwise(sorted(used)):
        assert first + 1000 * used[first] <= following


def test_streams_of_different_kinds_read_a_domain_in_different_orders(corpus: Corpus) -> None:
    """Of one seed and one mix: catches numbers that differ but give the same rows."""
    mix = np.zeros(52)
    mix[3] = 1.0
    rows = [
        MixStream(corpus, rows_per_step=32, row_tokens=ROW, seed=1, number=number).next(mix)
        for number in (0, FIRST_STREAM, TRIAL, NOISE, SEARCH)
    ]
    for one, other in itertools.combinations(rows, 2):
        assert not np.array_equal(one, other)
        assert np.mean((one == other).all(axis=1)) < 0.3
