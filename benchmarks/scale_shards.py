"""How fast shards are indexed and opened, and what memory they take; for `benchmarks/scale.py`.

The shards are real files. How many of them fit on a disk and in the time of a benchmark sets the limit: what more of
them would cost is said by the growth from one number of shards to the next.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from measuring import interleaved, median, say, seconds
from scale_plan import resident_mb

from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.index.cache import IndexCache
from dmagent_loader.shards.index.shard_index import build_index
from dmagent_loader.shards.sources.local import open_source

THREADS = (1, 8)
ROW_KINDS = {
    "tiny shards, 4 rows of 200 B": (2000, 4, 200),
    "text rows of 500 B": (8, 24_000, 500),
    "packed rows of 4 KiB": (8, 5_000, 4096 + 128),
    "rows of 1 MiB": (8, 24, 1 << 20),
}
"""Name -> shards, rows of each, bytes of each row."""

COUNTS = (1000, 10_000, 30_000)
DOMAINS, READS = 1000, 1024
DECISIONS, INTERVAL = 80, 64_000
LINKS_OF_A_FILE = 30_000
"""File systems allow some 65,000."""

_READ_BYTES = 4 << 20


def write_shards(folder: Path, shards: int, rows: int, row_bytes: int) -> list[Path]:
    """Writes shards whose rows hold random bytes, or finds those that an earlier call has written."""
    done = folder / "complete"
    paths = [folder / f"{number:07d}.tar" for number in range(shards)]
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        generator = np.random.default_rng(0)
        for path in paths:
            payload = generator.bytes(rows * row_bytes)
            with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
                for row in range(rows):
                    info = tarfile.TarInfo(f"{path.stem}-{row:06d}.bin")
                    info.size = row_bytes
                    tar.addfile(info, io.BytesIO(payload[row * row_bytes : (row + 1) * row_bytes]))
        os.sync()
        done.touch()
    return paths


def drop_from_cache(paths: list[Path]) -> None:
    """Makes the next read of these files go to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def index_all(paths: list[Path], threads: int) -> int:
    """Indexes every shard, as a collection does when its cache is empty; returns the rows."""

    def index(path: Path) -> int:
        return build_index(str(path), open_source(str(path)), path.stat().st_size).num_rows

    if threads == 1:
        return sum(map(index, paths))
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(index, paths))


def list_with_tarfile(paths: list[Path]) -> int:
    """Lists every shard with Python's tarfile, which skips over the payloads and so checks nothing."""
    total = 0
    for path in paths:
        with tarfile.open(path) as tar:
            total += len(tar.getmembers())
    return total


def read_only(paths: list[Path]) -> int:
    """Reads the same bytes and does nothing with them."""
    total, buffer = 0, bytearray(_READ_BYTES)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while read := file.readinto(buffer):
                total += read
    return total


