"""Rows that are read when they are asked for: the same samples, the same errors, the same batches."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from samplers import assert_lazy_rows_make_the_batches_of_eager_ones, builder
from torch.utils.data import default_collate

from dmagent_loader import AgentWeightedSampler, MixingDataLoader, ReadingConfig
from dmagent_loader._loading.lazy import LazyRow, read_together
from dmagent_loader.errors import DamagedShardError, DecodeError
from dmagent_loader.shards.array_rows import Buffers, RowSpans
from dmagent_loader.shards.sources.local import LocalSource
from dmagent_loader.testing import write_toy_shards
from dmagent_loader.transforms import PACKED_MEMBER, collate_packed, packed_tokens


def build(shards, folder: Path, **options) -> AgentWeightedSampler:
    return builder(shards, folder / "cache", samples_per_reweight=8)(**options)


@pytest.fixture
def shards(tmp_path: Path) -> dict[str, list[str]]:
    return write_toy_shards(tmp_path, {"source/a": 40, "target/x": 40}, tokens=16)


def write_rows(folder: Path, rows: list[dict]) -> dict[str, list[str]]:
    path = folder / "own.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number, row in enumerate(rows):
            writer.write({"__key__": f"k{number}", **row})
    return {"source/own": [str(path)]}


def take(sampler: AgentWeightedSampler, count: int) -> list:
    return [sample for sample, _ in zip(sampler, range(count), strict=False)]


def test_a_lazy_row_is_the_sample_that_an_eager_one_is(shards, tmp_path):
    for lazy, eager in zip(
        take(build(shards, tmp_path, decode="lazy"), 60), take(build(shards, tmp_path), 60), strict=True
    ):
        assert isinstance(lazy, LazyRow)
        assert isinstance(eager, dict)
        assert list(lazy) == list(eager)
        assert len(lazy) == len(eager)
        again = pickle.loads(pickle.dumps(lazy))
        for sample in (lazy, again):
            assert [sample[name] for name in ("__index__", "__key__", "__domain__")] == list(eager.values())[:3]
            assert np.array_equal(sample[PACKED_MEMBER], eager[PACKED_MEMBER])
        assert type(again) is dict


@pytest.mark.parametrize("collate", [collate_packed, default_collate])
def test_batches_are_the_same_across_changes_of_the_mix(shards, tmp_path, collate):
    build = builder(shards, tmp_path / "cache", samples_per_reweight=8)
    assert_lazy_rows_make_the_batches_of_eager_ones(build, collate, workers=0)


def test_a_batch_is_read_into_one_array_only_if_it_can_be(shards, tmp_path):
    rows = take(build(shards, tmp_path, decode="lazy"), 8)
    columns = read_together(rows, PACKED_MEMBER)
    assert columns.values.shape == (8, 16)
    assert columns.index.tolist() == list(range(8))
    assert read_together(rows, "txt") is None
    assert read_together([dict(row) for row in rows], PACKED_MEMBER) is None
    assert read_together([*take(build(shards, tmp_path, decode="lazy"), 1), rows[0]], PACKED_MEMBER) is None
    assert read_together([], PACKED_MEMBER) is None


def test_documents_are_kept_apart_without_reading_the_rows_once_more(shards, tmp_path):
    eager = take(build(shards, tmp_path), 8)
    end_token = int(eager[0][PACKED_MEMBER][7])
    rows = take(build(shards, tmp_path, decode="lazy"), 8)
    batch, expected = (collate_packed(samples, end_token=end_token) for samples in (rows, eager))
    assert torch.equal(batch["position_ids"], expected["position_ids"])
    assert torch.equal(batch["labels"], expected["labels"])
    assert batch["position_ids"][0, 8] == 0
    assert read_together(rows, PACKED_MEMBER) is not None, "a row was read by itself"


@pytest.mark.parametrize(
    "rows",
    [
        [{"input_ids.npy": np.arange(8, dtype=kind)} for kind in (np.uint16, np.int16, np.uint16, np.int16)],
        [{"input_ids.npy": np.arange(8, dtype=np.uint16), "cls": 1} for _ in range(4)],
    ],
    ids=["headers", "members"],
)
def test_rows_that_cannot_be_read_together_are_read_one_by_one(tmp_path, rows):
    sampler = build(write_rows(tmp_path, rows), tmp_path, decode="lazy")
    batch = collate_packed(take(sampler, 4))
    for key, tokens in zip(batch["__key__"], batch["input_ids"], strict=True):
        assert tokens.tolist() == rows[int(key[1:])]["input_ids.npy"].tolist()


@pytest.mark.parametrize("letter", ["e", "é", "文"])
def test_keys_of_any_letters_are_those_of_the_rows(tmp_path, letter):
    keys = [letter * number for number in range(1, 9)]
    shards = write_rows(tmp_path, [{"__key__": key, "input_ids.npy": np.arange(8, dtype=np.uint16)} for key in keys])
    batches = iter(MixingDataLoader(build(shards, tmp_path), batch_size=8, collate_fn=collate_packed))
    assert sorted(next(batches)["__key__"]) == keys
    rows = take(build(shards, tmp_path, decode="lazy"), 8)
    assert sorted(collate_packed(rows)["__key__"]) == keys
    assert sorted(row["__key__"] for row in rows) == keys


def test_rows_of_different_lengths_and_of_other_members_are_refused_by_name(tmp_path):
    lengths = write_rows(tmp_path, [{"input_ids.npy": np.zeros(n, np.uint16)} for n in (3, 4, 5, 6)])
    with pytest.raises(DecodeError, match="rows of a batch have different lengths"):
        collate_packed(take(build(lengths, tmp_path, decode="lazy"), 4))
    text = write_toy_shards(tmp_path / "text", {"source/t": 8})
    with pytest.raises(DecodeError, match=r"has no member .input_ids\.npy."):
        collate_packed(take(build(text, tmp_path, decode="lazy"), 4))


def test_a_row_that_is_no_array_is_named(tmp_path):
    broken = write_rows(tmp_path, [{"input_ids.npy": b"no array at all"} for _ in range(4)])
    with pytest.raises(DecodeError, match=r"domain 'source/own', row \d of shard .*own\.tar.*not a npy file"):
        collate_packed(take(build(broken, tmp_path, decode="lazy"), 4))


def test_the_batches_of_a_loader_share_memory_and_the_format_of_rows(shards, tmp_path, monkeypatch):
    """Found out anew for each batch, they take three quarters more time than the rows."""
    rows = take(build(shards, tmp_path, decode="lazy"), 16)
    first = collate_packed(rows[:8], narrow=True)["input_ids"]
    address, expected = first.data_ptr(), first.tolist()
    monkeypatch.setattr(LocalSource, "read", None)  # reads the row that shows the format
    second = collate_packed(rows[8:], narrow=True)["input_ids"]
    assert second.data_ptr() != address, "the first batch is in use"
    assert first.tolist() == expected


def test_whoever_held_many_batches_gives_most_of_their_memory_back(tmp_path):
    rows = write_rows(tmp_path, [{"input_ids.npy": np.zeros(8192, np.uint16)} for _ in range(4)])
    collection = build(rows, tmp_path).collection
    arrays = collection.array_rows(PACKED_MEMBER)
    spans = RowSpans.of(arrays.find(np.zeros(4, np.int64), np.zeros(4, np.int64), np.arange(4)))
    size = arrays.read(spans, Buffers()).nbytes
    buffers = Buffers()
    tracemalloc.start()
    held = [arrays.read(spans, buffers) for _ in range(64)]
    assert tracemalloc.get_traced_memory()[0] >= 64 * size
    held.clear()
    left, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert left < 16 * size


def test_no_memory_is_taken_for_a_batch_whose_rows_differ(tmp_path):
    large = 4 << 20
    rows = write_rows(tmp_path, [{"input_ids.npy": bytes(large)}, *({"input_ids.npy": b"small"} for _ in range(31))])
    collection = build(rows, tmp_path).collection
    collection.read(0, 0, 1)  # its index is in memory from here on
    tracemalloc.start()
    arrays = collection.array_rows(PACKED_MEMBER)
    spans = RowSpans.of(arrays.find(np.zeros(32, np.int64), np.zeros(32, np.int64), np.arange(32)))
    assert arrays.read(spans, Buffers()) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < large


def test_matrices_are_no_packed_rows(tmp_path):
    rows = write_rows(tmp_path, [{"input_ids.npy": np.arange(6).reshape(2, 3)} for _ in range(4)])
    assert collate_packed(take(build(rows, tmp_path, decode="lazy"), 2))["input_ids"].shape == (2, 2, 3)


@pytest.mark.parametrize("damage", ["changed", "cut"])
def test_a_shard_that_changes_while_training_is_named(shards, tmp_path, damage):
    rows = take(build(shards, tmp_path, decode="lazy"), 16)
    for path in (path for paths in shards.values() for path in paths):
        with Path(path).open("r+b") as file:
            if damage == "cut":
                file.truncate(512)
            else:
                data = bytearray(file.read())
                for start in range(512, len(data) - 10_240, 1024):
                    data[start + 130] ^= 1
                file.seek(0)
                file.write(data)
    with pytest.raises(DamagedShardError, match=r"toy-00000\d\.tar"):
        collate_packed(rows)


@pytest.mark.parametrize("threads", [0, 2])
def test_the_error_of_a_lazy_row_comes_on_access_whether_or_not_it_was_read_ahead(shards, tmp_path, threads):
    sampler = build(shards, tmp_path, decode="lazy", reading=ReadingConfig(num_threads=threads))
    for domain, paths in enumerate(shards.values()):
        for shard in range(len(paths)):
            sampler.collection.read(domain, shard, 0)  # so that the index is in memory
    for path in (path for paths in shards.values() for path in paths):
        Path(path).write_bytes(Path(path).read_bytes()[:512])
    rows = take(sampler, 12)
    for row in rows:
        with pytest.raises(DamagedShardError, match=r"toy-00000\d\.tar"):
            dict(row)
    assert len(rows) == 12


def test_a_transform_and_remote_shards_get_their_rows_at_once(shards, tmp_path):
    transformed = take(build(shards, tmp_path, decode="lazy", transform=packed_tokens), 4)
    assert all(type(row) is dict for row in transformed)
    ahead = build(shards, tmp_path, decode="lazy", reading=ReadingConfig(num_threads=2))
    plain = collate_packed(take(build(shards, tmp_path), 12))
    assert torch.equal(collate_packed(take(ahead, 12))["input_ids"], plain["input_ids"])
