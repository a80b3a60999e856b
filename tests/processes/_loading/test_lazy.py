"""Rows that are read when they are asked for, where data workers read them."""

from __future__ import annotations

from pathlib import Path

import pytest
from samplers import assert_lazy_rows_make_the_batches_of_eager_ones, builder
from torch.utils.data import default_collate

from dmagent_loader import MixingDataLoader
from dmagent_loader.errors import DamagedShardError
from dmagent_loader.testing import write_toy_shards
from dmagent_loader.transforms import collate_packed


@pytest.mark.parametrize("collate", [collate_packed, default_collate])
def test_batches_are_the_same_with_workers(tmp_path, collate):
    shards = write_toy_shards(tmp_path / "shards", {"source/a": 40, "target/x": 40}, tokens=16)
    build = builder(shards, tmp_path / "cache", samples_per_reweight=8)
    assert_lazy_rows_make_the_batches_of_eager_ones(build, collate, workers=2)


def as_they_are(rows):
    return rows


def test_an_error_of_a_row_that_is_read_on_its_way_to_the_trainer_arrives(tmp_path):
    """torch's queue would read it in a thread that only prints the error: the trainer would wait for ever."""
    shards = write_toy_shards(tmp_path / "shards", {"source/a": 12, "target/x": 12}, tokens=16)
    sampler = builder(shards, tmp_path / "cache", samples_per_reweight=8)(decode="lazy")
    for path in map(Path, shards["target/x"]):
        path.write_bytes(bytes(path.stat().st_size))
    loader = MixingDataLoader(sampler, batch_size=6, num_workers=1, collate_fn=as_they_are, timeout=60)
    with pytest.raises(DamagedShardError):
        list(loader)
