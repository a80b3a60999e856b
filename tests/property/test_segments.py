"""Runs whose data change: no row twice in a pass, true counts, and a replay that gives what was trained on."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dmagent_loader._run.segments import SegmentWriter, read_segments, rebuild
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.exhaustion import exhaustion_rules
from dmagent_loader.mixture.ledger import LedgerEntry
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.mixture.rest_of_pass import NO_RUNS, RestOfPass, ShardSet, ShardsLeft, cut_runs, partners
from dmagent_loader.mixture.row_order import RowOrders
from dmagent_loader.mixture.sharding import StreamLayout
from dmagent_loader.mixture.shuffle import Shuffle

NAMES = ["source/a", "source/b", "target/x", "target/y"]
SHUFFLE = Shuffle(window=4, shards=2)
Row = tuple[str, int, int]
"""Domain, content of the shard, row."""


@dataclass
class Data:
    """Domains with their shards, each (content, rows), and the settings of the order."""

    shards: dict[str, list[tuple[int, int]]]
    exhausted: str = "repeat"
    shuffle: Shuffle = field(default=SHUFFLE)

    @property
    def space(self) -> DomainSpace:
        return DomainSpace.from_names(self.shards)

    @property
    def shard_set(self) -> ShardSet:
        return ShardSet(
            [np.array([rows for _, rows in its], dtype=np.int64) for its in self.shards.values()],
            [np.array([content for content, _ in its], dtype=np.uint64) for its in self.shards.values()],
        )

    def rows_of(self, domain: str) -> set[Row]:
        return {(domain, content, row) for content, rows in self.shards.get(domain, ()) for row in range(rows)}


@dataclass
class Oracle:
    """What was trained on, and the rows that the present pass of each domain has drawn."""

    trained: list[Row] = field(default_factory=list)
    drawn: dict[str, set[Row]] = field(default_factory=dict)

    def draw(self, row: Row, data: Data) -> None:
        drawn, rows = self.drawn.setdefault(row[0], set()), data.rows_of(row[0])
        assert row in rows
        if rows <= drawn:
            drawn.clear()  # the pass is over, also for shards that are gone
        assert row not in drawn, f"{row} comes twice in a pass"
        drawn.add(row)
        self.trained.append(row)


def located(segment: Any, indices: Sequence[int]) -> list[Row]:
    found = segment.locate(np.array(indices, dtype=np.int64))
    return [
        (segment.space.names[d], int(segment.shards.contents[d][s]), int(r))
        for d, s, r in zip(found.domain.tolist(), found.shard.tolist(), found.row.tolist(), strict=True)
    ]


def saved(plan: Plan, data: Data) -> dict[str, Any]:
    names = [[f"{content}.tar" for content, _ in its] for its in data.shards.values()]
    fields = [domain.field for domain in plan.space.domains]
    more = {
        "domains": list(data.shards),
        "domain_fields": fields,
        "exhausted": list(plan.rules),
        "shuffle_window": plan.shuffle.window,
        "shuffle_shards": plan.shuffle.shards,
    }
    return json.loads(json.dumps({**SegmentWriter(plan, names).to_json(), **more}))


def shard_list(random: Random) -> list[tuple[int, int]]:
    contents = random.sample(range(1, 13), random.randint(1, 5))
    return [(content, content * 5 % 6 + 1) for content in contents]


def changed(before: Data, random: Random) -> Data:
    """Other data: shards lost, replaced, added or come back, domains too, in another order, with other settings."""
    shards = {}
    for name in random.sample(NAMES, len(NAMES)):
        kept = [one for one in before.shards.get(name, []) if random.random() < 0.7]
        known = {content for content, _ in kept}
        kept += [one for one in shard_list(random) if one[0] not in known and random.random() < 0.4]
        random.shuffle(kept)
        if kept and random.random() < 0.85:
            shards[name] = kept
    shuffle = Shuffle(window=random.choice([1, 3, 4, 50]), shards=random.choice([1, 2, 3, 9]))
    return Data(shards or before.shards, random.choice(["repeat", "stop", "redistribute"]), shuffle)


def mix_over(random: Random, space: DomainSpace) -> tuple[float, ...]:
    weights = np.array([random.randint(0, 3) for _ in range(len(space))])
    weights[random.randrange(len(space))] += 1
    return tuple((weights / weights.sum()).tolist())


def started(data: Data, seed: int, mix: tuple[float, ...]) -> Plan:
    plan = Plan(data.space, data.shard_set, seed=seed, exhausted=data.exhausted, shuffle=data.shuffle)
    plan.append(LedgerEntry(start=0, mix=mix, decided_by="initial", decided_at=0))
    return plan


ACTIONS = ["draw", "draw", "change", "mix", "save", "kill"]


@given(st.integers(0, 2**32), st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 2**32)), max_size=12))
@settings(max_examples=300, deadline=None)
def test_no_row_comes_twice_in_a_pass_whatever_happens_to_the_data(begin: int, actions: list[tuple[str, int]]) -> None:
    """Catches a new segment that forgets what earlier ones have drawn, and a state from which another plan is built."""
    random = Random(begin)
    now, seed = changed(Data({name: shard_list(random) for name in NAMES}), random), begin % 10
    plan, oracle, consumed = started(now, seed, mix_over(random, now.space)), Oracle(), 0
    snapshots = [(saved(plan, now), now, copy.deepcopy(oracle), 0)]
    for what, number in actions:
        random = Random(number)
        if what == "draw":
            world = random.randint(1, 4)  # the number of ranks changes each time
            most = consumed + world * random.randint(1, 20)
            end = plan.ends_by(most)
            count = ((most if end is None else end) - consumed) // world
            layouts = [StreamLayout(base=consumed, key=7, rank=rank, world_size=world) for rank in range(world)]
            ranks = np.stack([layout.indices(0, count) for layout in layouts])
            rows = dict(zip(ranks.ravel().tolist(), located(plan, ranks.ravel()), strict=True))
            assert sorted(rows) == list(range(consumed, consumed + world * count))
            for index in sorted(rows):
                oracle.draw(rows[index], now)
            consumed += world * count
        elif what == "mix":
            start = consumed + random.choice([0, 0, 7])  # further samples may have been fetched
            if start >= plan.ledger.last.start:
                mix = mix_over(random, now.space)
                plan.append(LedgerEntry(start=start, mix=mix, decided_by="test", decided_at=consumed))
        elif what == "change":
            now = changed(now, random)
            rules = exhaustion_rules(now.space, now.exhausted)
            plan = plan.changed(consumed, now.space, now.shard_set, rules=rules, shuffle=now.shuffle)
            assert abs(sum(plan.ledger.last.mix) - 1) < 1e-9
        elif what == "save":
            snapshots.append((saved(plan, now), now, copy.deepcopy(oracle), consumed))
        else:
            state, now, oracle, consumed = copy.deepcopy(random.choice(snapshots))
            plan = rebuild(read_segments(state), seed)
        counts = Counter(domain for domain, _, _ in oracle.trained)
        assert {name: count for name, count in plan.drawn(consumed).items() if count} == dict(counts)
        assert plan.counts_of_all(consumed).sum() == consumed
    again = rebuild(read_segments(saved(plan, now)), seed)
    assert again.ledger.summary() == plan.ledger.summary()
    replayed: list[Row] = []
    ends = [*(segment.begin for segment in again.segments[1:]), consumed]
    for segment, end in zip(again.segments, ends, strict=True):
        replayed += located(segment, range(segment.begin, end))
    assert replayed == oracle.trained


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_rows_left_of_a_pass_are_those_it_has_not_drawn(data) -> None:
    rows = np.array(data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)))
    shuffle = Shuffle(window=data.draw(st.integers(1, 30)), shards=data.draw(st.integers(1, 9)))
    order = RowOrders(data.draw(st.integers(0, 9)), ["source/a"], [rows], shuffle)
    epoch, total = data.draw(st.integers(0, 3)), int(rows.sum())
    drawn = data.draw(st.integers(1, total))
    draws = epoch * total + np.arange(drawn)
    shard, row = order.locate(np.zeros_like(draws), draws)
    taken = set(zip(shard.tolist(), row.tolist(), strict=True))
    left = order.rows_left(0, epoch, drawn)
    assert left.shard.tolist() == sorted({number for number, _ in taken})
    shard = np.repeat(left.shard, left.num_runs)
    found = {(int(s), row) for s, run in zip(shard, left.runs, strict=True) for row in rows_of(run)}
    assert found == {(int(number), row) for number in left.shard for row in range(rows[number])} - taken


def rows_of(run: np.ndarray) -> range:
    return range(int(run[0]), int(run[0] + run[1]))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=9), st.lists(st.integers(0, 4), min_size=1))
def test_runs_are_cut_where_ranges_begin(gaps, lengths) -> None:
    """Ranges may be empty, and a run may lie in many of them."""
    ends = np.cumsum([gap + length for gap, length in gaps], dtype=np.int64)
    runs = np.array([(end - length, length) for end, (_, length) in zip(ends, gaps, strict=True)]).reshape(-1, 2)
    starts = np.cumsum([0, *lengths[:-1]])
    pieces, run, place = cut_runs(runs, starts)
    found = [(int(r), row, int(p)) for piece, r, p in zip(pieces, run, place, strict=True) for row in rows_of(piece)]
    ranges = [*zip(starts.tolist(), [*starts[1:].tolist(), 1 << 40], strict=True)]
    expected = [
        (number, row, next(n for n, (first, end) in enumerate(ranges) if first <= row < end))
        for number, its in enumerate(runs)
        for row in rows_of(its)
    ]
    assert found == expected


@given(*[st.lists(st.tuples(st.integers(0, 3), st.integers(1, 2)), max_size=9)] * 2)
def test_each_shard_has_a_partner_of_its_own(shards, others) -> None:
    def columns(listed) -> tuple[np.ndarray, np.ndarray]:
        return np.array([c for c, _ in listed], dtype=np.uint64), np.array([rows for _, rows in listed], dtype=np.int64)

    expected, waiting = [], list(enumerate(others))
    for shard in shards:
        number = next((number for number, other in waiting if other == shard), -1)
        waiting = [one for one in waiting if one[0] != number]
        expected.append(number)
    assert partners(*columns(shards), *columns(others)).tolist() == expected


def test_a_shard_that_was_away_goes_on_where_its_pass_was() -> None:
    """Catches a rest of a pass that forgets shards which are gone for a while, as on a mount that was missing."""
    shards = ShardSet([np.array([3, 2])], [np.array([7, 8], dtype=np.uint64)])
    left = {
        "source/a": ShardsLeft(np.uint64([7, 9]), np.array([3, 4]), np.array([1, 0]), np.array([[1, 1]])),
        "target/x": ShardsLeft(np.uint64([1]), np.array([1]), np.array([0]), NO_RUNS),
    }
    rest = RestOfPass(["source/a"], shards, left)
    assert rest.counts[0].tolist() == [1, 2]
    assert rest.rows(np.array([0, 0]), np.array([0, 1]), np.array([0, 1])).tolist() == [1, 1]
    assert {name: its.contents.tolist() for name, its in rest.absent.items()} == {"source/a": [9], "target/x": [1]}


def test_changing_the_data_often_starves_no_domain() -> None:
    """What the mix owes a domain is carried into the next segment."""
    data = Data({"source/a": [(1, 50)], "source/b": [(2, 50)], "target/x": [(3, 50)]})
    plan = started(data, 0, (0.01, 0.49, 0.5))
    for index in range(10, 1000, 10):
        names = list(data.shards)[:: 1 if index % 20 else -1]
        data = Data({name: [(content + 3, rows) for content, rows in data.shards[name]] for name in names})
        rules = exhaustion_rules(data.space, data.exhausted)
        plan = plan.changed(index, data.space, data.shard_set, rules=rules, shuffle=data.shuffle)
    assert len(plan.segments) == 100
    assert abs(plan.drawn(1000)["source/a"] - 10) <= 1.5
    assert abs(plan.drawn(1000)["source/b"] - 490) <= 1.5
