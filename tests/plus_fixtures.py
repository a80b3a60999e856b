"""Fixtures of the tests of `dmagent-plus`: the calibration record, surrogate tasks drawn from it, made-up facts."""

from __future__ import annotations

import numpy as np
from launching import REPOSITORY

from dmagent_loader.agent.plus.observation import Facts
from dmagent_loader.training.plus.calibration import CALIBRATION, Calibration
from dmagent_loader.training.plus.fitting import fit
from dmagent_loader.training.plus.sampling import TaskSource
from dmagent_loader.training.plus.train import split

RECORD = REPOSITORY / "training_record" / "plus" / CALIBRATION


def training_source() -> TaskSource:
    """Tasks of the training environments; the constants are fitted to them."""
    calibration = Calibration.load(RECORD)
    train = split(calibration)[0]
    return TaskSource(
        calibration=calibration, constants=fit(calibration, train), rate=np.array([0.031, 0.043]), environments=train
    )


def made_up_facts(domains: int = 8) -> Facts:
    """Facts of a run, the first half of whose domains is source and the rest target."""
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
