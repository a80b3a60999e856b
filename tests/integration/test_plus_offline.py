"""Offline algorithms of d3rlpy in the state of `dmagent-plus`. Not a unit test: importing d3rlpy starts a process."""

from __future__ import annotations

import numpy as np
import pytest
from launching import REPOSITORY

from dmagent_loader.agent.plus.observation import Facts
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.training.plus.calibration import CALIBRATION, Calibration
from dmagent_loader.training.plus.evolution import Judged
from dmagent_loader.training.plus.fitting import fit
from dmagent_loader.training.plus.offline import RecordedRun, acted, episodes, train_offline
from dmagent_loader.training.plus.sampling import TaskSource
from dmagent_loader.training.plus.train import split

RECORD = REPOSITORY / "training_record" / "plus" / CALIBRATION


@pytest.fixture(scope="module")
def tasks() -> list[Judged]:
    calibration = Calibration.load(RECORD)
    train = split(calibration)[0]
    source = TaskSource(
        calibration=calibration, constants=fit(calibration, train), rate=np.array([0.031, 0.043]), environments=train
    )
    return [Judged.of(source.batch(6, 5, 0))]


def facts(domains: int = 8) -> Facts:
    rng = np.random.default_rng(0)
    members = np.zeros((2, domains))
    members[0, : domains // 2] = members[1, domains // 2 :] = 1
    return Facts(
        prior=rng.dirichlet(np.ones(domains)),
        natural=rng.dirichlet(np.ones(domains)),
        fields=members,
        acquires=np.array([0.0, 1.0]),
        influence=rng.normal(size=(2, domains)),
        error=rng.random((2, domains)),
        across=rng.normal(size=(2, 2)),
        reliability=rng.random(2),
        measured=np.ones(()),
        topics=np.zeros(domains),
        topics_known=np.zeros(()),
    )


@pytest.mark.parametrize("name", ["CQL", "ReBRAC", "IQL"])
def test_d3rlpy_algorithms_learn_on_recorded_runs_and_propose_mixes(name, tasks):
    pytest.importorskip("d3rlpy")
    rng, own = np.random.default_rng(2), facts()
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
