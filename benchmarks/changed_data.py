"""What it costs that data change in the middle of a run: CPU seconds of each step, over as many shards as there are.

    python benchmarks/changed_data.py [--shards 1000000] [--domains 1000]

Nothing is read: the plan, its state and their comparison need the sizes and the digests of shards only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from measuring import number, table

from dmagent_loader import DomainSpace
from dmagent_loader._run.differences import differences
from dmagent_loader._run.segments import RunData, SegmentWriter, read_segments, rebuild
from dmagent_loader.mixture.ledger import LedgerEntry
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.mixture.rest_of_pass import ShardSet
from dmagent_loader.mixture.shuffle import shared_shuffle

ROWS = 1000
"""Rows of a shard."""
DRAWN = (0.05, 0.5, 0.95)
"""Shares of the first pass that are drawn when the data change."""
REPLACED = 0.01
"""Share of the shards that are replaced."""

_R = TypeVar("_R")


def states(plan: Plan, names: list[list[str]], drawn: float) -> dict[str, float]:
    """CPU seconds of each step of a change of data after a share of the first pass, and of a restore after it."""
    generator, seconds = np.random.default_rng(1), dict[str, float]()

    def timed(step: str, work: Callable[[], _R]) -> _R:
        begun = time.process_time()
        result = work()
        seconds[step] = time.process_time() - begun
        return result

    consumed = int(drawn * plan.num_rows.sum())
    contents = [its.copy() for its in plan.shards.contents]
    for its in contents:
        replaced = generator.random(len(its)) < REPLACED
        its[replaced] = generator.integers(0, 1 << 63, int(replaced.sum()), dtype=np.uint64)
    shards = ShardSet(plan.shards.rows, contents)
    settings: dict[str, Any] = {"space": plan.space, "rules": plan.rules, "shuffle": plan.shuffle, "names": names}
    present = RunData(shards=shards, **settings)
    saved = read_segments(_state(plan, names))
    before = rebuild(saved, 0)
    timed("comparing", lambda: differences(saved[-1], present).summary())
    changed = timed(
        "a new segment",
        lambda: before.changed(consumed, plan.space, shards, rules=plan.rules, shuffle=plan.shuffle),
    )
    timed("first samples", lambda: changed.locate(np.arange(consumed, consumed + 1024)))
    state = timed("writing the state", lambda: _state(changed, names))
    again = timed("restoring it", lambda: rebuild(read_segments(state), 0, present))
    assert again.drawn(consumed) == changed.drawn(consumed)
    return seconds


def _state(plan: Plan, names: list[list[str]]) -> Any:
    settings = {
        "domains": list(plan.space.names),
        "domain_fields": [domain.field for domain in plan.space.domains],
        "exhausted": list(plan.rules),
        "shuffle_window": plan.shuffle.window,
        "shuffle_shards": plan.shuffle.shards,
    }
    return json.loads(json.dumps({**SegmentWriter(plan, names).to_json(), **settings}))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shards", type=int, default=1_000_000)
    options.add_argument("--domains", type=int, default=1000)
    args = options.parse_args()
    generator, count = np.random.default_rng(0), args.shards // args.domains
    space = DomainSpace.from_names([f"source/{number}" for number in range(args.domains)])
    rows = [np.full(count, ROWS) for _ in range(args.domains)]
    contents = [generator.integers(0, 1 << 63, count, dtype=np.uint64) for _ in range(args.domains)]
    names = [[f"{domain}-{shard:06d}.tar" for shard in range(count)] for domain in range(args.domains)]
    plan = Plan(space, ShardSet(rows, contents), seed=0, shuffle=shared_shuffle(rows))  # as a sampler's default
    plan.append(LedgerEntry(start=0, mix=tuple(plan.natural_mix.tolist()), decided_by="initial", decided_at=0))
    measured = {drawn: states(plan, names, drawn) for drawn in DRAWN}
    steps = list(measured[DRAWN[0]])
    print(f"{args.shards:,} shards of {args.domains:,} domains, {REPLACED:.0%} of them replaced: CPU seconds\n")
    lines = [
        (f"{drawn:.0%}", *(found[step] for step in steps), sum(found.values())) for drawn, found in measured.items()
    ]
    print(table(("drawn of the first pass", *steps, "all"), [(first, *map(number, rest)) for first, *rest in lines]))


if __name__ == "__main__":
    main()
