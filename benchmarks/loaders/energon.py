"""megatron-energon: the same tar shards with its index files beside them, blended by weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron.energon as energon
from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator
from prepared import Prepared

from loaders import Task, stacked

VERSION = "megatron-energon"


def convert(data: Prepared, folder: Path) -> None:
    """Writes no copy: ``.nv-meta`` and ``.tar.idx`` beside the shards, and the blend in `folder`."""
    blend = []
    for name, weight in data.mix.items():
        shards = [Path(path) for path in data.tars(name)]
        parent = shards[0].parent
        ratio = [("train", 1.0), ("val", 0.0), ("test", 0.0)]
        WebdatasetPreparator.prepare_dataset(parent, [p.name for p in shards], split_parts_ratio=ratio, workers=2)
        dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
        (parent / ".nv-meta" / "dataset.yaml").write_text(json.dumps(dataset))
        blend.append({"weight": weight, "path": str(parent.resolve())})
    metadataset = {
        "__module__": "megatron.energon",
        "__class__": "MetadatasetV2",
        "splits": {"train": {"blend": blend}},
    }
    (folder / "blend.yaml").write_text(json.dumps(metadataset))


@energon.edataclass
class Row(energon.Sample):
    row: Any


@energon.stateless
def cook_tokens(sample: dict[str, Any]) -> Row:
    return Row(**energon.basic_sample_keys(sample), row=sample["input_ids.npy"])


@energon.stateless
def cook_text(sample: dict[str, Any]) -> Row:
    return Row(**energon.basic_sample_keys(sample), row=sample["txt"])


class TokenTask(energon.DefaultTaskEncoder):
    cookers = (energon.Cooker(cook_tokens),)

    @energon.stateless
    def batch(self, samples: list[Row]) -> Any:
        return stacked([sample.row for sample in samples])


class TextTask(energon.DefaultTaskEncoder):
    cookers = (energon.Cooker(cook_text),)

    @energon.stateless
    def batch(self, samples: list[Row]) -> Any:
        return [sample.row for sample in samples]


def loader(task: Task, batch_size: int | None) -> Any:
    dataset = energon.get_train_dataset(
        task.folder / "blend.yaml",
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=task.workers, seed_offset=task.seed),
        batch_size=batch_size,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=TokenTask() if task.packed else TextTask(),
    )
    return energon.get_loader(dataset)


def items(task: Task) -> Iterator[Any]:
    return iter(loader(task, None))


def value(item: Any) -> Any:
    return item.row


def batches(task: Task) -> Iterator[Any]:
    return iter(loader(task, task.batch_size))


def values(batch: Any) -> Any:
    return batch
