"""Processes that share a folder of blocks are killed at any moment: no row is lost or doubled, nothing stays behind.

    python -m benchmarks.reliability.block_kills [--kills 100]

In each round, three processes read the same rows of remote shards through one folder, and one of them gets SIGKILL at a
random moment, most often while it fetches. The others must read every row, in order, in bounded time. Afterwards each
block in the folder must hold the bytes of its shard, and the next process must find no lock and leave no partial file.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import queue
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.far_server import serving
from dmagent_loader._loading.blocks_ahead import BlocksAhead, BlocksOfRows
from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.sources import blocks, fetching
from dmagent_loader.shards.sources.node_cache import NodeCache
from dmagent_loader.shards.writing.tar_writer import TarWriter

SHARDS, ROWS, ROW_BYTES = 8, 60, 3000
READERS = 3
RUN, RUNS_AHEAD = 40, 4
"""Rows planned at a time, and how many such runs ahead."""
LONGEST_SECONDS = 120.0
"""After the kill, for the readers that live on."""
LIMITS = (None, 6 << 15, 0)
"""Bytes of the folder: enough; less than a reader would like to have; none, so that blocks stay in memory."""


def write_shards(folder: Path) -> None:
    """Shards of rows that differ."""
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        writer = TarWriter(folder / f"s-{shard}.tar")
        for row in range(ROWS):
            writer.add(f"{row:03d}", {"txt": f"{shard} {row} ".encode() + rng.bytes(ROW_BYTES // 2).hex().encode()})
        writer.close()


def collection_of(url: str, folder: Path, limit: int | None) -> ShardCollection:
    """The shards, read through a folder of blocks."""
    return ShardCollection.open(
        {"source/a": url},
        cache_dir=folder / "index",
        block_cache_dir=folder / "blocks",
        block_cache_bytes=limit,
        progress=False,
    )


def order() -> np.ndarray:
    """Shard and row of each draw: shuffled over two shards at a time, as a window does."""
    rng = np.random.default_rng(1)
    rows = np.array([(shard, row) for shard in range(SHARDS) for row in range(ROWS)])
    return np.concatenate([rng.permutation(part) for part in np.array_split(rows, SHARDS // 2)])


def read(collection: ShardCollection, results: Any) -> None:
    """Reads all rows in order, planned ahead, and reports their digest."""
    rows, digest = order(), hashlib.sha256()
    assert collection.fetcher is not None
    ahead = BlocksAhead(1, collection.fetcher)
    runs = np.array_split(np.arange(len(rows)), len(rows) // RUN)
    planned = 0
    for number, run in enumerate(runs):
        while planned < min(len(runs), number + RUNS_AHEAD):
            draws = runs[planned]
            domain = np.zeros(len(draws), np.int64)
            blocks = BlocksOfRows.of(*collection.blocks_of(domain, rows[draws, 0], rows[draws, 1]))
            ahead.request(domain, draws, blocks, int(draws[0]), [len(draws)])
            planned += 1
        ahead.advance()
        for shard, row in rows[run].tolist():
            digest.update(collection.read(0, shard, row).members["txt"])
    ahead.close()
    results.put((digest.hexdigest(), collection.fetcher.can_store))
    results.close()
    results.join_thread()
    os._exit(0)


def wrong_blocks(folder: Path, shards: Path, collection: ShardCollection) -> int:
    """Blocks whose bytes are not those of their shard."""
    known = {}
    for shard in range(SHARDS):
        layout = collection._tables.get(shard).blocks
        data = (shards / f"s-{shard}.tar").read_bytes()
        for number in range(len(layout)):
            block = layout[number]
            known[block.name] = data[block.start : block.start + block.length]
    return sum(path.read_bytes() != known[path.stem] for path in folder.glob("*.block"))


def play(url: str, shards: Path, expected: str, rng: random.Random, limit: int | None) -> Counter[str]:
    """One kill, unless the process was faster."""
    counts: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(shards.parent / "index", folder / "index")
    collection = collection_of(url, folder, limit)
    context = multiprocessing.get_context("fork")
    results = [context.Queue() for _ in range(READERS)]
    readers = [context.Process(target=read, args=(collection, rows)) for rows in results]
    for reader in readers:
        reader.start()
    partials = folder / "blocks"
    deadline = time.monotonic() + rng.uniform(0.02, 0.4)
    while time.monotonic() < deadline:
        if rng.random() < 0.02 and partials.exists() and any(partials.glob("*.partial")):
            break  # in the middle of a fetch
        time.sleep(0.002)
    victim = rng.randrange(READERS)
    pid = readers[victim].pid
    assert pid is not None
    if readers[victim].is_alive():
        counts["kills"] += 1
        counts["while fetching"] += any(partials.glob("*.partial"))
        os.kill(pid, signal.SIGKILL)
    else:
        counts["too late"] += 1
    for number, rows in enumerate(results):
        if number == victim:
            continue
        try:
            found, has_folder = rows.get(timeout=LONGEST_SECONDS)
            counts["wrong rows"] += found != expected
            counts["without the folder"] += limit != 0 and not has_folder
        except queue.Empty:
            counts["did not finish"] += 1
    for reader in readers:
        reader.join(5)
        if reader.is_alive():
            reader.kill()
    counts["wrong blocks"] += wrong_blocks(partials, shards, collection)
    if limit != 0:
        next_one = NodeCache(partials, limit)
        counts["left behind"] += sum(path.suffix == ".partial" for path in partials.iterdir())
        counts["left behind"] += sum(path.suffix == ".needs" for path in partials.iterdir()) - 1
        if limit is not None:
            counts["beyond the limit"] += next_one._survey().total > limit
    shutil.rmtree(folder)
    return counts


def campaign(kills: int, seed: int = 0) -> Counter[str]:
    """Kills so many processes; counts what went wrong."""
    blocks.BLOCK_BYTES = 1 << 15
    fetching.FETCHES = 4
    rng, totals = random.Random(seed), Counter[str]()
    folder = Path(tempfile.mkdtemp())
    shards = folder / "shards"
    shards.mkdir()
    write_shards(shards)
    with serving(shards, latency=0.005, rate=20e6) as address:
        url = f"{address}/s-{{0..{SHARDS - 1}}}.tar"
        local = collection_of(str(shards), folder / "local", None)
        digest = hashlib.sha256()
        for shard, row in order().tolist():
            digest.update(local.read(0, shard, row).members["txt"])
        collection_of(url, folder, None)  # makes the indexes
        for limit in itertools.cycle(LIMITS):
            if totals["kills"] >= kills:
                break
            totals += play(url, shards, digest.hexdigest(), rng, limit)
            print(f"\r{dict(totals)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    shutil.rmtree(folder)
    return totals


FAULTS = ("wrong rows", "did not finish", "wrong blocks", "left behind", "beyond the limit", "without the folder")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    totals = campaign(args.kills, args.seed)
    print(json.dumps({**dict.fromkeys(FAULTS, 0), **totals}))
    return int(any(totals[fault] for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
