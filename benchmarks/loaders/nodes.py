"""torchdata.nodes: its weighted sampler over one node for each domain.

It reads no files itself, so each node wraps webdataset's stream of the domain's shards. Its workers are threads, or
processes that take over a function (not the reading); threads, as its documentation shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchdata.nodes import (
    Batcher,
    IterableWrapper,
    Loader,
    MultiNodeWeightedSampler,
    ParallelMapper,
    StopCriteria,
)

from loaders import Task, wds

VERSION = "torchdata"


def mixed(task: Task) -> Any:
    parts = {name: IterableWrapper(source) for name, source in zip(task.mix, wds.sources(task), strict=True)}
    return MultiNodeWeightedSampler(
        parts, dict(task.mix), stop_criteria=StopCriteria.CYCLE_UNTIL_ALL_DATASETS_EXHAUSTED, seed=task.seed
    )


def items(task: Task) -> Iterator[Any]:
    return iter(Loader(mixed(task)))


def batches(task: Task) -> Iterator[Any]:
    collate = wds.collate_tokens if task.packed else wds.collate_texts
    batcher = Batcher(mixed(task), task.batch_size)
    return iter(Loader(ParallelMapper(batcher, collate, num_workers=task.workers, method="thread")))


value = wds.value
values = wds.values
