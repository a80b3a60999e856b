"""Tests that run in one process and wait for nothing: whoever edits a module runs them all in a minute."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
import torch.distributed as dist
from alone import alone


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    with alone():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    with alone():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    with alone():
        yield


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process group of this process alone: collectives are real, and no other rank can differ."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
