"""The compiled loops give what the Python code beside their callers gives: samples do not depend on the machine."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable
from typing import TypeVar
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmagent_loader.mixture import compiled, domain_order, mix_tree, row_order
from dmagent_loader.mixture.domain_order import DomainOrder, in_quanta
from dmagent_loader.mixture.mix_tree import RESOLUTION
from dmagent_loader.mixture.row_order import RowOrders
from dmagent_loader.mixture.shuffle import Shuffle

T = TypeVar("T")
HAS_COMPILER = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) is not None


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled loops, whatever the environment says."""
    monkeypatch.delenv(compiled.PURE_PYTHON_VARIABLE, raising=False)
    loops = compiled.compiled_loops()
    if loops is None and not HAS_COMPILER:
        pytest.skip("there is no C compiler")
    assert loops is not None, "_compiled was not built, or from other code: pip install -e . builds it"
    for module in (mix_tree, domain_order, row_order):
        monkeypatch.setattr(module, "COMPILED", loops)


def in_python(action: Callable[[], T]) -> T:
    """The result of an action without the compiled loops."""
    with mock.patch.object(mix_tree, "COMPILED", None), mock.patch.object(row_order, "COMPILED", None):
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


@given(
    st.lists(st.lists(st.integers(0, 900), min_size=1, max_size=12).filter(any), min_size=1, max_size=8),
    st.sampled_from([1, 7, 64, 1000, 65_536]),
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


def test_columns_that_are_no_arrays_of_a_row_each_are_taken_as_they_are():
    """Slices of a table with a column for each name, as `RowsAhead` has them, are not contiguous."""
    orders = RowOrders(1, ["source/a", "source/b"], [np.array([40, 2]), np.array([17])])
    table = np.array([[0, 5], [1, 16], [0, 41], [1, 90]])
    expected = in_python(lambda: orders.locate(table[:, 0], table[:, 1]))
    assert [column.tolist() for column in orders.locate(table[:, 0], table[:, 1])] == [its.tolist() for its in expected]


def test_arrays_that_do_not_fit_are_refused():
    """Nothing is read or written beyond the end of an array."""
    loops = compiled.compiled_loops()
    assert loops is not None
    quanta = in_quanta(np.array([0.5, 0.0, 0.5]))
    leaves, table = np.empty(2, np.int64), np.empty((10, 1), np.int64)
    loops.grow(quanta, leaves, table)
    keys, shift, before = np.empty(1, np.uint64), np.empty(1, np.int64), np.zeros(3, np.int64)
    loops.prepare(7, np.zeros(3, np.int64), leaves, table, keys, shift)
    tree, ends, samples = (table, leaves, keys, shift), (before, before.copy()), np.empty((2, 5), np.int64)
    loops.follow(*tree, *ends, *samples)
    refused = [
        lambda: loops.grow(quanta, leaves[:1], table),
        lambda: loops.grow(quanta, np.empty(3, np.int64), np.empty((10, 2), np.int64)),
        lambda: loops.grow(quanta, leaves, table[:9]),
        lambda: loops.grow(-quanta, leaves, table),
        lambda: loops.prepare(7, np.zeros(2, np.int64), leaves, table, keys, shift),
        lambda: loops.prepare(7, np.zeros(3, np.int64), leaves, table, keys[:0], shift),
        lambda: loops.follow(*tree, before[:2], before.copy(), *samples),
        lambda: loops.follow(*tree, *ends, samples[0], samples[1][:4]),
    ]
    for wrong in refused:
        with pytest.raises(ValueError, match="do not fit"):
            wrong()
    orders = RowOrders(1, ["source/a"], [np.array([40, 2])])
    for domain, draw in (([1], [0]), ([-1], [0]), ([0], [-1]), ([0], [0, 1])):
        with pytest.raises(ValueError, match="do not fit"):
            orders.locate(np.array(domain), np.array(draw))
    with pytest.raises(TypeError, match="3 arguments were expected, and 1 given"):
        loops.grow(quanta)
    with pytest.raises((BufferError, TypeError)):
        loops.grow(quanta, leaves, bytes(80))


def test_they_are_left_out_if_the_environment_says_so_or_they_are_of_other_code(monkeypatch):
    monkeypatch.setenv(compiled.PURE_PYTHON_VARIABLE, "1")
    assert compiled.compiled_loops() is None
    monkeypatch.setenv(compiled.PURE_PYTHON_VARIABLE, "0")
    loops = compiled.compiled_loops()
    assert loops is not None
    monkeypatch.setattr(loops, "INTERFACE", -1)
    assert compiled.compiled_loops() is None
