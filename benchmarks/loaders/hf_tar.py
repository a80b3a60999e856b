"""datasets: streams of the same tar shards through its webdataset builder, mixed by interleave_datasets.

Rows of tokens come out as lists. They are made tensors batch by batch, because its own ways (``with_format``, ``map``)
were slower on such streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader

from loaders import Task, stacked

VERSION = "datasets"


def interleaved(task: Task) -> Any:
    parts = []
    for name in task.mix:
        part = datasets.load_dataset(
            "webdataset",
            data_files={"train": task.data.tars(name)},
            split="train",
            streaming=True,
            cache_dir=str(task.folder),
        ).select_columns([task.data.member])
        parts.append(part)
    return datasets.interleave_datasets(
        parts, probabilities=list(task.mix.values()), seed=task.seed, stopping_strategy="all_exhausted"
    )


def collate(rows: list[dict[str, Any]]) -> Any:
    return stacked([row["input_ids.npy"] for row in rows])


def items(task: Task) -> Iterator[Any]:
    return iter(interleaved(task))


def batches(task: Task) -> Iterator[Any]:
    loader = DataLoader(
        interleaved(task),
        batch_size=task.batch_size,
        num_workers=task.workers,
        collate_fn=collate if task.packed else None,
    )
    return iter(loader)


def value(item: Any) -> Any:
    return item["input_ids.npy"] if "input_ids.npy" in item else item["txt"]


def values(batch: Any) -> Any:
    return batch if isinstance(batch, torch.Tensor) else batch["txt"]
