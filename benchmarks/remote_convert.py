"""Writes the shards of benchmarks/remote.py in a peer's own format: ``python remote_convert.py mds|lit FOLDER``."""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FILE_BYTES = 16 << 20


def rows(domain: Path) -> Iterator[Any]:
    """Rows of a domain: (2048,) uint16, or str."""
    for path in sorted(domain.iterdir()):
        with tarfile.open(path) as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                data = file.read()
                packed = info.name.endswith(".npy")
                yield np.frombuffer(data, np.uint16, 2048, offset=len(data) - 4096) if packed else data.decode()


def to_mds(domain: Path, target: Path, packed: bool) -> None:
    import streaming

    columns = {"row": "ndarray:uint16:2048" if packed else "str"}
    with streaming.MDSWriter(out=str(target), columns=columns, size_limit=FILE_BYTES) as writer:
        for row in rows(domain):
            writer.write({"row": row})


def to_lit(domain: Path, target: Path, packed: bool) -> None:
    import torch
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    if packed:
        writer = BinaryWriter(str(target), chunk_size=FILE_BYTES // 4096 * 2048, item_loader=TokensLoader(2048))
    else:
        writer = BinaryWriter(str(target), chunk_bytes=FILE_BYTES)
    for number, row in enumerate(rows(domain)):
        writer[number] = torch.from_numpy(row.copy()) if packed else row
    writer.done()
    writer.merge(1)


def main() -> None:
    peer, folder = sys.argv[1], Path(sys.argv[2])
    for domain in sorted((folder / "tar").iterdir()):
        write = to_mds if peer == "mds" else to_lit
        write(domain, folder / peer / domain.name, folder.name == "packed")


if __name__ == "__main__":
    main()
