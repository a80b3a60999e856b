"""Time and memory of a shard with a million empty members: ``python -m benchmarks.reliability.million``."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

MEASURE = """
import resource, sys, time
from dmagent_loader.shards.index.shard_index import build_index
from dmagent_loader.shards.sources.local import open_source, shard_version
path = sys.argv[1]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.perf_counter()
index = build_index(path, open_source(path), shard_version(path).size)
seconds = time.perf_counter() - begin
print(index.num_rows, seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, len(index.damage))
"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What indexing took.

    Attributes:
        rows: That were found.
        seconds: Of time.
        peak_bytes: Memory of the process at its peak, less what it had before.
        file_bytes: Size of the shard.
    """

    rows: int
    seconds: float
    peak_bytes: int
    file_bytes: int


def write(path: Path, members: int) -> None:
    """A tar of so many empty members, each a row of its own."""
    header = bytearray(512)
    header[100:108] = b"0000644\0"
    header[124:136] = b"%011o\0" % 0
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    with open(path, "wb") as file:
        for number in range(members):
            header[0:13] = b"%09d.txt" % number
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            file.write(header)
        file.write(bytes(1024))


def measure(members: int, folder: Path) -> Measured:
    """Indexes such a shard in a process of its own."""
    path = folder / "million.tar"
    write(path, members)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True, timeout=240
    )
    rows, seconds, peak, damaged = result.stdout.split()
    assert damaged == "0"
    size = path.stat().st_size
    path.unlink()
    return Measured(rows=int(rows), seconds=float(seconds), peak_bytes=int(peak), file_bytes=size)


def main() -> None:
    """Prints the figures for 1e4 to 1e6 members."""
    print(
        "| members | MB | seconds | rows/s | MB of memory | bytes of memory for each row |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for members in (10_000, 100_000, 1_000_000):
            found = measure(members, Path(folder))
            assert found.rows == members
            print(
                f"| {members:,} | {found.file_bytes / 1e6:.0f} | {found.seconds:.2f} | "
                f"{members / found.seconds:,.0f} | {found.peak_bytes / 1e6:.0f} | {found.peak_bytes / members:.0f} |"
            )


if __name__ == "__main__":
    main()
