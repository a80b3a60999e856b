"""Ours: the public API as in the README."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from dmagent_loader import AgentWeightedSampler, MixingDataLoader, ReadingConfig
from dmagent_loader.transforms import collate_packed
from loaders import Task

VERSION = "dmagent-loader"


def sampler(task: Task, **options: Any) -> AgentWeightedSampler:
    """The sampler of a static mix: nothing is ever decided."""
    return AgentWeightedSampler(
        task.data.manifest,
        samples_per_reweight=10**9,
        initial_mix=task.mix,
        seed=task.seed,
        exhausted="repeat",
        reading=ReadingConfig(cache_dir=task.folder, progress=False),
        **options,
    )


def items(task: Task) -> Iterator[Any]:
    return iter(sampler(task))


def value(item: Any) -> Any:
    return item["input_ids.npy"] if "input_ids.npy" in item else item["txt"]


def collate_texts(samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Lists, tags included."""
    return {name: [sample[name] for sample in samples] for name in samples[0]}


def batches(task: Task) -> Iterator[Any]:
    collate = functools.partial(collate_packed, labels=False) if task.packed else collate_texts
    lazy = {"decode": "lazy"} if task.packed else {}
    return iter(
        MixingDataLoader(
            sampler(task, **lazy), batch_size=task.batch_size, num_workers=task.workers, collate_fn=collate
        )
    )


def values(batch: Any) -> Any:
    return batch["input_ids"] if "input_ids" in batch else batch["txt"]
