"""Rows that are read when they are asked for, where data workers read them."""

from __future__ import annotations

import pytest
from samplers import assert_lazy_rows_make_the_batches_of_eager_ones, builder
from torch.utils.data import default_collate

from dmagent_loader.testing import write_toy_shards
from dmagent_loader.transforms import collate_packed


@pytest.mark.parametrize("collate", [collate_packed, default_collate])
def test_batches_are_the_same_with_workers(tmp_path, collate):
    shards = write_toy_shards(tmp_path / "shards", {"source/a": 40, "target/x": 40}, tokens=16)
    build = builder(shards, tmp_path / "cache", samples_per_reweight=8)
    assert_lazy_rows_make_the_batches_of_eager_ones(build, collate, workers=2)
