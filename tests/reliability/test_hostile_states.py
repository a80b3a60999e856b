"""States of a run that were damaged or edited: a `StateError` that says what, nothing changed, and never a hang."""

from __future__ import annotations

import copy
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader._run.state import SCHEMA, load_state
from dmagent_loader.errors import StateError
from dmagent_loader.policies import StaticPolicy
from dmagent_loader.testing import write_toy_shards

pytestmark = pytest.mark.timeout(120)

State = dict[str, Any]
HUGE = 10**400
NAN, INFINITE = float("nan"), float("inf")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return write_toy_shards(tmp_path_factory.mktemp("shards"), {"source/a": 60, "target/b": 40})


@pytest.fixture
def sampler(shards: dict[str, list[str]], tmp_path: Path) -> AgentWeightedSampler:
    return AgentWeightedSampler(
        shards,
        policy=StaticPolicy({"source/a": 0.5, "target/b": 0.5}),
        samples_per_reweight=10,
        reading=ReadingConfig(cache_dir=tmp_path / "cache", progress=False),
    )


@pytest.fixture
def state(sampler: AgentWeightedSampler) -> State:
    """Of a run with three decisions, after 25 samples."""
    stream = iter(sampler)
    for consumed in (0, 10, 20):
        sampler.reweight({"general": -2.0, "math": -3.0 - consumed}, consumed=consumed)
        for _ in range(10):
            next(stream)
    found: State = json.loads(json.dumps(sampler.state_dict(consumed=25)))
    sampler.load_state_dict(found)
    return found


def refused(sampler: AgentWeightedSampler, state: Any) -> str:
    """The message; the sampler is as it was."""
    before = sampler.state_dict(consumed=25)
    begin = time.perf_counter()
    with pytest.raises(StateError) as error:
        sampler.load_state_dict(state)
    assert time.perf_counter() - begin < 10
    assert sampler.state_dict(consumed=25) == before
    assert len(str(error.value)) < 2000
    return str(error.value)


def put(*path: Any, value: Any) -> Callable[[State], None]:
    """Puts a value into a place of a state."""

    def change(state: State) -> None:
        node: Any = state
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("schema", value=SCHEMA - 1), f"schema {SCHEMA - 1}"),
        (put("schema", value=SCHEMA + 1), f"schema {SCHEMA + 1}"),
        (put("schema", value=HUGE), "schema 1000"),
        (put("schema", value=None), "schema None"),
        (put("seed", value=HUGE), "seed"),
        (put("seed", value="0"), "seed"),
        (put("domains", value=["source/a"]), "domains"),
        (put("domains", value={"source/a": 1}), "domains"),
        (put("fingerprint", value=0), "another shard set"),
        (put("fingerprint", value="x" * 100_000), "another shard set"),
        (put("exhausted", value=[]), "exhausted"),
        (put("shuffle_window", value=1e300), "shuffle_window"),
        (put("consumed", value=-1), "consumed is -1"),
        (put("consumed", value=25.0), "consumed is 25.0"),
        (put("consumed", value=True), "consumed is True"),
        (put("consumed", value="25"), "consumed is '25'"),
        (put("consumed", value=NAN), "consumed is nan"),
        (put("consumed", value=2**63), "consumed is 9223372036854775808"),
        (put("consumed", value=HUGE), "consumed is 1000"),
        (put("consumed", value=24), "counts at sample 24"),
        (put("consumed", value=None), "consumed is None"),
        (put("counts", "source/a", value=HUGE), "counts"),
        (put("counts", "source/a", value=NAN), "counts"),
        (put("counts", value=[]), "counts"),
        (put("counts", "extra", value=0), "counts"),
        (put("start_state", value=[1, HUGE]), "start_state"),
        (put("start_state", value=[NAN, 1]), "start_state"),
        (put("start_state", value=[-1, 2]), "start_state"),
        (put("start_state", value="10"), "start_state"),
        (put("start_state", value={"source/a": 1}), "start_state"),
        (put("start_state", value=[1]), "start_state"),
        (put("start_state", value=[[1], [0]]), "start_state"),
        (put("ledger", value=[]), "ledger"),
        (put("ledger", value={}), "ledger"),
        (put("ledger", value=None), "ledger"),
        (put("ledger", 1, value=[]), "entry 1"),
        (put("ledger", 1, "start", value=-5), "entry 1"),
        (put("ledger", 1, "start", value=0.5), "entry 1"),
        (put("ledger", 1, "start", value=HUGE), "entry 1"),
        (put("ledger", 1, "start", value=2**63), "entry 1"),
        (put("ledger", 1, "start", value=INFINITE), "entry 1"),
        (put("ledger", 0, "start", value=3), "append-only"),
        (put("ledger", 2, "start", value=1), "append-only"),
        (put("ledger", 1, "mix", value=[HUGE, 0]), "entry 1"),
        (put("ledger", 1, "mix", value=[NAN, 1]), "entry 1"),
        (put("ledger", 1, "mix", value=[0.5, 0.6]), "entry 1"),
        (put("ledger", 1, "mix", value=[2, -1]), "entry 1"),
        (put("ledger", 1, "mix", value="10"), "entry 1"),
        (put("ledger", 1, "mix", value=[1]), "entry 1"),
        (put("ledger", 1, "mix", value=[True, False]), "entry 1"),
        (put("ledger", 1, "mix", value={"source/a": 1}), "entry 1"),
        (put("ledger", 1, "decided_at", value=NAN), "entry 1"),
        (put("ledger", 1, "decided_by", value=3), "entry 1"),
        (put("ledger", 1, "accepted", value="no"), "entry 1"),
        (put("ledger", 1, "note", value=["x"]), "entry 1"),
        (put("ledger", 1, "feedback", value=[1]), "entry 1"),
        (put("ledger", 1, "feedback", value={"general": HUGE}), "entry 1"),
        (put("ledger", 1, "feedback", value={"general": NAN}), "entry 1"),
        (put("measurements", value={}), "feedback"),
        (put("measurements", value=3), "feedback"),
        (put("measurements", 1, value=None), "entry 1"),
        (put("measurements", 1, "consumed", value=HUGE), "entry 1"),
        (put("measurements", 1, "consumed", value=0), "entry 1"),
        (put("measurements", 1, "consumed", value=-1), "entry 1"),
        (put("measurements", 2, "consumed", value=26), "entry 2"),
        (put("measurements", 1, "consumed", value=5.5), "entry 1"),
        (put("measurements", 1, "feedback", value={}), "entry 1"),
        (put("measurements", 1, "feedback", value={"general": -1.0}), "entry 1"),
        (put("measurements", 1, "feedback", "math", value=NAN), "entry 1"),
        (put("measurements", 1, "feedback", "math", value=HUGE), "entry 1"),
        (put("measurements", 1, "feedback", "math", value="-1"), "entry 1"),
        (put("measurements", 0, "feedback", "law", value=-1), "entry 0"),
        (put("fields", value={"general": 0, "math": 1}), "fields"),
        (put("fields", value=["general", 1]), "fields"),
        (put("fields", value=["general"]), "entry 0"),
        (put("fields", value=["general", "math", "math"]), "entry 0"),
        (put("fields", value=[]), "entry 0"),
        (put("policy_failures", value=-1), "policy_failures"),
        (put("policy_failures", value=HUGE), "policy_failures"),
    ],
    ids=itertools.count(),
)
def test_states_that_cannot_be_are_refused_by_what_is_wrong(
    sampler: AgentWeightedSampler, state: State, change: Callable[[State], None], words: str
) -> None:
    change(state)
    assert words in refused(sampler, state)


