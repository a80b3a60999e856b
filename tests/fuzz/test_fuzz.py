"""Inputs that once broke something, and a short run of each harness without atheris (`README.md` has the long ones)."""

from __future__ import annotations

import logging
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz.harnesses import NAMES, harness

REGRESSIONS = sorted((Path(__file__).parent / "regressions").glob("*/*"))
SECONDS_PER_INPUT = 5


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Warnings about thousands of damaged inputs, captured, would take more time and memory than the inputs."""
    caplog.set_level(logging.CRITICAL, "dmagent_loader")


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_input_that_was_found_once_breaks_nothing(path: Path) -> None:
    harness(path.parent.name)[0](path.read_bytes())


@pytest.mark.parametrize("name", NAMES)
def test_changed_seeds_give_only_documented_errors_in_bounded_time_and_memory(name: str) -> None:
    slowest = _run(name, 400)
    assert slowest < SECONDS_PER_INPUT
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20  # KiB, torch and the tests before included


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_changed_seeds_give_only_documented_errors(name: str) -> None:
    assert _run(name, 20_000) < SECONDS_PER_INPUT


def _run(name: str, count: int) -> float:
    check, seeds = harness(name)
    slowest = 0.0
    for data in _changed(seeds, random.Random(name), count):
        begin = time.perf_counter()
        try:
            check(data)
        except BaseException:
            print(f"input of the {name} harness that broke it: {data!r}")
            raise
        slowest = max(slowest, time.perf_counter() - begin)
    return slowest


def _changed(seeds: list[bytes], rng: random.Random, count: int) -> Iterator[bytes]:
    """The seeds; then seeds with bytes replaced, cut, repeated, or random bytes in their place."""
    yield from seeds
    for _ in range(count):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(6)):
            if data:
                data[rng.randrange(len(data))] = rng.choice((rng.randrange(256), 0, 255, ord("9"), ord("-")))
        kind = rng.randrange(8)
        if kind == 0:
            data = data[: rng.randrange(len(data) + 1)]
        elif kind == 1:
            data += data[rng.randrange(len(data) + 1) :]
        elif kind >= 6:
            data = bytearray(rng.randbytes(rng.randrange(1, 60)))
        yield bytes(data)
