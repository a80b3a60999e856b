"""One module for each loader that benchmarks/throughput.py measures, ours among them, all with the same few functions.

- ``VERSION``: name of the package, for the list of versions.
- ``convert(data, folder)``: writes the loader's own format from the tar shards; only where it has one.
- ``items(task)``: an endless (or long) iterator of single rows, decoded, as the loader gives them without workers.
- ``batches(task)``: an iterator of batches of 32 from the loader's own DataLoader: int64 tokens, or texts.
- ``value(item)`` and ``values(batch)``: the tokens (arrays or tensors) or the texts, to check what was delivered.

Modules run in the environment of their loader, so they import nothing of ours but ``loaders`` and ``prepared``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prepared import Prepared


def stacked(rows: Sequence[Any]) -> torch.Tensor:
    """Rows of tokens as one batch, (B, T) int64, widened at once: the fastest collation, and the same for all."""
    return torch.from_numpy(np.stack(rows).astype(np.int64))


MAIN, BENCH, STREAMING = "main", "bench", "streaming"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a loader is asked for.

    Attributes:
        data: The shards and what was converted from them.
        folder: The loader's own format and caches.
        mix: Domain -> weight; sums to 1.
        workers: Processes of the DataLoader.
        batch_size: Rows of a batch.
        seed: Of the order of rows.
        verifying: Whether this process checks what is delivered; if not, it measures.
    """

    data: Prepared
    folder: Path
    mix: Mapping[str, float]
    workers: int = 0
    batch_size: int = 32
    seed: int = 0
    verifying: bool = False

    @property
    def packed(self) -> bool:
        """Whether rows are tokens, not text."""
        return self.data.kind == "packed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A loader in the list.

    Attributes:
        title: In tables.
        environment: Where it is installed.
        reads: ``tar`` (the same shards for all), ``own`` (its own, indexed format) or ``limit``.
        kinds: Of rows that it can read.
        levels: ``items``, ``batches`` or both.
        format_of: Loader that converts the data for this one; None: itself, if it has a ``convert``.
    """

    title: str
    environment: str
    reads: str
    kinds: tuple[str, ...] = ("packed", "text")
    levels: tuple[str, ...] = ("items", "batches")
    format_of: str | None = None


LOADERS: dict[str, Entry] = {
    "dmagent": Entry(title="dmagent_loader", environment=MAIN, reads="tar"),
    "wds": Entry(title="webdataset RandomMix", environment=MAIN, reads="tar"),
    "hf_tar": Entry(title="datasets interleave, tar", environment=MAIN, reads="tar"),
    "nodes": Entry(title="torchdata weighted nodes over webdataset", environment=MAIN, reads="tar"),
    "energon": Entry(title="megatron-energon blend", environment=BENCH, reads="tar"),
    "hf_arrow": Entry(title="datasets interleave, Arrow", environment=MAIN, reads="own"),
    "mds": Entry(title="mosaicml-streaming proportions", environment=STREAMING, reads="own"),
    "lit": Entry(title="litdata CombinedStreamingDataset", environment=BENCH, reads="own"),
    "megatron_core": Entry(title="Megatron-core BlendedDataset", environment=MAIN, reads="own", kinds=("packed",)),
    "limit_rows": Entry(title="limit: the same rows by preadv", environment=MAIN, reads="limit", levels=("items",)),
    "limit_torch": Entry(title="limit: the same batch by torch", environment=MAIN, reads="limit", levels=("batches",)),
    "limit_files": Entry(title="limit: whole files in sequence", environment=MAIN, reads="limit", levels=("items",)),
}
