"""CPU time of a packed row in a batch, for comparing two versions of this package; not part of the page.

    python benchmarks/batches.py --against ../main

Batches of 32 rows of 2,048 tokens in 52 domains, a warm page cache. Each measurement is a process of its own, and a
round goes through all of them, so that whatever else the machine does disturbs all alike. The CPU time of a row is that
of the trainer's process (*trainer*) and of all processes (*all*); ratios are medians of the rounds. The other version
is measured with rows that `packed_tokens` converts one by one, and with lazy rows and `collate_packed`, its fastest
way. *torch* passes the same ready batch of one tensor again and again, int64 or, for the narrow batches, uint16: its
own limit with data workers. With `--every`, each loader is also measured with a new random mix every so many samples;
*lost* is the share of the CPU time that the changes take.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from dmagent_loader import AgentWeightedSampler, DomainSpace, MixingDataLoader, ReadingConfig
from dmagent_loader.testing import write_toy_shards
from dmagent_loader.transforms import collate_packed, packed_tokens

BATCH_SIZE, TOKENS = 32, 2048
KINDS: dict[str, dict[str, Any]] = {
    "packed_tokens": {"transform": packed_tokens},
    "collate_packed": {"collate_fn": collate_packed},
    "collate_packed, labels=False": {"collate_fn": functools.partial(collate_packed, labels=False)},
    "narrow": {"collate_fn": functools.partial(collate_packed, narrow=True)},
    "narrow, keys=False": {"collate_fn": functools.partial(collate_packed, narrow=True, keys=False)},
}
TORCH, TORCH_NARROW = "torch", "torch, narrow"
READY = {TORCH: torch.int64, TORCH_NARROW: torch.uint16}
BASES = ("packed_tokens", "collate_packed")
"""The batches of another version with which all are compared."""
NUM_MIXES = 1000
"""Different mixes; afterwards they come again."""


class Again(IterableDataset[Any]):
    """One batch over and over.

    Args:
        dtype: Type of its tokens.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __iter__(self) -> Iterator[Any]:
        yield from itertools.repeat({"input_ids": torch.zeros((BATCH_SIZE, TOKENS), dtype=self._dtype)})


def limit(kind: str) -> str:
    """The loader of ready batches of the type of a kind of batches."""
    return TORCH_NARROW if kind.startswith("narrow") or kind == TORCH_NARROW else TORCH


def loader(kind: str, workers: int, folder: Path, lazy: bool) -> Any:
    """The loader to measure."""
    if kind in READY:
        return DataLoader(Again(READY[kind]), batch_size=None, num_workers=workers)
    shards = {name: sorted(map(str, (folder / name).glob("*.tar"))) for name in DomainSpace.canonical().names}
    options = dict(KINDS[kind])
    transform = options.pop("transform", None)
    sampler = AgentWeightedSampler(
        shards,
        samples_per_reweight=10**9,
        exhausted="repeat",
        transform=transform,
        decode="lazy" if lazy and transform is None else "default",
        reading=ReadingConfig(cache_dir=folder / "cache", progress=False),
    )
    return MixingDataLoader(sampler, BATCH_SIZE, num_workers=workers, **options)


def random_mixes(names: Sequence[str]) -> list[dict[str, float]]:
    """Mixes of an agent that changes its mind completely; made beforehand, because that is not the loader's work."""
    weights = np.random.default_rng(0).dirichlet(np.ones(len(names)), NUM_MIXES)
    return [dict(zip(names, its, strict=True)) for its in weights.tolist()]


