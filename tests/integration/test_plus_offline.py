"""Offline algorithms of d3rlpy in the state of `dmagent-plus`. Not a unit test: importing d3rlpy starts a process."""

from __future__ import annotations

import numpy as np
import pytest
from plus_fixtures import made_up_facts, training_source

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.training.plus.evolution import Judged
from dmagent_loader.training.plus.offline import RecordedRun, acted, episodes, train_offline


@pytest.fixture(scope="module")
def tasks() -> list[Judged]:
    return [Judged.of(training_source().batch(6, 5, 0))]


@pytest.mark.parametrize("name", ["CQL", "ReBRAC", "IQL"])
def test_d3rlpy_algorithms_learn_on_recorded_runs_and_propose_mixes(name, tasks):
    pytest.importorskip("d3rlpy")
    rng, own = np.random.default_rng(2), made_up_facts()
    runs = [
        RecordedRun(
            facts=own,
            mixes=np.stack([acted(own, rng.uniform(-1, 0.8, 3)) for _ in range(12)]),
            feedback=np.cumsum(rng.normal(size=(12, 2)), axis=0),
            attainable=np.ones(2),
            passes=np.full(8, 0.5),
        )
        for _ in range(3)
    ]
    batch = episodes(runs)
    assert batch[0]["rewards"].sum() == pytest.approx(0.75 * runs[0].feedback[-1, 0] + 0.25 * runs[0].feedback[-1, 1])
    decide = train_offline(name, batch, updates=2, seed=0)
    found = tasks[0].advantages(decide, 0)
    assert np.isfinite(found).all()
    with pytest.raises(ConfigurationError, match="no offline algorithm 'PPO'"):
        train_offline("PPO", batch, updates=1, seed=0)
