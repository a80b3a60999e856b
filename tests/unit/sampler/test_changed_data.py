"""A run goes on with other data: what it has drawn is not drawn again, and what it has learnt is kept."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samplers import logged
from shard_fixtures import rewritten

from dmagent_loader import AgentWeightedSampler, MixingAgent, ReadingConfig
from dmagent_loader.cli import main
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.influence import Influence, Score
from dmagent_loader.policies import GuardConfig, StaticPolicy
from dmagent_loader.testing import assert_same_after_resume, sample_ids, write_toy_shards

ROWS = {"source/web": 40, "source/books": 30, "target/math": 40}
MIX = {"source/web": 0.3, "source/books": 0.2, "target/math": 0.5}
Shards = dict[str, list[str]]
State = dict[str, Any]
_times = itertools.count(1)


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return write_toy_shards(tmp_path / "shards", ROWS, rows_per_shard=8)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., AgentWeightedSampler]:
    def build(shards: Shards, **settings: Any) -> AgentWeightedSampler:
        reading = ReadingConfig(cache_dir=tmp_path / "cache", progress=False, **settings.pop("reading", {}))
        given: dict[str, Any] = {"samples_per_reweight": 16, "initial_mix": None, "exhausted": "repeat", **settings}
        return AgentWeightedSampler(shards, reading=reading, **given)

    return build


def another(shard: str, text: str = "repaired") -> None:
    """Writes other content into the last row of a shard, as a repair does."""
    keys: list[str] = []
    rewritten(shard, lambda key, members: keys.append(key) or members)
    rewritten(shard, lambda key, members: {"txt": text.encode()} if key == keys[-1] else members)
    later = os.stat(shard).st_mtime + 10 * next(_times)
    os.utime(shard, (later, later))


def manifest_of(shards: Shards, folder: Path) -> str:
    """A manifest of shards that lie somewhere below its folder."""
    domains = {
        name: {"shards": [{"path": os.path.relpath(path, folder)} for path in listed]}
        for name, listed in shards.items()
    }
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "domains": domains}))
    return str(folder / "manifest.json")


def state_of(sampler: AgentWeightedSampler) -> State:
    return json.loads(json.dumps(sampler.state_dict()))


def in_one_pass(ids: Iterator[tuple[int, str, str]] | list[tuple[int, str, str]], domain: str) -> list[str]:
    return [key for _, name, key in ids if name == domain]


def test_exact_is_the_default_and_its_message_names_a_way_on(build, shards: Shards) -> None:
    sampler = build(shards)
    sample_ids(sampler, 10)
    state = state_of(sampler)
    another(shards["source/web"][0])
    with pytest.raises(
        StateError, match=r"changed 1 shard \(toy-000000\.tar\) with 8 rows.*data='changed'.*dmagent state"
    ):
        build(shards).load_state_dict(state)
    with pytest.raises(ConfigurationError, match="data is 'other'"):
        build(shards).load_state_dict(state, data="other")
    with pytest.raises(ConfigurationError, match="data is 'other'"):
        build(shards, data="other")


def test_where_nothing_has_changed_it_is_an_exact_resumption(build, shards: Shards, caplog) -> None:
    def resumed() -> AgentWeightedSampler:
        return build(shards, data="changed")

    assert_same_after_resume(resumed, 60, every=7)
    assert not logged(caplog, "changed data")


def test_rows_of_unchanged_shards_come_once_in_a_pass_and_all_others_join(
    build, shards: Shards, tmp_path: Path
) -> None:
    sampler = build(shards, initial_mix=MIX)
    before = sample_ids(sampler, 50)
    state = state_of(sampler)
    more = write_toy_shards(tmp_path / "more", {"source/web": 64}, rows_per_shard=8)["source/web"][5:]
    another(shards["source/web"][1])
    now = {**shards, "source/web": [*shards["source/web"][:3], *more]}  # one changed, two lost, three new
    resumed = build(now)
    resumed.load_state_dict(state, data="changed")
    after = sample_ids(resumed, 400)
    assert [index for index, _, _ in after] == list(range(50, 450))
    drawn = set(in_one_pass(before, "source/web"))
    unchanged = {f"source_web_{row:06d}" for row in (*range(8), *range(16, 24))}
    joining = {f"source_web_{row:06d}" for row in (*range(8, 16), *range(40, 64))}
    rest = len(unchanged - drawn) + len(joining)
    found = in_one_pass(after, "source/web")
    assert set(found[:rest]) == (unchanged - drawn) | joining
    assert len(set(found[:rest])) == rest
    assert set(found[rest : rest + 48]) == unchanged | joining  # the next pass has all rows
    books = in_one_pass([*before, *after], "source/books")
    assert len(set(books[:30])) == 30


def test_the_whole_state_goes_on(build, shards: Shards, tmp_path: Path) -> None:
    policy = StaticPolicy(MIX)
    sampler = build(shards, policy=policy)
    for consumed in (0, 16, 32):
        sampler.reweight({"general": -2.0, "math": -3.0 - consumed}, consumed=consumed)
        sample_ids(sampler, 16)
    state = state_of(sampler)
    del shards["source/books"]
    shards = {"target/math": shards["target/math"], **write_toy_shards(tmp_path / "new", {"target/code": 20}), **shards}
    resumed = build(shards, policy=StaticPolicy({"target/math": 0.5, "source/web": 0.5}))
    resumed.load_state_dict(state, data="changed")
    assert resumed.measurements == sampler.measurements
    assert resumed.consumed == 48
    assert resumed.mix == {"target/math": 0.5, "target/code": 0.0, "source/web": 0.5}
    assert resumed.achieved() == {**sampler.achieved(), "target/code": 0}
    history = resumed._run.decider.history()
    np.testing.assert_allclose(history.mixes.sum(axis=1), 1)
    shares = sampler._run.decider.history().mixes  # web, books, math
    np.testing.assert_allclose(history.mixes, np.stack([shares[:, 2], 0 * shares[:, 2], shares[:, :2].sum(axis=1)], 1))
    assert [entry.decided_by for entry in resumed.ledger][-2:] == ["static", "changed data"]
    assert "target/code" not in {name for _, name, _ in sample_ids(resumed, 40)}
    resumed.set_mix({"target/code": 0.5, "source/web": 0.5})
    assert "target/code" in {name for _, name, _ in sample_ids(resumed, 40)}
    assert state_of(resumed)["counts"]["source/books"] == state["counts"]["source/books"]


def test_a_removed_field_and_a_new_order_of_domains(build, shards: Shards) -> None:
    sampler = build(shards, initial_mix=MIX)
    sample_ids(sampler, 20)
    state = state_of(sampler)
    now = {name: shards[name] for name in ("source/books", "source/web")}
    resumed = build(now)
    resumed.load_state_dict(state, data="changed")
    assert resumed.mix == pytest.approx({"source/books": 0.4, "source/web": 0.6})


@pytest.mark.parametrize(
    "settings",
    [{"exhausted": "stop"}, {"reading": {"shuffle_window": 4}}, {"reading": {"shuffle_shards": 2}}],
    ids=["rule", "window", "shards"],
)
def test_settings_of_the_order_may_change(build, shards: Shards, settings: dict[str, Any]) -> None:
    sampler = build(shards, initial_mix=MIX)
    before = sample_ids(sampler, 30)
    state = state_of(sampler)
    resumed = build(shards, **settings)
    with pytest.raises(StateError, match=r"(exhausted|shuffle_window|shuffle_shards).*data='changed'"):
        resumed.load_state_dict(state)
    resumed.load_state_dict(state, data="changed")
    after = sample_ids(resumed, 50)
    assert len(set(in_one_pass([*before, *after], "target/math")[:40])) == 40
    if "exhausted" in settings:
        assert resumed.end is not None
        total = [*before, *after, *sample_ids(resumed)]
        assert len({key for _, _, key in total}) == len(total)


def test_another_seed_is_refused(build, shards: Shards) -> None:
    state = build(shards).state_dict()
    with pytest.raises(StateError, match=r"seed 0, this run has 1.*saved value$"):
        build(shards, seed=1).load_state_dict(state, data="changed")


def test_segments_nest_resume_exactly_and_are_replayed(build, shards: Shards, tmp_path: Path, capsys) -> None:
    """Each change from the state of the one before, on another number of ranks, with kills in between."""
    everything = write_toy_shards(tmp_path / "all", {**ROWS, "target/code": 24}, rows_per_shard=8)
    manifests, state, trained = [], None, []
    for number in range(4):
        kept = {name: listed[number % 2 :] for name, listed in everything.items() if name != list(ROWS)[number % 3]}
        folder = tmp_path / f"data{number}"
        folder.mkdir()
        manifests.append(manifest_of(kept, tmp_path / f"data{number}"))
        (tmp_path / f"data{number}" / "manifest.json").rename(tmp_path / f"manifest{number}.json")
        (tmp_path / f"manifest{number}.json").write_text(
            (tmp_path / f"manifest{number}.json").read_text().replace("../", "")
        )
        manifests[-1] = str(tmp_path / f"manifest{number}.json")
        world = 1 + number
        ranks = [build(kept, rank=rank, world_size=world) for rank in range(world)]
        for sampler in ranks:
            if state is not None:
                sampler.load_state_dict(state, data="changed")
        mix = dict(zip(kept, np.array([0.5, 0.3, 0.2]), strict=True))
        for sampler in ranks:
            sampler.set_mix(mix)
        consumed = (state["consumed"] if state else 0) + 24
        taken = sorted(itertools.chain(*(sample_ids(sampler, 24 // world) for sampler in ranks)))
        trained += taken
        saved = json.loads(json.dumps(ranks[0].state_dict(consumed=consumed)))
        middle = json.loads(json.dumps(ranks[0].state_dict(consumed=consumed - 12)))
        for exact in (middle, saved):
            resumed = build(kept)
            resumed.load_state_dict(exact)
            following = sample_ids(resumed, 40)
            again = build(kept)
            again.load_state_dict(state_of_other(resumed, exact["consumed"] + 7))
            assert sample_ids(again, 33) == following[7:]
        state = saved
    assert [index for index, _, _ in trained] == list(range(96))
    assert len(state["earlier_segments"]) == 3
    (tmp_path / "state.json").write_text(json.dumps(state))
    listed = [argument for manifest in manifests for argument in ("--shards", manifest)]
    assert main(["replay", str(tmp_path / "state.json"), *listed, "--cache-dir", str(tmp_path / "cache")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["index"], line["domain"], line["key"]) for line in lines] == trained
    assert [line["segment"] for line in lines] == [number for number in range(4) for _ in range(24)]


def state_of_other(sampler: AgentWeightedSampler, consumed: int) -> State:
    return json.loads(json.dumps(sampler.state_dict(consumed=consumed)))


def test_decisions_that_hold_later_are_kept(build, shards: Shards) -> None:
    """A mix from a sample that a prefetch had not reached yet."""
    sampler = build(shards, initial_mix=MIX)
    sample_ids(sampler, 30)
    sampler.set_mix({"source/books": 1.0})
    state = state_of_other(sampler, 20)
    del shards["source/books"]
    resumed = build(shards)
    resumed.load_state_dict(state, data="changed")
    assert [(entry.start, entry.decided_by) for entry in resumed.ledger][1:] == [(20, "changed data"), (30, "manual")]
    assert {name for index, name, _ in sample_ids(resumed, 40) if index >= 30} == {"source/web"}


def test_an_agent_sees_the_history_over_its_new_domains(build, shards: Shards, tmp_path: Path) -> None:
    agent = MixingAgent.from_pretrained("dmagent-rl")
    sampler = build(shards, agent=agent)
    for consumed in (0, 16):
        sampler.reweight({"general": -2.0, "math": -3.0}, consumed=consumed)
        sample_ids(sampler, 16)
    state = state_of(sampler)
    shards = {**shards, **write_toy_shards(tmp_path / "new", {"target/code": 20})}
    del shards["source/web"]
    resumed = build(shards, agent=agent)
    resumed.load_state_dict(state, data="changed")
    decision = resumed.reweight({"general": -2.1, "math": -2.9}, consumed=32)
    assert decision.outcome.accepted, decision.outcome.error
    assert set(decision.proposed) == set(shards)
    assert decision.proposed["target/code"] > 0


def test_the_guard_compares_with_the_mix_in_force(build, shards: Shards) -> None:
    from dmagent_loader import DecisionConfig

    deciding = DecisionConfig(guard=GuardConfig(max_change=0.1))
    sampler = build(shards, policy=StaticPolicy(MIX), initial_mix=MIX)
    sampler.reweight({"general": -2.0}, consumed=0)
    sample_ids(sampler, 16)
    state = state_of(sampler)
    del shards["source/books"]
    resumed = build(shards, policy=StaticPolicy({"source/web": 0.9, "target/math": 0.1}), deciding=deciding)
    resumed.load_state_dict(state, data="changed")
    decision = resumed.reweight({"general": -2.0}, consumed=16)
    assert decision.proposed["source/web"] == pytest.approx(0.6, abs=1e-6)


def test_a_trainer_that_loads_by_itself_takes_the_samplers_choice(build, shards: Shards, caplog) -> None:
    from dmagent_loader import Mixing

    mixing = Mixing(build(shards), None)
    sample_ids(mixing.sampler, 10)
    mixing.consumed = 10
    state = json.loads(json.dumps(mixing.state_dict()))
    another(shards["target/math"][0])
    with pytest.raises(StateError, match="AgentWeightedSampler"):
        Mixing(build(shards), None).load_state_dict(state)
    resumed = Mixing(build(shards, data="changed"), None)
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(state)
    assert resumed.consumed == 10
    assert logged(
        caplog, "the run continues with changed data from sample 10 on: domain 'target/math': changed 1 shard"
    )
    assert next(iter(resumed.sampler))["__index__"] == 10


def test_the_samples_before_a_change_are_not_read_any_more(build, shards: Shards) -> None:
    sampler = build(shards)
    sample_ids(sampler, 10)
    state = state_of(sampler)
    another(shards["target/math"][0])
    resumed = build(shards)
    resumed.load_state_dict(state, data="changed")
    with pytest.raises(StateError, match="before the data changed at sample 10"):
        resumed.plan.locate(np.array([9, 10]))
    with pytest.raises(StateError, match="consumed is 5, but the data changed after 10 samples"):
        resumed.state_dict(consumed=5)


@pytest.mark.parametrize(
    "damage",
    [
        {"begin": 3},
        {"begin": -1},
        {"earlier_segments": None},
        {"earlier_segments": [3]},
        {"earlier_segments": [{}]},
        {"shards": None},
        {"shards": {"numbers": [5, 4, 5], "rows": "", "contents": ""}},
        {"shards": {"numbers": [5, 4, -5], "rows": "eA==", "contents": "?"}},
        {"shards": {"numbers": [10**9] * 3, "rows": "", "contents": ""}},
        {"domain_fields": ["source"]},
        {"domain_fields": 3},
    ],
    ids=itertools.count(),
)
@pytest.mark.parametrize("data", ["exact", "changed"])
def test_damaged_segments_are_refused(build, shards: Shards, damage: dict[str, Any], data: str) -> None:
    sampler = build(shards)
    sample_ids(sampler, 10)
    state = {**state_of(sampler), **damage}
    if data == "changed":
        another(shards["target/math"][0])
    with pytest.raises(StateError, match=r"segment|shards|append-only|domain_fields is"):
        build(shards).load_state_dict(state, data=data)


def test_a_policy_that_begins_anew_says_so_once(build, shards: Shards, tmp_path: Path, caplog) -> None:
    """The state is tried on a copy of the policy first, which gave the same warning."""
    run = build(shards, policy="odm")
    run.policy.inform("losses", dict.fromkeys(run.space.names, 2.0))
    run.reweight({"general": -1.0}, consumed=0)
    state = json.loads(json.dumps(run.state_dict(consumed=16)))
    again = build(shards, policy="odm")
    again.load_state_dict(state, data="changed")
    assert json.dumps(again.policy.state_dict()) == json.dumps(run.policy.state_dict())
    assert "begins anew" not in caplog.text
    changed = build(shards | write_toy_shards(tmp_path / "more", {"target/code": 16}), policy="odm")
    fresh = json.dumps(changed.policy.state_dict())
    changed.load_state_dict(state, data="changed")
    assert caplog.text.count("begins anew") == 1
    assert json.dumps(changed.policy.state_dict()) == fresh


def test_influence_stays_for_domains_that_were_measured_and_is_measured_again_for_others(
    build, shards: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = build(shards, policy="influence")
    assert "influence" in sampler.policy.needed(0)
    scores = {field: {name: Score(0.1 * n, 0.05) for n, name in enumerate(shards)} for field in ("general", "math")}
    sampler.policy.inform("influence", Influence(scores=scores, way="gradient"))
    sampler.reweight({"general": -2.0, "math": -3.0}, consumed=0)
    sample_ids(sampler, 16)
    state = state_of(sampler)
    fewer = {name: shards[name] for name in ("target/math", "source/web")}
    resumed = build(fewer, policy="influence")
    resumed.load_state_dict(state, data="changed")
    assert resumed.policy.influence is not None
    assert resumed.reweight({"general": -2.0, "math": -3.0}, consumed=16).outcome.accepted
    more = {**shards, **write_toy_shards(tmp_path / "new", {"target/code": 20})}
    again = build(more, policy="influence")
    again.load_state_dict(state, data="changed")
    assert again.policy.influence is None
    assert "influence" in again.policy.needed(1)
    assert logged(caplog, "it is collected again before the next decision")


def test_influence_is_measured_again_for_a_domain_whose_rows_were_all_replaced(
    build, shards: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A cleaned domain under its old name would otherwise be judged by the rows that were withdrawn."""
    sampler = build(shards, agent="dmagent-plus")
    scores = {field: {name: Score(0.1 * n, 0.05) for n, name in enumerate(shards)} for field in ("general", "math")}
    sampler.policy.needed(0)
    sampler.policy.inform("influence", Influence(scores=scores, way="gradient"))
    sampler.reweight({"general": -2.0, "math": -3.0}, consumed=0)
    sample_ids(sampler, 16)
    state = state_of(sampler)
    another(shards["target/math"][0])
    repaired = build(shards, agent="dmagent-plus")
    repaired.load_state_dict(state, data="changed")
    assert repaired.policy.influence is not None
    cleaned = {**shards, **write_toy_shards(tmp_path / "cleaned", {"target/math": 50}, tokens=8)}
    resumed = build(cleaned, agent="dmagent-plus")
    resumed.load_state_dict(state, data="changed")
    assert logged(caplog, r"no row is left of ['target/math']")
    assert resumed.policy.influence is None
    assert "influence" in resumed.policy.needed(1)
    later = build(cleaned, agent="dmagent-plus")
    later.load_state_dict(state_of(resumed))
    assert "influence" in later.policy.needed(1)
