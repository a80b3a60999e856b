"""webdataset: a stream of tar shards for each domain, mixed by RandomMix, batched by WebLoader.

Without its shuffle buffers, which cost time and change only the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import webdataset

from loaders import Task

VERSION = "webdataset"


def tokens(sample: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.from_numpy(sample["input_ids.npy"].astype(np.int64))}


def texts(sample: dict[str, Any]) -> dict[str, str]:
    return {"txt": sample["txt"]}


def sources(task: Task) -> list[webdataset.WebDataset]:
    """An endless stream of decoded samples for each domain."""
    return [
        webdataset.WebDataset(task.data.tars(name), resampled=True, shardshuffle=False).decode() for name in task.mix
    ]


def items(task: Task) -> Iterator[Any]:
    return iter(webdataset.RandomMix(sources(task), probs=list(task.mix.values())))


def value(item: Any) -> Any:
    return item["input_ids.npy"] if "input_ids.npy" in item else item["txt"]


def batches(task: Task) -> Iterator[Any]:
    parts = [source.map(tokens if task.packed else texts) for source in sources(task)]
    mixed = webdataset.RandomMix(parts, probs=list(task.mix.values()))
    return iter(webdataset.WebLoader(mixed, batch_size=task.batch_size, num_workers=task.workers))


def values(batch: Any) -> Any:
    return batch["input_ids"] if "input_ids" in batch else batch["txt"]
