"""Whatever is written to a tar comes back by position, in any order."""

from __future__ import annotations

import io
import random
import re
import tarfile
import tempfile
from pathlib import Path

import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.index.shard_index import build_index
from dmagent_loader.shards.sources.local import open_source
from dmagent_loader.shards.tar.header import split_name

FORMATS = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
PART = st.text(st.characters(exclude_characters="./\0", exclude_categories=["Cs"]), min_size=1, max_size=70)
KEY = st.lists(PART, min_size=1, max_size=3).map("/".join).filter(lambda key: not key.startswith("__"))
EXTENSION = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: not (name.startswith("__") and name.endswith("__"))  # refused: kept for __index__ and the like
)
PAYLOAD = st.binary(max_size=2000)
ROWS = st.lists(
    st.tuples(KEY, st.lists(st.tuples(EXTENSION, PAYLOAD), min_size=1, max_size=3, unique_by=lambda m: m[0].lower())),
    min_size=1,
    max_size=8,
    unique_by=lambda row: row[0],
)
Row = tuple[str, list[tuple[str, bytes]]]


def write(path: Path, rows: list[Row], format: int) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for key, members in rows:
            for extension, data in members:
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=ROWS, format=st.sampled_from(FORMATS), seed=st.integers(0, 1000))
def test_rows_come_back_by_position_in_any_order_and_as_webdataset_groups_them(
    rows: list[Row], format: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        write(path, rows, format)
        collection = ShardCollection.open({"source/a": path}, cache_dir=folder, progress=False)
        dataset = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
        expected = [
            (sample["__key__"], {k: v for k, v in sample.items() if k not in ("__key__", "__url__", "__local_path__")})
            for sample in dataset
        ]
        assert collection.num_rows.tolist() == [len(expected)]
        order = list(range(len(expected)))
        random.Random(seed).shuffle(order)
        for row in order:
            sample = collection.read(0, 0, row)
            assert (sample.key, {name: bytes(data) for name, data in sample.members.items()}) == expected[row]


@settings(max_examples=300, deadline=None)
@given(name=st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.text("ab./_\n", max_size=12))
def test_names_are_split_as_webdataset_splits_them(name: str) -> None:
    """Except hidden files, which webdataset takes for members of a row that is named after their folder."""
    key, extension = base_plus_ext(name)
    is_hidden = name.rpartition("/")[2].startswith(".")
    skipped = key is None or is_hidden or re.match(r"__[^/]*__($|/)", name)
    expected = None if skipped else (key.encode(), extension.lower().encode())
    assert split_name(name.encode()) == expected


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sizes=st.lists(st.integers(0, 1500), min_size=2, max_size=12), where=st.floats(0, 1), data=st.data())
def test_no_cut_goes_unnoticed_and_every_row_that_is_kept_is_true(
    sizes: list[int], where: float, data: st.DataObject
) -> None:
    """Cut the file anywhere before its end marker: damage is reported, and the rows before the cut are all there."""
    rows: list[Row] = [(f"{i:03d}", [("bin", bytes([i]) * size)]) for i, size in enumerate(sizes)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        write(path, rows, data.draw(st.sampled_from(FORMATS)))
        ends = [512 * (i + 1) + sum(-(-size // 512) * 512 for size in sizes[: i + 1]) for i in range(len(sizes))]
        cut = min(int(where * ends[-1]), ends[-1])
        path.write_bytes(path.read_bytes()[:cut])
        index = build_index(str(path), open_source(str(path)), cut)
        assert len(index.damage) == 1
        payload_ends = [end - (-size % 512) for end, size in zip(ends, sizes, strict=True)]
        assert index.num_rows == sum(end <= cut for end in payload_ends)
        assert index.size.tolist() == sizes[: index.num_rows]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(junk=st.binary(min_size=512, max_size=512), victim=st.integers(0, 9))
def test_an_overwritten_header_costs_its_row_and_no_other(junk: bytes, victim: int) -> None:
    rows: list[Row] = [(f"{i:03d}", [("bin", bytes([i]) * 700)]) for i in range(10)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        write(path, rows, tarfile.USTAR_FORMAT)
        content = bytearray(path.read_bytes())
        content[victim * 1536 : victim * 1536 + 512] = junk
        path.write_bytes(content)
        index = build_index(str(path), open_source(str(path)), len(content))
        assert [index.key(row) for row in range(index.num_rows)] == [f"{i:03d}" for i in range(10) if i != victim]
        assert [(damage.offset, damage.rows_lost) for damage in index.damage] == [(victim * 1536, 1)]
