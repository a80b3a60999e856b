"""The limit with data workers: torch hands the same ready batch from worker to trainer, over and over; nothing is read.

The tokens of a batch as collated for all loaders, or its texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from loaders import Task, dmagent, stacked

VERSION = "torch"


class _Again(IterableDataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.rows


def batches(task: Task) -> Iterator[Any]:
    rows = [dmagent.value(row) for row, _ in zip(dmagent.sampler(task), range(task.batch_size), strict=False)]
    collate = stacked if task.packed else list
    return iter(DataLoader(_Again(rows), batch_size=task.batch_size, num_workers=task.workers, collate_fn=collate))