@pytest.mark.parametrize("key", ["seed", "ledger", "counts", "measurements", "consumed"])
def test_states_that_lack_something_are_refused(sampler: AgentWeightedSampler, state: State, key: str) -> None:
    del state[key]
    assert key in refused(sampler, state)


@pytest.mark.parametrize("state", [None, 3, [], "state", {}, {"schema": []}, {"schema": {"a": HUGE}}])
def test_what_is_no_state_is_refused(sampler: AgentWeightedSampler, state: Any) -> None:
    refused(sampler, state)


def test_unknown_keys_are_left_aside_with_a_warning(
    sampler: AgentWeightedSampler, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    sampler.load_state_dict({**state, "colour": "green"})
    assert "'colour', which this version does not know" in caplog.text
    assert sampler.state_dict(consumed=25) == state


class _Counting(list[Any]):
    """Counts what is looked at when it is gone through."""

    seen = 0

    def __iter__(self) -> Iterator[Any]:
        type(self).seen += len(self)
        return super().__iter__()


def test_a_plan_of_many_decisions_is_rebuilt_in_linear_time(sampler: AgentWeightedSampler) -> None:
    plan = sampler.plan
    plan.segments[0]._stretches = _Counting(plan.segments[0]._stretches)
    for start in range(1, 500):
        plan.append(replace(plan.ledger.last, start=start))
    assert _Counting.seen < 10 * 500


def test_a_ledger_of_many_decisions_is_read_in_linear_time(sampler: AgentWeightedSampler, state: State) -> None:
    """The last entry is wrong, so that all are read."""
    entry = state["ledger"][0]
    state["ledger"] = [{**entry, "start": start, "decided_at": start} for start in range(20_000)]
    state["ledger"].append({**entry, "start": HUGE})
    assert "entry 20000" in refused(sampler, state)


def test_measurements_of_a_long_run_are_read_in_linear_time(sampler: AgentWeightedSampler, state: State) -> None:
    entry = state["measurements"][0]
    state["measurements"] = [copy.deepcopy(entry) for _ in range(100_000)]
    assert "entry 1 " in refused(sampler, state)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[1]", b"\xff", b"[" * 200_000, b"1" * 100_000, b'{"schema": 1' + b"0" * 5000 + b"}", b"NaN"],
    ids=itertools.count(),
)
def test_state_files_that_cannot_be_are_refused_by_name(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(text)
    with pytest.raises(StateError, match=r"state\.json"):
        load_state(path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "device", "missing"])
def test_state_files_that_are_none_are_refused_and_not_waited_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    with pytest.raises(StateError, match=r"state\.json cannot be read"):
        load_state(path)
