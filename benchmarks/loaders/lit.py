"""litdata: chunks of its own format (TokensLoader for tokens), one dataset for each domain, combined by weights.

A combined dataset with weights ends when its first domain does. It is then begun again, and the time of that is not
counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litdata
import torch
from litdata.streaming.item_loader import TokensLoader
from litdata.streaming.writer import BinaryWriter
from prepared import ROW_TOKENS, Prepared

from loaders import Task, stacked

VERSION = "litdata"
CHUNK_BYTES = 16 << 20


def convert(data: Prepared, folder: Path) -> None:
    for name in data.domains:
        if data.kind == "packed":
            size = CHUNK_BYTES // (2 * ROW_TOKENS) * ROW_TOKENS
            writer = BinaryWriter(str(folder / name), chunk_size=size, item_loader=TokensLoader(ROW_TOKENS))
        else:
            writer = BinaryWriter(str(folder / name), chunk_bytes=CHUNK_BYTES)
        for number, row in enumerate(data.rows(name)):
            writer[number] = row if data.kind == "text" else torch.from_numpy(row.copy())
        writer.done()
        writer.merge(1)


def mixed(task: Task) -> litdata.CombinedStreamingDataset:
    parts = [
        litdata.StreamingDataset(
            str(task.folder / name), shuffle=False, item_loader=TokensLoader(ROW_TOKENS) if task.packed else None
        )
        for name in task.mix
    ]
    weights = list(task.mix.values())
    return litdata.CombinedStreamingDataset(parts, seed=task.seed, weights=weights, iterate_over_all=False)


def items(task: Task) -> Iterator[Any]:
    return iter(mixed(task))


def value(item: Any) -> Any:
    return item


def collate(rows: list[Any]) -> Any:
    return stacked(rows) if isinstance(rows[0], torch.Tensor) else rows


def batches(task: Task) -> Iterator[Any]:
    dataset = mixed(task)
    return iter(
        litdata.StreamingDataLoader(dataset, batch_size=task.batch_size, num_workers=task.workers, collate_fn=collate)
    )


values = value