def measure(kind: str, workers: int, folder: Path, seconds: float, lazy: bool, every: int) -> dict[str, float]:
    """Rows per second, and microseconds of CPU for each."""
    torch.set_num_threads(1)
    source = loader(kind, workers, folder, lazy)
    batches: Any = iter(source)
    held: Any = None
    taken = 0
    mixes = itertools.cycle(random_mixes(source.dataset.space.names) if every else ())

    def take(count: int) -> None:
        nonlocal taken, held
        for _ in range(count):
            held = next(batches)  # as a trainer does, which has the last batch until the next one is there
            taken += 1
            if every:
                source.dataset.reweight_due(taken * BATCH_SIZE)
            if every and taken % (every // BATCH_SIZE) == 0:
                source.dataset.set_mix(next(mixes))

    take(64 if workers else 512)  # without workers, all shards are open from here on
    began, trainer, before = time.perf_counter(), time.process_time(), taken
    while time.perf_counter() - began < seconds:
        take(16)
    rows = (taken - before) * BATCH_SIZE
    took, trainer = time.perf_counter() - began, time.process_time() - trainer
    batches = held = None  # ends the workers
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    per_row = 1e6 / rows
    of_workers = (children.ru_utime + children.ru_stime) * per_row if workers else 0.0
    return {"rate": rows / took, "trainer": trainer * per_row, "all": trainer * per_row + of_workers}


def child(checkout: Path, kind: str, workers: int, args: argparse.Namespace, every: int = 0) -> dict[str, float]:
    """A measurement in a process of its own, with the package of a checkout."""
    command = [sys.executable, __file__, "--one", kind, str(workers), "--data", str(args.data)]
    command += ["--seconds", str(args.seconds), "--every", str(every)]
    if checkout != Path(__file__).parents[1]:
        command.append("--lazy")
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(args: argparse.Namespace) -> None:
    """Prints a table of medians, and of the median ratios to the other version and to torch."""
    here = Path(__file__).parents[1]
    configurations = [(kind, workers) for workers in args.workers if workers for kind in READY]
    configurations += [(kind, workers) for workers in args.workers for kind in args.kinds]
    found: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for number in range(args.repeats):
        for kind, workers in random.Random(number).sample(configurations, len(configurations)):
            found.setdefault(("here", kind, workers), []).append(child(here, kind, workers, args))
            if args.against and kind in BASES:
                there = child(args.against.resolve(), kind, workers, args)
                found.setdefault(("there", kind, workers), []).append(there)
            if args.every and kind not in READY:
                found.setdefault(("changing", kind, workers), []).append(child(here, kind, workers, args, args.every))
    bases = [f"{base} of --against / ours" for base in BASES]
    columns = ("rows/s", "trainer, us a row", "all, us a row", *bases, "rows/s of torch", "lost")
    print(f"| workers | batches | {' | '.join(columns)} |")
    print("| ---: | --- |" + " ---: |" * len(columns))
    for kind, workers in configurations:
        ours = found["here", kind, workers]
        rate, trainer, everything = (
            statistics.median(one[name] for one in ours) for name in ("rate", "trainer", "all")
        )
        older = [None if kind in READY else found.get(("there", base, workers)) for base in BASES]
        ratios = " | ".join(f"{_ratio(its, ours, 'all'):.2f}" if its else "-" for its in older)
        share = f"{_ratio(ours, found['here', limit(kind), workers], 'rate'):.0%}" if workers else "-"
        changed = found.get(("changing", kind, workers))
        lost = f"{1 - _ratio(ours, changed, 'all'):.0%}" if changed else "-"
        print(f"| {workers} | {kind} | {rate:,.0f} | {trainer:.2f} | {everything:.2f} | {ratios} | {share} | {lost} |")


def _ratio(ones: list[dict[str, float]], others: list[dict[str, float]], name: str) -> float:
    return statistics.median(one[name] / other[name] for one, other in zip(ones, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="checkout of another version")
    parser.add_argument("--data", type=Path, help="folder for shards that are made once (default: a temporary one)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--every", type=int, default=0, help="samples between two changes of the mix (0: none)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--lazy", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.data, args.seconds, args.lazy, args.every)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        args.data = args.data or Path(scratch)
        if not (args.data / "source").exists():
            names = DomainSpace.canonical().names
            write_toy_shards(
                args.data, dict.fromkeys(names, 1152), rows_per_shard=576, tokens=TOKENS, vocabulary=50_000
            )
        compare(args)


if __name__ == "__main__":
    main()
