"""webdataset: a stream of tar shards for each domain, mixed by RandomMix, batched by WebLoader.

Without its shuffle buffers, which cost time and change only the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import webdataset

from loaders import Task, stacked

VERSION = "webdataset"


def collate_tokens(samples: list[dict[str, Any]]) -> Any:
    return stacked([sample["input_ids.npy"] for sample in samples])


def collate_texts(samples: list[dict[str, Any]]) -> Any:
    return [sample["txt"] for sample in samples]


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
    mixed = webdataset.RandomMix(sources(task), probs=list(task.mix.values()))
    collate = collate_tokens if task.packed else collate_texts
    return iter(webdataset.WebLoader(mixed, batch_size=task.batch_size, num_workers=task.workers, collate_fn=collate))


def values(batch: Any) -> Any:
    return batch
