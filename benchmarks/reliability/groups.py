"""A run with decisions, a change by hand, a domain that runs out and an end, on any number of ranks and data workers.

In one process the ranks take turns (`run`). Under torchrun this file is a program, in which they are real processes
that decide together; see `test_restores`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmagent_loader import AgentWeightedSampler, MixingDataLoader, ReadingConfig

GLOBAL_BATCH = 16
ROWS = {"source/web": 70, "source/books": 45, "target/math": 130, "target/proofs": 16}
BY_HAND = {"source/web": 0.1, "source/books": 0.2, "target/math": 0.4, "target/proofs": 0.3}
Id = tuple[int, str]


class Follows:
    """Depends on every mix that was trained on and on all feedback, so that a wrong history shows."""

    name = "follows"

    def propose(self, history: Any) -> Any:
        weights = 0.15 + history.mixes.mean(axis=0) * abs(history.feedback.sum())
        weights[len(history) % len(weights)] *= 2.5
        weights[2] *= 2.0
        return weights / weights.sum()


@dataclass
class Stretch:
    """What a group trained on, and what it could have gone on from.

    Attributes:
        steps: For each step, (global index, key) of its samples in the order of the run.
        states: After how many samples -> the state, as JSON.
        ledger: At the end.
    """

    steps: list[list[Id]] = field(default_factory=list)
    states: dict[int, str] = field(default_factory=dict)
    ledger: list[dict[str, Any]] = field(default_factory=list)


class Rank:
    """One data-parallel rank: its sampler and its loader."""

    def __init__(self, shards: Any, cache: Path, world_size: int, workers: int, rank: int | None) -> None:
        size = GLOBAL_BATCH // world_size
        self.sampler = AgentWeightedSampler(
            shards,
            policy=Follows(),
            samples_per_reweight=3 * GLOBAL_BATCH,
            seed=5,
            exhausted={"target/proofs": "redistribute", "source": "repeat", "target/math": "stop"},
            rank=rank,
            world_size=None if rank is None else world_size,
            reading=ReadingConfig(progress=False, cache_dir=cache),
        )
        self._loader = MixingDataLoader(self.sampler, batch_size=size, num_workers=workers)
        self._batches: Iterator[dict[str, Any]] | None = None

    def before_step(self, consumed: int, by_hand: bool) -> None:
        """The decisions that fall due after so many samples."""
        if self.sampler.reweight_due(consumed):
            self.sampler.reweight({"a": -3.0 - 0.01 * consumed, "b": -2.0 + 0.001 * consumed}, consumed=consumed)
        if by_hand:
            self.sampler.set_mix(BY_HAND)

    def step(self) -> list[Id]:
        self._batches = iter(self._loader) if self._batches is None else self._batches
        batch = next(self._batches, None)
        return [] if batch is None else list(zip(batch["__index__"].tolist(), batch["__key__"], strict=True))


def run(shards: Any, cache: Path, world_size: int, workers: int, state: str | None = None) -> Stretch:
    """Trains until the data end, from the start or from a state, with ranks that take turns."""
    ranks = [Rank(shards, cache, world_size, workers, rank) for rank in range(world_size)]
    consumed = 0
    if state is not None:
        for rank in ranks:
            rank.sampler.load_state_dict(json.loads(state))
        consumed = json.loads(state)["consumed"]
    stretch = Stretch()
    resumed = state is not None
    while True:
        for rank in ranks:
            if not resumed:  # the state was saved after the decisions of its step
                rank.before_step(consumed, by_hand=consumed == 8 * GLOBAL_BATCH)
        resumed = False
        states = {json.dumps(rank.sampler.state_dict(consumed=consumed)) for rank in ranks}
        assert len(states) == 1, "the ranks would save different states"
        stretch.states[consumed] = states.pop()
        given = [rank.step() for rank in ranks]
        assert len({len(batch) for batch in given}) == 1, "a rank has more samples than another"
        if not given[0]:
            break
        stretch.steps.append(sorted(sample for batch in given for sample in batch))
        consumed += len(stretch.steps[-1])
    stretch.ledger = ranks[0].sampler.ledger.to_json()
    return stretch


def replay(shards: Any, cache: Path, ledger: list[dict[str, Any]], first: int, count: int) -> list[Id]:
    """(global index, key) of samples, from a ledger alone."""
    from dmagent_loader.mixture.ledger import Ledger

    sampler = Rank(shards, cache, 1, 0, 0).sampler
    for entry in Ledger.from_json(sampler.space.names, ledger):
        sampler.plan.append(entry)
    located = sampler.plan.locate(list(range(first, first + count)))
    rows = zip(located.domain.tolist(), located.shard.tolist(), located.row.tolist(), strict=True)
    return [(first + i, sampler.collection.read(*row).key) for i, row in enumerate(rows)]


def main(folder: Path, workers: int) -> None:
    """As one of several real processes: goes on from each state in turn, and writes down what this rank got."""
    import os

    import torch.distributed as dist

    dist.init_process_group("gloo")
    shards = json.loads((folder / "shards.json").read_text())
    states: dict[str, str] = json.loads((folder / "states.json").read_text())
    left = {}
    for at, state in states.items():
        rank = Rank(shards, folder / "cache", dist.get_world_size(), workers, None)
        rank.sampler.load_state_dict(json.loads(state))
        consumed, steps = int(at), []
        while True:
            if steps:
                rank.before_step(consumed, by_hand=consumed == 8 * GLOBAL_BATCH)
            batch = rank.step()
            if not batch:
                break
            steps.append(batch)
            consumed += len(batch) * dist.get_world_size()
        left[at] = {"steps": steps, "ledger": rank.sampler.ledger.to_json()}
        del rank
    (folder / f"left-{dist.get_rank()}.json").write_text(json.dumps(left))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # leaving a gloo process in the normal way aborts now and then


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
