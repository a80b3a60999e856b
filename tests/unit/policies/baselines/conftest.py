from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import History

TWO = DomainSpace.from_names(["source/web", "target/math"])


@pytest.fixture
def two() -> DomainSpace:
    return TWO


@pytest.fixture
def start() -> Callable[..., History]:
    def make(space: DomainSpace = TWO, steps: int = 1) -> History:
        mixes = np.full((steps, len(space)), 1 / len(space))
        return History(domains=space.names, fields=("general",), mixes=mixes, feedback=np.zeros((steps, 1)))

    return make
