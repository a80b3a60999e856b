"""The compiled loops give what the Python code beside their callers gives: samples do not depend on the machine."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmagent_loader import AgentWeightedSampler, MixingDataLoader, ReadingConfig, __version__, _compiled
from dmagent_loader.cli import main
from dmagent_loader.mixture import domain_order, mix_tree, row_order
from dmagent_loader.mixture.domain_order import DomainOrder, in_quanta
from dmagent_loader.mixture.mix_tree import RESOLUTION
from dmagent_loader.mixture.row_order import RowOrders
from dmagent_loader.mixture.shuffle import Shuffle
from dmagent_loader.shards import array_rows
from dmagent_loader.shards.sources.block_sources import BlockInMemory
from dmagent_loader.shards.sources.local import LocalSource
from dmagent_loader.testing import write_toy_shards
from dmagent_loader.transforms import collate_packed

T = TypeVar("T")
HAS_COMPILER = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) is not None


USERS = (mix_tree, domain_order, row_order, array_rows)


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled loops, whatever the environment says."""
    monkeypatch.delenv(_compiled.PURE_PYTHON_VARIABLE, raising=False)
    order, rows, reading = map(loops, ("mixture._order", "mixture._rows", "shards._reading"))
    for module in USERS:
        monkeypatch.setattr(module, "COMPILED", {row_order: rows, array_rows: reading}.get(module, order))


def loops(name: str) -> ModuleType:
    found = _compiled.compiled_loops(f"dmagent_loader.{name}")
    if found is None and not HAS_COMPILER:
        pytest.skip("there is no C compiler")
    assert found is not None, f"{name} was not built, or from other code: pip install -e . builds it"
    return found


def in_python(action: Callable[[], T]) -> T:
    """The result of an action without the compiled loops."""
    with contextlib.ExitStack() as stack:
        for module in USERS:
            stack.enter_context(mock.patch.object(module, "COMPILED", None))
        return action()


@st.composite
def mixes(draw: st.DrawFn) -> np.ndarray:
    """Mixes over 1 to 600 domains: random, equal or small fractions, some without weight, some a millionth."""
    size = draw(st.sampled_from([1, 2, 3, 8, 52, 600]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["random", "sparse", "equal", "fractions"]))
    weights = {
        "random": generator.dirichlet(np.ones(size)),
        "sparse": generator.random(size) ** 40 + 1e-6 * (generator.random(size) < 0.5),
        "equal": np.ones(size),
        "fractions": generator.integers(0, 4, size) + np.eye(size)[0],
    }[kind]
    mix: np.ndarray = weights / weights.sum()
    return mix


