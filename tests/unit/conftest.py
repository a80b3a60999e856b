"""Tests that run in one process and wait for nothing: whoever edits a module runs them all in a minute."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from alone import alone

HERE = Path(__file__).parent
STILL_TO_MOVE = [HERE / "agent", HERE / "shards", HERE / "training"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    with _rule(item):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    with _rule(item):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    with _rule(item):
        yield


def _rule(item: pytest.Item) -> contextlib.AbstractContextManager[None]:
    exempt = any(folder in item.path.parents for folder in STILL_TO_MOVE)
    return contextlib.nullcontext() if exempt else alone()


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process group of this process alone: collectives are real, and no other rank can differ."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
