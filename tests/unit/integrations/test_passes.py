"""What the log says of the passes over the domains and of the end of a run."""

from __future__ import annotations

import logging

import pytest
from samplers import logged

from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader._loading.config import LoaderSettings
from dmagent_loader.integrations._passes import Passes
from dmagent_loader.testing import write_toy_shards


@pytest.mark.parametrize("batch_size", [1, 7, 8, 16])
def test_samples_that_make_no_whole_step_are_not_called_used_up(tmp_path, caplog, batch_size):
    shards = write_toy_shards(tmp_path, {"source/a": 40, "target/b": 35})
    sampler = AgentWeightedSampler(
        shards, initial_mix={"source": 0.5, "target": 0.5}, reading=ReadingConfig(progress=False)
    )
    left = sampler.plan.end % batch_size
    assert (left > 0) == (batch_size > 1)
    sampler.bind(LoaderSettings(batch_size=batch_size, samples_per_fetch=batch_size, by_trainer=True))
    with caplog.at_level(logging.INFO):
        Passes(sampler).end(sampler.plan.end - left)
    words = f", but for {left} samples that make no whole step" if left else ""
    assert logged(caplog, f"used up: target/b{words}; ")
