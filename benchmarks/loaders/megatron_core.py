"""Megatron-core: indexed .bin/.idx copies, one GPTDataset for each domain, blended by BlendedDataset.

It gives labels, a loss mask and positions with each row, as its trainers need them, and computes the whole order first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from prepared import ROW_TOKENS, Prepared
from torch.utils.data import DataLoader

from loaders import Task

VERSION = "megatron-core"
TOTAL_ROWS = 1 << 20


class Tokenizer:
    """What GPTDataset asks of one."""

    vocab_size = 1 << 16
    eod = 0
    pad = -1
    unique_identifiers = {"class": "bench"}  # noqa: RUF012


def convert(data: Prepared, folder: Path) -> None:
    for name in data.domains:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.uint16)
        for row in data.rows(name):
            builder.add_document(torch.from_numpy(row.astype(np.int32)), [len(row)])
        builder.finalize(str(folder / f"{name}.idx"))


def blended(task: Task) -> Any:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    config = GPTDatasetConfig(
        random_seed=task.seed + 1,
        sequence_length=ROW_TOKENS,
        tokenizer=Tokenizer(),
        path_to_cache=str(task.folder / "cache"),
        blend=([str(task.folder / name) for name in task.mix], list(task.mix.values())),
        split="100,0,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        # Then a row of the shards is a row here.
        add_extra_token_to_sequence=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [TOTAL_ROWS, 0, 0], lambda: True, config).build()[0]


def items(task: Task) -> Iterator[Any]:
    return map(blended(task).__getitem__, itertools.count())


def batches(task: Task) -> Iterator[Any]:
    return iter(DataLoader(blended(task), batch_size=task.batch_size, num_workers=task.workers))


def value(item: Any) -> Any:
    return item["tokens"]


values = value
