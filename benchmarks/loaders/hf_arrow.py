"""datasets: Arrow copies of the rows, map-style, mixed by interleave_datasets.

In the fastest way that was found: map-style, which is several times faster than the same files as streams, and batches
taken out of its Arrow tables, 32 rows at a time, which is faster than its own formats for torch and numpy. It computes
the whole order first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from prepared import Prepared
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from loaders import Task

VERSION = "datasets"


def convert(data: Prepared, folder: Path) -> None:
    column = datasets.List(datasets.Value("uint16")) if data.kind == "packed" else datasets.Value("string")
    for name in data.domains:
        with datasets.arrow_writer.ArrowWriter(
            features=datasets.Features({"row": column}), path=str(folder / "writing.arrow"), writer_batch_size=1000
        ) as writer:
            for row in data.rows(name):
                writer.write({"row": row})
            writer.finalize()
        datasets.Dataset.from_file(str(folder / "writing.arrow")).save_to_disk(str(folder / name))
        (folder / "writing.arrow").unlink()


def interleaved(task: Task, form: str | None) -> Any:
    parts = [datasets.load_from_disk(str(task.folder / name)) for name in task.mix]
    mixed = datasets.interleave_datasets(
        parts, probabilities=list(task.mix.values()), seed=task.seed, stopping_strategy="all_exhausted"
    )
    return mixed.with_format(form)


def items(task: Task) -> Iterator[Any]:
    return iter(interleaved(task, "numpy" if task.packed else None))


def value(item: Any) -> Any:
    return item["row"]


def collate(table: Any) -> Any:
    rows = table["row"].combine_chunks()
    if rows.type == "string":
        return rows.to_pylist()
    return torch.from_numpy(rows.flatten().to_numpy().reshape(len(rows), -1).astype(np.int64))


def batches(task: Task) -> Iterator[Any]:
    rows = interleaved(task, "arrow")
    numbers = BatchSampler(SequentialSampler(rows), task.batch_size, drop_last=False)
    return iter(DataLoader(rows, batch_size=None, sampler=numbers, num_workers=task.workers, collate_fn=collate))


def values(batch: Any) -> Any:
    return batch
