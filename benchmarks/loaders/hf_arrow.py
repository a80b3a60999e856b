"""datasets: Arrow copies of the rows, map-style, mixed by interleave_datasets.

Map-style, because that was several times faster than the same files as streams. It computes the whole order first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from prepared import Prepared
from torch.utils.data import DataLoader

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


def interleaved(task: Task, kind_of_arrays: str | None) -> Any:
    parts = [datasets.load_from_disk(str(task.folder / name)) for name in task.mix]
    mixed = datasets.interleave_datasets(
        parts, probabilities=list(task.mix.values()), seed=task.seed, stopping_strategy="all_exhausted"
    )
    return mixed.with_format(kind_of_arrays) if task.packed else mixed


def items(task: Task) -> Iterator[Any]:
    return iter(interleaved(task, "numpy"))


def batches(task: Task) -> Iterator[Any]:
    return iter(DataLoader(interleaved(task, "torch"), batch_size=task.batch_size, num_workers=task.workers))


def value(item: Any) -> Any:
    return item["row"]


values = value
