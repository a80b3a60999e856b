"""`Mixing` counts from where its sampler stands, whoever loaded the state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmagent_loader import AgentWeightedSampler, Environment, Mixing, MixingDataLoader, ReadingConfig
from dmagent_loader.policies import StaticPolicy
from dmagent_loader.testing import write_toy_shards

Build = Callable[[], Mixing]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    shards = write_toy_shards(tmp_path / "shards", {"source/a": 60, "target/x": 60})

    def build() -> Mixing:
        sampler = AgentWeightedSampler(
            shards,
            policy=StaticPolicy({"source/a": 0.6, "target/x": 0.4}),
            samples_per_reweight=16,
            exhausted="repeat",
            reading=ReadingConfig(progress=False, cache_dir=tmp_path / "cache"),
        )
        questions = {"general": [("a", "b")]}
        return Mixing(sampler, Environment.from_pairs(questions, lambda text: list(text.encode()), progress=False))

    return build


def train(mixing: Mixing, samples: int, *, begins: bool = True) -> list[int]:
    """Trains on some samples more, as the loop of docs/trainers/plain-loop.md, and returns their indices."""
    trained_on: list[int] = []
    if begins:
        mixing.begin()
    batches = iter(MixingDataLoader(mixing.sampler, batch_size=4))
    while True:
        if mixing.due():
            mixing.reweight(lambda environment: {"general": -1.0})
        if len(trained_on) == samples:
            return trained_on
        trained_on += next(batches)["__index__"].tolist()
        mixing.consumed += 4


def measured_after(mixing: Mixing) -> list[int]:
    return [measurement.consumed for measurement in mixing.sampler.measurements]


@pytest.fixture
def state(build: Build) -> dict[str, Any]:
    """The state of a sampler after 40 samples and decisions after 0, 16 and 32 of them."""
    mixing = build()
    train(mixing, 40)
    found: dict[str, Any] = mixing.state_dict()["sampler"]
    return found


@pytest.mark.parametrize("begins", [True, False])
def test_a_state_that_is_loaded_into_the_sampler_after_mixing_was_built_goes_on(
    build: Build, state: dict[str, Any], begins: bool
) -> None:
    """Without `begin`, it counted from 0: the next decision came 40 samples late, and no state could be saved."""
    mixing = build()
    mixing.sampler.load_state_dict(state)
    assert mixing.state_dict()["sampler"] == state
    assert train(mixing, 24, begins=begins) == list(range(40, 64))
    assert mixing.consumed == 64
    assert measured_after(mixing) == [0, 16, 32, 48, 64]


def test_an_earlier_state_that_is_loaded_into_a_used_sampler_goes_on_there(build: Build, state: dict[str, Any]) -> None:
    """It went on at the count from before, and an error named samples that were counted but not handed out."""
    mixing = build()
    train(mixing, 80)
    mixing.sampler.load_state_dict(state)
    assert train(mixing, 24) == list(range(40, 64))
    assert measured_after(mixing) == [0, 16, 32, 48, 64]
