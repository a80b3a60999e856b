"""Paths of recorded runs, from the state of a real run: replayed step by step, and their mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader.errors import ConfigurationError, DomainError, StateError
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies import LinearSchedule, RecordedPath, ReplayPolicy
from dmagent_loader.testing import write_toy_shards

DOMAINS = {"source/web": 400, "target/math": 400}
SCHEDULE = LinearSchedule([0.9, 0.1], [0.1, 0.9], steps=4)


def run(
    folder: Path, policy: Any, *, decisions: int = 3, fetched: int = 20
) -> tuple[AgentWeightedSampler, dict[str, Any]]:
    """Decisions every 20 samples, then some more samples; the state of the run, as JSON."""
    shards = write_toy_shards(folder, DOMAINS, tokens=4)
    sampler = AgentWeightedSampler(
        shards, policy=policy, samples_per_reweight=20, reading=ReadingConfig(progress=False)
    )
    samples = iter(sampler)
    for decision in range(decisions):
        sampler.reweight({"general": -3.0 - 0.1 * decision}, consumed=20 * decision)
        for _ in range(20):
            next(samples)
    return sampler, json.loads(json.dumps(sampler.state_dict()))


def test_a_replay_decides_as_the_recorded_run_did_whatever_the_feedback(tmp_path: Path) -> None:
    sampler, state = run(tmp_path, SCHEDULE)
    path = RecordedPath.from_state(state)
    assert path.mixes == pytest.approx(np.array([[0.7, 0.3], [0.5, 0.5], [0.3, 0.7]]))
    assert np.asarray(path.samples).tolist() == [20, 20, 20]
    again, _ = run(tmp_path, ReplayPolicy(path))
    assert [entry.mix for entry in again.ledger] == [entry.mix for entry in sampler.ledger]


def test_after_its_end_the_last_mix_stays(tmp_path: Path) -> None:
    _, state = run(tmp_path, SCHEDULE, decisions=2)
    sampler, _ = run(tmp_path, ReplayPolicy(RecordedPath.from_state(state)), decisions=4)
    assert [entry.mix[1] for entry in sampler.ledger] == pytest.approx([0.3, 0.5, 0.5, 0.5])


def test_the_mean_is_what_was_drawn_in_all(tmp_path: Path) -> None:
    """Catches a mean over decisions: the last mix of this run holds for a fifth of the samples of the others."""
    sampler, state = run(tmp_path, SCHEDULE)
    state = json.loads(json.dumps(sampler.state_dict(consumed=44)))
    path = RecordedPath.from_state(state)
    assert np.asarray(path.samples).tolist() == [20, 20, 4]
    drawn = sampler.achieved(0, 44)["target/math"]
    assert path.mean()[1] == pytest.approx((20 * 0.3 + 20 * 0.5 + 4 * 0.7) / 44)
    assert abs(path.mean()[1] * 44 - drawn) <= 1
    constant, _ = run(tmp_path, path.mean_policy())
    assert {entry.decided_by for entry in constant.ledger} == {"mean-held-static"}


def test_the_mean_counts_mixes_set_by_hand(tmp_path: Path) -> None:
    """40 samples under 0.3 of math, then 20 under 0.9, set by hand: (12 + 18) / 60."""
    shards = write_toy_shards(tmp_path, DOMAINS, tokens=4)
    sampler = AgentWeightedSampler(
        shards, policy=SCHEDULE, samples_per_reweight=60, reading=ReadingConfig(progress=False)
    )
    sampler.reweight({"general": -3.0}, consumed=0)
    samples = iter(sampler)
    for _ in range(40):
        next(samples)
    sampler.set_mix({"source/web": 0.1, "target/math": 0.9})
    for _ in range(20):
        next(samples)
    path = RecordedPath.from_state(json.loads(json.dumps(sampler.state_dict(consumed=60))))
    assert path.mean()[1] == pytest.approx(0.5)
    assert path.mixes.tolist() == pytest.approx(np.array([[0.7, 0.3]]))


def test_a_history_gives_the_path_without_its_start_state() -> None:
    mixes = np.array([[1.0, 0.0], [0.6, 0.4], [0.2, 0.8]])
    path = RecordedPath.from_history(
        History(domains=tuple(DOMAINS), fields=("general",), mixes=mixes, feedback=np.zeros((3, 1)))
    )
    assert path.mixes.tolist() == mixes[1:].tolist()
    assert path.mean() == pytest.approx([0.4, 0.6])


def test_a_path_follows_the_names_of_the_domains(start: Any) -> None:
    path = RecordedPath(domains=("target/math", "source/web"), mixes=np.array([[0.9, 0.1]]), samples=[5])
    assert ReplayPolicy(path).propose(start()).tolist() == [0.1, 0.9]
    path = RecordedPath(domains=("target/code", "source/web"), mixes=np.array([[0.9, 0.1]]), samples=[5])
    with pytest.raises(DomainError, match="target/code"):
        ReplayPolicy(path).propose(start())


def test_states_without_a_path_are_refused(tmp_path: Path) -> None:
    _, state = run(tmp_path, SCHEDULE, decisions=1)
    for wrong in ({}, {"sampler": state}, {**state, "ledger": 3}, {**state, "consumed": "all"}):
        with pytest.raises(StateError, match="cannot be read from its state"):
            RecordedPath.from_state(wrong)
    with pytest.raises(StateError, match="no decision"):
        RecordedPath.from_state({**state, "measurements": []})
    ledger = [{**entry, "start": entry["start"] + 7} for entry in state["ledger"]]
    with pytest.raises(StateError, match="data of this run changed"):
        RecordedPath.from_state({**state, "begin": 7, "ledger": ledger})


def test_arrays_that_are_no_path_are_refused() -> None:
    mixes: FloatArray = np.array([[0.5, 0.5]])
    for samples in ([], [0], [-1], [1, 2]):
        with pytest.raises(ConfigurationError, match="a path needs"):
            RecordedPath(domains=tuple(DOMAINS), mixes=mixes, samples=samples)
