from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from dmagent_loader.mixture.history import History


@pytest.fixture
def make_history() -> Callable[..., History]:
    def make(domains: Sequence[str], steps: int = 1, fields: Sequence[str] = ("general", "math")) -> History:
        rng = np.random.default_rng(steps)
        return History(
            domains=tuple(domains),
            fields=tuple(fields),
            mixes=rng.dirichlet(np.ones(len(domains)), steps),
            feedback=rng.normal(-4.0, 0.3, (steps, len(fields))),
        )

    return make
