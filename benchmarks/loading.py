"""One loader in a process of its own, in the environment where it is installed: converts, checks or measures.

benchmarks/data.py and benchmarks/throughput.py start it; it prints one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measuring
import numpy as np
from loaders import LOADERS, Task
from prepared import Prepared

ITEMS_PER_LOOK = 64
"""Items, or a sixteenth as many batches, between two looks at the clock."""

WARM_UP_SECONDS = 0.5
MOST_PASSES = 1000


def open_task(args: argparse.Namespace, *, verifying: bool) -> Task:
    data = Prepared(args.data)
    folder = data.folder / (LOADERS[args.loader].format_of or args.loader)
    folder.mkdir(exist_ok=True)
    return Task(data=data, folder=folder, mix=data.mix, workers=args.workers, seed=args.seed, verifying=verifying)


def convert(module: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Writes the loader's own format, once; a folder that was left half-written is made anew."""
    data = Prepared(args.data)
    folder = data.folder / args.loader
    done = folder / ".converted"
    stamp = data.stamp
    if not hasattr(module, "convert") or (done.exists() and done.read_text() == stamp):
        return {"seconds": 0.0}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.perf_counter()
    module.convert(data, folder)
    done.write_text(stamp)
    return {"seconds": time.perf_counter() - started}


def check(module: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Takes rows and recognises each by its content: all must be in the shards, and their mix the one asked for.

    A loader may say that its first `UNSETTLED_ROWS` are in another mix; they are recognised, but not counted.

    Raises:
        AssertionError: A row that is in no shard, a batch of another type, or a mix that chance does not explain.
    """
    task = open_task(args, verifying=True)
    if not hasattr(module, "value"):
        return {"checked": 0}
    unsettled = getattr(module, "UNSETTLED_ROWS", 0)
    wanted = unsettled + args.rows
    if args.level == "items":
        rows = [module.value(item) for item in itertools.islice(make(module, args.level)(task), wanted)]
    else:
        rows = []
        for batch in itertools.islice(make(module, args.level)(task), wanted // task.batch_size):
            values = module.values(batch)
            assert len(rows) % task.batch_size == 0, "a batch that is not full, and not the last"
            if task.packed:
                assert str(values.dtype) == "torch.int64", f"a batch of {values.dtype}, not of int64"
                values = values.numpy().astype(np.uint16)
            rows += list(values)
    task.data.count(rows[:unsettled])
    counts = task.data.count(rows[unsettled:])
    expected = np.array(list(task.mix.values())) * counts.sum()
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    bound = freedom + 6 * (2 * freedom) ** 0.5
    assert chi_square < bound, f"chi-square {chi_square:.0f} with {freedom} degrees of freedom: not the mix asked for"
    return {"checked": len(rows), "chi_square": chi_square, "freedom": freedom}


def measure(module: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Rows per second after a warm-up, and the seconds until the first row.

    A loader that comes to an end is begun again; its start is not counted then either.
    """
    task = open_task(args, verifying=False)
    warm(task, args.loader)
    look = ITEMS_PER_LOOK if args.level == "items" else ITEMS_PER_LOOK // 16
    number, seconds, first = 0, 0.0, None
    for _ in range(MOST_PASSES):
        started = time.perf_counter()
        rows = iter(make(module, args.level)(task))
        next(rows)
        if first is None:
            first = time.perf_counter() - started
            _take(rows, look, min(WARM_UP_SECONDS, args.seconds))
        taken, passed = _take(rows, look, args.seconds - seconds)
        number, seconds = number + taken, seconds + passed
        if seconds >= args.seconds:
            break
    else:
        raise SystemExit(f"{args.loader} ended {MOST_PASSES} times within {args.seconds:g} seconds: too little data")
    per_item: float = task.batch_size if args.level == "batches" else 1
    if hasattr(module, "rows_per_item"):
        per_item = module.rows_per_item(task)
    return {"rows_per_second": number * per_item / seconds, "first": first}


def warm(task: Task, loader: str) -> None:
    """Reads the loader's files, so that all are measured with their files in the page cache."""
    folder = task.folder if LOADERS[loader].reads == "own" else task.data.folder / "shards"
    buffer = bytearray(1 << 20)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def make(module: Any, level: str) -> Callable[[Task], Iterator[Any]]:
    """The module's function for a level."""
    function: Callable[[Task], Iterator[Any]] = getattr(module, level)
    return function


def profile(module: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The functions in which the rows after the warm-up spend their time, as a Markdown table."""
    rows = iter(make(module, args.level)(open_task(args, verifying=False)))
    _take(rows, 1, min(WARM_UP_SECONDS, args.seconds))
    return {"profile": measuring.profiled(lambda: _take(rows, 1, args.seconds))}


def _take(rows: Iterator[Any], look: int, seconds: float) -> tuple[int, float]:
    """Takes items until the time is over or there are no more."""
    number, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        taken = sum(1 for _ in itertools.islice(rows, look))
        number += taken
        if taken < look:
            return number, time.perf_counter() - started
    return number, passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("convert", "check", "measure", "profile", "convert+check+measure"))
    parser.add_argument("loader", choices=LOADERS)
    parser.add_argument("--data", type=Path, required=True, help="bench_data/packed or bench_data/text")
    parser.add_argument("--level", choices=("items", "batches"), default="items")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rows", type=int, default=20_000, help="to check")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    module = importlib.import_module(f"loaders.{args.loader}")
    commands = {"convert": convert, "check": check, "measure": measure, "profile": profile}
    result: dict[str, Any] = {}
    for command in args.command.split("+"):
        result |= commands[command](module, args)
    print(json.dumps({**result, "versions": measuring.versions([module.VERSION])}), flush=True)
    # Loaders leave workers and threads behind that take seconds to stop, or hang.
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(0)


if __name__ == "__main__":
    main()
