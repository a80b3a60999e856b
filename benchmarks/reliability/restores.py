"""Restores a run after each of its steps, on other numbers of ranks and data workers, and compares what is left.

    python -m benchmarks.reliability.restores OUTPUT.json [--seconds 200]

The run (see `groups`) has a decision every three steps, a change by hand, a domain that runs out, and an end. It is
saved after each step on 1, 2 and 4 ranks with 0 and 2 data workers each, and every state is restored on each of these.

Two runs with equally many data workers must be the same to the end. With another number of them, the next decision
holds from another sample on (what workers have fetched is not taken back): up to there both must be the same, and after
it the samples must be what the new ledger says. A call that runs out of time is continued by the next.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from itertools import chain, product, zip_longest
from pathlib import Path
from typing import Any

from benchmarks.reliability.groups import ROWS, Stretch, replay, run
from dmagent_loader.testing import write_toy_shards

WORLDS, WORKERS = (1, 2, 4), (0, 2)


class Restores:
    """One set of shards, and the undisturbed runs over it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"
        self.shards = write_toy_shards(folder / "shards", ROWS, rows_per_shard=32)
        self.counts: Counter[str] = Counter()
        self._whole: dict[tuple[int, int], Stretch] = {}

    def whole(self, world_size: int, workers: int) -> Stretch:
        """The run that nobody interrupts."""
        found = self._whole.get((world_size, workers))
        if found is None:
            found = self._whole[world_size, workers] = run(self.shards, self.cache, world_size, workers)
        return found

    def check(self, before: tuple[int, int], at: int, after: tuple[int, int], left: Stretch | None = None) -> None:
        """Restores the state after `at` samples, unless that was done, and compares.

        Args:
            before: Ranks, and data workers of each, of the run that was saved.
            at: Samples consumed by then.
            after: Ranks and data workers now.
            left: What real processes did with that state.
        """
        whole = self.whole(*before)
        if left is None:
            left = run(self.shards, self.cache, *after, whole.states[at])
        samples, expected = list(chain(*left.steps)), list(chain(*whole.steps))[at:]
        try:
            assert [index for index, _ in samples] == list(range(at, at + len(samples)))
            if before[1] == after[1]:
                self._same_to_the_end(whole, left, samples, expected)
            else:
                self._same_to_the_next_decision(whole, at, left, samples, expected)
        except AssertionError as error:
            raise AssertionError(f"restored after {at}, (ranks, workers) {before} -> {after}: {error}") from error
        self.counts["restores"] += 1
        self.counts["samples"] += len(samples)

    def _same_to_the_end(self, whole: Stretch, left: Stretch, samples: list[Any], expected: list[Any]) -> None:
        """The end is cut to a multiple of the ranks, so that less than one sample for each rank may be more or less."""
        shared = min(len(samples), len(expected))
        assert max(len(samples), len(expected)) - shared < max(WORLDS)
        assert samples[:shared] == expected[:shared]
        assert left.ledger == whole.ledger
        for at, state in list(left.states.items())[:-2]:
            assert state == whole.states[at]

    def _same_to_the_next_decision(
        self, whole: Stretch, at: int, left: Stretch, samples: list[Any], expected: list[Any]
    ) -> None:
        differing = next((pair for pair in zip_longest(left.ledger, whole.ledger) if pair[0] != pair[1]), ())
        starts = [entry["start"] - at for entry in differing if entry]
        until = max(0, min(len(samples), len(expected), *starts))
        assert samples[:until] == expected[:until]
        decided = [[e for e in ledger if e["decided_at"] > at][:1] for ledger in (left.ledger, whole.ledger)]
        if all(decided) and decided[0][0]["decided_at"] == decided[1][0]["decided_at"]:
            assert decided[0][0]["mix"] == decided[1][0]["mix"], "the policy saw another history"
        past = [entry for entry in json.loads(whole.states[at])["ledger"] if entry["start"] < at]
        assert left.ledger[: len(past)] == past
        assert samples == replay(self.shards, self.cache, left.ledger, at, len(samples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=200.0, help="of this call (default: %(default)s)")
    args = parser.parse_args()
    saved = json.loads(args.output.read_text()) if args.output.exists() else {"done": {}}
    ends = time.monotonic() + args.seconds
    setups = list(product(WORLDS, WORKERS))
    with tempfile.TemporaryDirectory() as folder:
        restores = Restores(Path(folder))
        for before, after in product(setups, setups):
            name = f"{before[0]} ranks with {before[1]} workers -> {after[0]} ranks with {after[1]} workers"
            if name in saved["done"] or time.monotonic() > ends:
                continue
            restores.counts.clear()
            for at in restores.whole(*before).states:
                restores.check(before, at, after)
            saved["done"][name] = dict(restores.counts)
            saved["totals"] = {
                **{what: sum(counts[what] for counts in saved["done"].values()) for what in ("restores", "samples")},
                "differences": 0,
            }
            args.output.write_text(json.dumps(saved, indent=1))
    print(f"{len(saved['done'])} of {len(setups) ** 2} pairs of setups, {saved.get('totals', '')}")


if __name__ == "__main__":
    main()