def index_rates(data: Path, repeats: int, quick: bool) -> list[dict[str, Any]]:
    """Seconds to index shards of several kinds, from the disk and from the page cache, with one thread and with 8."""
    found = []
    for kind, (shards, rows, row_bytes) in ROW_KINDS.items():
        if quick:
            shards, rows = max(2, shards // 40), max(4, rows // 10)
        paths = write_shards(data / f"rows-{shards}-{rows}-{row_bytes}", shards, rows, row_bytes)
        works: dict[str, Callable[[], float]] = {}
        for cache in ("cold", "warm"):
            for name, work in {
                **{f"index {threads}": lambda t=threads, p=paths: index_all(p, t) for threads in THREADS},
                "tarfile": lambda p=paths: list_with_tarfile(p),
                "read": lambda p=paths: read_only(p),
            }.items():
                works[f"{cache} {name}"] = lambda c=cache, w=work, p=paths: _timed(c, w, p)
        size = sum(path.stat().st_size for path in paths)
        times = interleaved(works, repeats)
        found.append({"kind": kind, "shards": shards, "rows": shards * rows, "mb": size / 1e6, "seconds": times})
        say(f"index {kind}: {size / 1e6 / median(times['warm index 1']):.0f} MB/s warm, one thread")
    return found


def _timed(cache: str, work: Callable[[], object], paths: list[Path]) -> float:
    if cache == "cold":
        drop_from_cache(paths)
    else:
        read_only(paths)
    return seconds(work)


def collection(data: str, shards: int, cache: str) -> dict[str, float]:
    """What a process needs to open so many tiny shards of 1,000 domains and to read 1,024 rows.

    Runs in a process of its own: what it measures is the peak since that process began.
    """
    paths = sorted(Path(data).glob("*.tar"))[:shards]
    domains = min(DOMAINS, shards)
    names = [f"source/{number}" for number in range(domains)]
    listed: dict[str, list[str]] = {
        name: [str(path) for path in paths[number::domains]] for number, name in enumerate(names)
    }
    before = resident_mb("VmRSS")
    opened: list[ShardCollection] = []
    open_seconds = seconds(lambda: opened.append(ShardCollection.open(listed, cache_dir=cache, progress=False)))
    fingerprint = seconds(lambda: opened[0].fingerprint)
    generator = np.random.default_rng(0)
    for domain in generator.integers(0, domains, READS).tolist():
        shard = int(generator.integers(0, len(listed[names[domain]])))
        opened[0].read(domain, shard, 0)
    return {
        "shards": len(paths),
        "open_seconds": open_seconds,
        "fingerprint_seconds": fingerprint,
        "peak_mb": resident_mb("VmHWM") - before,
        "resident_mb": resident_mb("VmRSS") - before,
    }


def link_shards(paths: list[Path], folder: Path, cache: Path, shards: int) -> dict[str, str]:
    """Makes many shards out of few, and their cached indexes, as links to them; what they hold does not matter here.

    Returns:
        Domain -> folder of its shards.
    """
    names = {f"source/{number}": folder / f"{number:04d}" for number in range(min(DOMAINS, shards))}
    done = folder / "complete"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        few = paths[: -(-shards // LINKS_OF_A_FILE)]
        ShardCollection.open({"source/0": few}, cache_dir=cache, progress=False)
        indexes = IndexCache(cache)
        homes = list(names.values())
        for home in homes:
            home.mkdir(parents=True)
        for number in range(shards):
            link, path = homes[number % len(homes)] / f"{number:07d}.tar", few[number // LINKS_OF_A_FILE]
            os.link(path, link)
            entry = indexes.entry(str(link))
            entry.unlink(missing_ok=True)
            os.link(indexes.entry(str(path)), entry)
        done.touch()
    return {name: str(home) for name, home in names.items()}


def sampler(folders: dict[str, str], cache: str) -> dict[str, float]:
    """What a process needs to build a sampler over linked shards, to change its mix 80 times, and to read 1,024 rows.

    Runs in a process of its own: what it measures is the peak since that process began.
    """
    before = resident_mb("VmRSS")
    opened: list[AgentWeightedSampler] = []
    settings = {
        "samples_per_reweight": INTERVAL,
        "exhausted": "repeat",
        "reading": ReadingConfig(cache_dir=cache, progress=False),
    }
    open_seconds = seconds(lambda: opened.append(AgentWeightedSampler(folders, **settings)))
    fingerprint = seconds(lambda: opened[0].collection.fingerprint)
    generator = np.random.default_rng(0)
    for number in range(DECISIONS):
        opened[0].seek(number * INTERVAL)
        mix = generator.dirichlet(np.ones(len(folders))).tolist()
        opened[0].set_mix(dict(zip(folders, mix, strict=True)))
    for _, _ in zip(range(READS), opened[0], strict=False):
        pass
    return {
        "shards": sum(len(opened[0].collection.shard_rows(domain)) for domain in range(len(folders))),
        "decisions": DECISIONS,
        "open_seconds": open_seconds,
        "fingerprint_seconds": fingerprint,
        "peak_mb": resident_mb("VmHWM") - before,
        "resident_mb": resident_mb("VmRSS") - before,
    }