@given(st.lists(mixes(), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_trees_are_the_same(several):
    """Down to the bit: thresholds come from floating-point numbers."""
    quanta = [in_quanta(mix) for mix in several]
    for tree, other in zip(mix_tree.grow(quanta), in_python(lambda: mix_tree.grow(quanta)), strict=True):
        assert tree.table is not None
        assert other.table is None
        assert list(tree.levels) == list(other.levels)
        for name in set(vars(tree)) - {"levels", "table"}:
            assert np.array_equal(getattr(tree, name), getattr(other, name)), name


@given(
    mixes(),
    st.integers(0, 2**64 - 1),
    st.sampled_from([0, 1, 4000]),
    st.sampled_from([0, 1, 10**6, 2**32 - 2000]),
    st.lists(st.integers(1, 900), min_size=1, max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_orders_of_domains_are_the_same(mix, key, debt, first, lengths):
    """With debts, too, and for ranges that follow each other, which begin where the last one ended."""
    owed = np.random.default_rng(key % 2**32).integers(-debt * RESOLUTION, debt * RESOLUTION + 1, len(mix))
    quanta = in_quanta(mix)
    order = DomainOrder(quanta, key, owed - int(owed.mean()))
    other = in_python(lambda: DomainOrder(quanta, key, owed - int(owed.mean())))
    for length in lengths:
        samples = np.arange(first, first + length)
        for found, expected in zip(order.locate(samples), other.locate(samples), strict=True):
            assert found.tolist() == expected.tolist()
        for found, expected in zip(
            order.counts_and_owed(first + length // 2), other.counts_and_owed(first + length // 2), strict=True
        ):
            assert found.tolist() == expected.tolist()
        first += length


@pytest.mark.parametrize("is_first", [True, False])
def test_an_order_goes_on_in_a_process_without_the_compiled_loops(is_first):
    """Such as a spawned data worker for which `DMAGENT_PURE_PYTHON` was set after the import, or another machine."""
    quanta = in_quanta(np.array([0.5, 0.3, 0.2]))
    order = DomainOrder(quanta, 7)
    if not is_first:
        order.locate(np.arange(50))
    sent = pickle.dumps(order)
    tree = order._tree
    expected = [its.tolist() for its in order.locate(np.arange(50, 90))]
    assert [its.tolist() for its in in_python(lambda: pickle.loads(sent).locate(np.arange(50, 90)))] == expected
    again = in_python(lambda: DomainOrder(quanta, 7, tree=tree).locate(np.arange(50, 90)))
    assert [its.tolist() for its in again] == expected


@given(
    st.lists(st.lists(st.integers(0, 900), min_size=1, max_size=12).filter(any), min_size=1, max_size=8),
    st.sampled_from([1, 7, 17, 64, 1000, 65_536]),
    st.sampled_from([1, 2, 11, 64]),
    st.sampled_from([100, 10**5, 10**12]),
    st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_orders_of_rows_are_the_same(shard_rows, window, shards, beyond, seed):
    """Shards without rows, tiles of any size, the rows that remain beside whole lanes, and far passes among them."""
    rows = [np.array(its) for its in shard_rows]
    names = [f"source/{number}" for number in range(len(rows))]
    orders = RowOrders(seed, names, rows, Shuffle(window=window, shards=shards))
    generator = np.random.default_rng(seed)
    domain, draw = generator.integers(0, len(rows), 400), generator.integers(0, beyond, 400)
    expected = in_python(lambda: orders.locate(domain, draw))
    for found, its in zip(orders.locate(domain, draw), expected, strict=True):
        assert found.tolist() == its.tolist()


@pytest.mark.parametrize("lanes", [2**31, 2**33])
def test_numbers_that_wrap_around_do_so_alike(lanes):
    orders = RowOrders(3, ["source/a"], [np.array([2**34, 5])], Shuffle(window=lanes, shards=lanes))
    draw = np.random.default_rng(0).integers(0, 2**62, 300)
    expected = in_python(lambda: orders.locate(np.zeros_like(draw), draw))
    for found, its in zip(orders.locate(np.zeros_like(draw), draw), expected, strict=True):
        assert found.tolist() == its.tolist()


def test_columns_that_are_no_arrays_of_a_row_each_are_taken_as_they_are():
    """Slices of a table with a column for each name, as `RowsAhead` has them, are not contiguous."""
    orders = RowOrders(1, ["source/a", "source/b"], [np.array([40, 2]), np.array([17])])
    table = np.array([[0, 5], [1, 16], [0, 41], [1, 90]])
    expected = in_python(lambda: orders.locate(table[:, 0], table[:, 1]))
    assert [column.tolist() for column in orders.locate(table[:, 0], table[:, 1])] == [its.tolist() for its in expected]


def test_arrays_that_do_not_fit_are_refused():
    """Nothing is read or written beyond the end of an array."""
    order = loops("mixture._order")
    quanta = in_quanta(np.array([0.5, 0.0, 0.5]))
    leaves, table = np.empty(2, np.int64), np.empty((10, 1), np.int64)
    order.grow(quanta, leaves, table)
    keys, shift, before = np.empty(1, np.uint64), np.empty(1, np.int64), np.zeros(3, np.int64)
    order.prepare(7, np.zeros(3, np.int64), leaves, table, keys, shift)
    tree, ends, samples = (table, leaves, keys, shift), (before, before.copy()), np.empty((2, 5), np.int64)
    order.follow(*tree, *ends, *samples)
    refused = [
        lambda: order.grow(quanta, leaves[:1], table),
        lambda: order.grow(quanta, np.empty(3, np.int64), np.empty((10, 2), np.int64)),
        lambda: order.grow(quanta, leaves, table[:9]),
        lambda: order.grow(-quanta, leaves, table),
        lambda: order.grow(quanta << 33, leaves, table),  # whose sum is too large for int64
        lambda: order.grow(quanta.astype(np.float64), leaves, table),
        lambda: order.prepare(7, np.zeros(2, np.int64), leaves, table, keys, shift),
        lambda: order.prepare(7, np.zeros(3, np.int64), leaves, table, keys[:0], shift),
        lambda: order.follow(*tree, before[:2], before.copy(), *samples),
        lambda: order.follow(*tree, *ends, samples[0], samples[1][:4]),
    ]
    for wrong in refused:
        with pytest.raises(ValueError, match="do not fit"):
            wrong()
    rows = RowOrders(1, ["source/a"], [np.array([40, 2])])
    for domain, draw in (([1], [0]), ([-1], [0]), ([0], [-1]), ([0], [0, 1])):
        with pytest.raises(ValueError, match="do not fit"):
            rows.locate(np.array(domain), np.array(draw))
    with pytest.raises(TypeError, match="3 arguments were expected, and 1 given"):
        order.grow(quanta)
    with pytest.raises((BufferError, TypeError)):
        order.grow(quanta, leaves, bytes(80))
    for kind in (np.int32, np.bool_):
        with pytest.raises(TypeError, match="no numbers of 8 bytes"):
            order.grow(quanta.astype(kind), leaves, table)
    with pytest.raises(ValueError, match="contiguous"):
        order.grow(np.column_stack([quanta, quanta])[:, 0], leaves, table)


@given(
    st.lists(st.lists(st.integers(0, 30), max_size=9), min_size=1, max_size=6),
    st.lists(st.sampled_from([np.int64, np.uint8, np.uint16, np.int32, np.uint32, np.int16]), min_size=1, max_size=4),
    st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_rows_are_looked_up_alike(rows, types, seed):
    """In columns of any type, side by side as in a `RowTable`; the rows of a shard without a table are left alone."""
    generator = np.random.default_rng(seed)
    tables: list[tuple[np.ndarray, ...] | None] = []
    for _ in rows:
        fields = [(str(number), kind) for number, kind in enumerate(types)]
        records = np.empty(31, np.dtype(fields, align=True))
        for name in records.dtype.names or ():
            limits = np.iinfo(records[name].dtype)
            records[name] = generator.integers(limits.min, limits.max, 31, records[name].dtype, endpoint=True)
        tables.append(tuple(records[str(number)] for number in range(len(types))) if generator.random() < 0.8 else None)
    ends, chosen = np.cumsum([len(its) for its in rows]), np.array([one for its in rows for one in its], np.int64)
    found, expected = (np.full((len(types), len(chosen)), -1) for _ in range(2))
    array_rows._gather(tables, ends, chosen, found)
    in_python(lambda: array_rows._gather(tables, ends, chosen, expected))
    assert found.tolist() == expected.tolist()


def test_tables_that_do_not_fit_are_refused():
    reading, column = loops("shards._reading"), np.arange(5)
    found = np.empty((1, 2), np.int64)
    for tables, ends, rows in (
        ([(column,)], [2], [0, 5]),
        ([(column,)], [2], [0, -1]),
        ([(column,)], [3], [0, 1]),
        ([(column,)] * 2, [2, 1], [0, 1]),
        ([(column, column)], [2], [0, 1]),
        ([(column.astype(np.float64),)], [2], [0, 1]),
        ([(column.astype(column.dtype.newbyteorder()),)], [2], [0, 1]),
        ([(column.reshape(5, 1),)], [2], [0, 1]),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            reading.gather(tables, np.array(ends), np.array(rows), found)


def test_rows_that_cannot_be_read_whole_are_no_batch(tmp_path):
    reading, path = loops("shards._reading"), tmp_path / "file"
    path.write_bytes(bytes(range(20)))
    heads, bodies = bytearray(4), bytearray(8)
    with path.open("rb") as file:
        number = file.fileno()
        assert reading.read_rows([number] * 2, [14, 3], heads, bodies)
        assert (bytes(heads), bytes(bodies)) == (bytes([14, 15, 3, 4]), bytes([16, 17, 18, 19, 5, 6, 7, 8]))
        assert not reading.read_rows([number] * 2, [0, 15], heads, bodies), "the second ends early"
        assert not reading.read_rows([number] * 2, [15, 0], heads, bodies), "the first ends early"
        for descriptors, offsets in (([number], [0, 1]), ([], []), ([number] * 3, [0, 1, 2])):
            with pytest.raises(ValueError, match="do not fit"):
                reading.read_rows(descriptors, offsets, heads, bodies)
        with pytest.raises(TypeError):
            reading.read_rows([number, "file"], [0, 1], heads, bodies)
        with pytest.raises(OverflowError):
            reading.read_rows([number] * 2, [0, 2**70], heads, bodies)
    assert not reading.read_rows([number] * 2, [0, 1], heads, bodies), "a closed file"


def test_few_files_are_open_for_a_batch(tmp_path):
    """Blocks of remote shards are opened one after the other: a batch may lie in more of them than may be open."""
    path, count = tmp_path / "file", 200
    path.write_bytes(bytes(range(256)) * 2)
    form = array_rows._Format(b"head", np.dtype(np.uint8), 6)
    most, process = 0, psutil.Process()
    before = process.num_fds()

    def sources() -> Iterator[LocalSource]:
        nonlocal most
        for _ in range(count):
            source = LocalSource(str(path))
            most = max(most, source.descriptor)
            yield source

    for read in (lambda read: read(), in_python):
        buffer, offsets = array_rows._Buffer(count, form), list(range(count))
        assert read(lambda buffer=buffer, offsets=offsets: array_rows._read_rows(sources(), offsets, buffer, 10))
        assert most < before + 80
        content = path.read_bytes()
        assert bytes(buffer.headers) == b"".join(content[place : place + 4] for place in offsets)
        assert bytes(buffer.memory) == b"".join(content[place + 4 : place + 10] for place in offsets)
        offsets[150] = 505
        assert not read(lambda buffer=buffer, offsets=offsets: array_rows._read_rows(sources(), offsets, buffer, 10))


@pytest.mark.parametrize("absent", [None, 3, 70])
def test_files_blocks_in_memory_and_blocks_that_cannot_be_had_are_read_alike(tmp_path, absent):
    path, count = tmp_path / "file", 130
    path.write_bytes(bytes(range(256)))
    form = array_rows._Format(b"head", np.dtype(np.uint8), 6)
    sources: list[Any] = [LocalSource(str(path)) for _ in range(count)]
    sources[64:80] = [BlockInMemory(0, bytearray(path.read_bytes()))] * 16
    if absent is not None:
        sources[absent] = None
    found = []
    for read in (lambda read: read(), in_python):
        buffer = array_rows._Buffer(count, form)
        is_whole = read(lambda buffer=buffer: array_rows._read_rows(sources, list(range(count)), buffer, 10))
        assert is_whole is (absent is None)
        found.append((bytes(buffer.headers), bytes(buffer.memory)) if is_whole else None)
    assert found[0] == found[1]


def test_a_run_has_the_same_batches(tmp_path):
    """With new mixes, and a damaged row whose batch is read row by row."""
    shards = write_toy_shards(tmp_path, {"source/a": 90, "source/b": 30, "target/x": 60}, tokens=16)

    def run() -> list[Any]:
        reading = ReadingConfig(cache_dir=tmp_path / "cache", progress=False)
        sampler = AgentWeightedSampler(shards, samples_per_reweight=8, reading=reading, on_bad_row="skip")
        batches, generator = [], np.random.default_rng(0)
        for batch in itertools.islice(MixingDataLoader(sampler, 8, collate_fn=collate_packed), 40):
            batches.append(
                {name: value if isinstance(value, list) else value.tolist() for name, value in batch.items()}
            )
            sampler.set_mix(dict(zip(shards, generator.dirichlet(np.ones(3)), strict=True)), renormalize=True)
        return batches

    expected = in_python(run)
    assert run() == expected
    damaged = Path(shards["source/a"][0])
    data = bytearray(damaged.read_bytes())
    place = data.index(b"NUMPY") + 130
    data[place] ^= 1
    damaged.write_bytes(data)
    expected = in_python(run)
    assert run() == expected


def version_lines() -> list[str]:
    return subprocess.check_output([sys.executable, "-m", "dmagent_loader", "--version"], text=True).splitlines()


def test_they_are_left_out_if_the_environment_says_so_and_the_version_says_that(monkeypatch):
    name = "dmagent_loader.mixture._order"
    assert _compiled.why_in_python() is None
    assert version_lines() == [f"dmagent-loader {__version__}"]
    monkeypatch.setenv(_compiled.PURE_PYTHON_VARIABLE, "1")
    assert _compiled.compiled_loops(name) is None
    assert "by loops in Python, not in C: DMAGENT_PURE_PYTHON is set" in version_lines()[1]
    monkeypatch.setenv(_compiled.PURE_PYTHON_VARIABLE, "0")
    assert _compiled.compiled_loops(name) is not None


@pytest.mark.parametrize("name", _compiled.INTERFACES)
def test_they_are_left_out_if_they_are_of_other_code_or_were_not_built(monkeypatch, capsys, name):
    monkeypatch.setitem(_compiled.INTERFACES, name, _compiled.INTERFACES[name] + 1)
    assert _compiled.compiled_loops(name) is None
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert "install a C compiler and the headers of Python, and then the package again" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, name, None)  # as if there were no such file
    assert _compiled.compiled_loops(name) is None
    assert "install a C compiler" in (_compiled.why_in_python() or "")
