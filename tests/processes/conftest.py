from __future__ import annotations

from collections.abc import Iterator

import pytest
from samplers import stop_workers


@pytest.fixture(autouse=True)
def _no_workers_are_left() -> Iterator[None]:
    yield
    stop_workers()
