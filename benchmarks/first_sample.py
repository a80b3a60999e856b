"""Seconds to the first sample of shards in a store that is far away: ``python benchmarks/first_sample.py``.

The store answers on loopback after 30 ms and sends 100 MB/s on each connection. A start on a new machine is measured
with indexes in the store and without, beside one shard that is read whole. The store takes processor time on the same
machine, which the seconds contain and the CPU seconds do not.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from far_server import serving
from measuring import interleaved, median

from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader.shards import ShardCollection

ROW_BYTES = 4096


def write_shards(folder: Path, shards: int, shard_bytes: int) -> None:
    """Writes shards of random rows, and their indexes beside them, unless an earlier call has."""
    if (folder / "shards.index").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(shards):
        with tarfile.open(folder / f"s-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(shard_bytes // (ROW_BYTES + 512)):
                info = tarfile.TarInfo(f"{row:06d}.bin")
                info.size = ROW_BYTES
                tar.addfile(info, io.BytesIO(generator.bytes(ROW_BYTES)))
    with tempfile.TemporaryDirectory() as cache:
        ShardCollection.open({"source/a": str(folder)}, cache_dir=cache, progress=False).write_indexes()


def cpu_seconds() -> float:
    """Processor time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def start(url: str, shards: int, cache: str, *, indexes: bool, cpu: list[float]) -> float:
    """Seconds until the first sample; the processor time goes to `cpu`."""
    reading = ReadingConfig(cache_dir=cache, progress=False, num_threads=0, num_rows=1, indexes=indexes)
    pattern = {"source/a": f"{url}/s-{{000000..{shards - 1:06d}}}.tar"}
    began, before = time.perf_counter(), cpu_seconds()
    sampler = AgentWeightedSampler(pattern, samples_per_reweight=1000, decode={"bin": bytes}, reading=reading)
    next(iter(sampler))
    cpu.append(cpu_seconds() - before)
    return time.perf_counter() - began


def one_shard(url: str) -> float:
    """Seconds to read one shard whole."""
    began = time.perf_counter()
    with urllib.request.urlopen(f"{url}/s-000000.tar") as answer:
        answer.read()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder for shards that are made once (default: a temporary one)")
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--shard-bytes", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.data or Path(temporary)) / f"far-{args.shards}-{args.shard_bytes}"
        write_shards(folder, args.shards, args.shard_bytes)
        print(measure(folder, args.shards, args.repeats))


def measure(folder: Path, shards: int, repeats: int) -> str:
    """The table of all kinds of starts, which are interleaved."""
    cpu: dict[str, list[float]] = {"indexes in the store": [], "no indexes": [], "cached": []}
    with serving(folder) as url, tempfile.TemporaryDirectory() as known:
        start(url, shards, known, indexes=True, cpu=[])

        def fresh(name: str, **settings: Any) -> float:
            with tempfile.TemporaryDirectory() as cache:
                return start(url, shards, cache, cpu=cpu[name], **settings)

        times = interleaved(
            {
                "one shard": lambda: one_shard(url),
                "indexes in the store": lambda: fresh("indexes in the store", indexes=True),
                "no indexes": lambda: fresh("no indexes", indexes=False),
                "cached": lambda: start(url, shards, known, indexes=True, cpu=cpu["cached"]),
            },
            repeats,
        )
    lines = [
        f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n",
        "| start | seconds to the first sample | times one shard | CPU seconds |\n|---|---:|---:|---:|",
    ]
    for name, found in times.items():
        used = f"{median(cpu[name]):.2f}" if name in cpu else ""
        lines.append(f"| {name} | {median(found):.2f} | {median(found) / median(times['one shard']):.1f} | {used} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
