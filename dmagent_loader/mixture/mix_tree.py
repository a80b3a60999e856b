"""The binary tree of a mix, in which `domain_order` finds the domain of each sample.

The leaves are the domains with weight, in order of falling weight. Each node is an interval of them, split at the
boundary closest to half of its weight: even splits keep heavy leaves near the root, so most samples need few steps.

Thresholds of a node may range over [p / 2, q - p / 2]. That would add to the error of each leaf below it, beyond the
error of rounding to the nearest sample. So the strictest leaf limits the range, which stays centred.

Shapes: D domains, L leaves, N = L - 1 nodes, M mixes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from dmagent_loader.mixture.compiled import ORDER as COMPILED
from dmagent_loader.mixture.simplex import FloatArray, IntArray

RESOLUTION = 1 << 30
"""Weights are rounded to multiples of 1 / RESOLUTION: an error of half a sample after 10**9 samples of one mix."""

DISCREPANCY = 1.25
"""Largest deviation of a domain from its share, in samples, up to which the order is made irregular."""

_DOMAIN_BITS = 32
_COLUMNS = 10
"""Rows of `MixTree.table`."""

_FEW_LEAVES = 512
"""Leaves of all mixes up to which plain numbers are faster than numpy, because most levels have few nodes."""


@dataclass(frozen=True)
class MixTree:
    """The tree of one mix. Nodes are numbered level by level, from the root on.

    Attributes:
        quanta: (D,) int64, the mix in units of 1 / RESOLUTION.
        leaves: (L,) domain of each leaf.
        bounds: (3, N) first leaf of each node, first leaf of its right child, and leaf after its last.
        heavier, lighter: (N,) children of each node. A leaf is the bitwise complement of its number, so it is negative.
        is_left: (N,) whether the left child is the lighter one.
        total, minor: (N,) weight of each node, and of its lighter child.
        lowest, width: (N,) least threshold of each node, and length of their range.
        levels: First node of each level, and N.
        table: (10, N), `bounds` to `width` one after the other, if the tree was grown by the compiled loops.
    """

    quanta: IntArray
    leaves: IntArray
    bounds: IntArray
    heavier: IntArray
    lighter: IntArray
    is_left: np.ndarray
    total: IntArray
    minor: IntArray
    lowest: IntArray
    width: IntArray
    levels: Sequence[int]
    table: IntArray | None = None


@dataclass(frozen=True)
class _Splits:
    """The nodes of several trees, tree by tree, whose leaves are numbered one after the other.

    The leaves of each tree are followed by an unused number, so that the weight before each number, of all mixes, tells
    the weight of every interval.

    Attributes:
        bounds: (3, N) first leaf, split, and leaf after the last.
        children: (2, N) number of the left and the right child in its tree, or the complement of a leaf of the tree.
        freedom: (N,) share of the full range of thresholds of a node that keeps all leaves below it within DISCREPANCY;
            beyond 0 to 1, the nearer of the two.
        levels: For each tree, the first node of each level, and the number of nodes.
    """

    bounds: IntArray
    children: IntArray
    freedom: FloatArray
    levels: list[list[int]]


def grow(mixes: Sequence[IntArray]) -> list[MixTree]:
    """The trees of mixes.

    Args:
        mixes: M mixes in units of 1 / RESOLUTION, (D,) int64.
    """
    if COMPILED is not None:
        return [_grown_compiled(quanta) for quanta in mixes]
    leaves = [_leaves(quanta) for quanta in mixes]
    if len(mixes) == 1 and len(leaves[0]) < _FEW_LEAVES:
        before = np.zeros(len(leaves[0]) + 1, dtype=np.int64)
        mixes[0][leaves[0]].cumsum(out=before[1:])
        splits = _split_in_plain_numbers(before.tolist())
        columns = _columns(before, splits)
        return [MixTree(mixes[0], leaves[0], bounds=splits.bounds, levels=splits.levels[0], **columns)]
    ends = list(accumulate(len(its) + 1 for its in leaves))
    first = [end - len(its) - 1 for end, its in zip(ends, leaves, strict=True)]
    # The first mix takes the weights 0 to RESOLUTION, the next one those after them.
    before = np.ones(ends[-1], dtype=np.int64)
    before[0] = 0
    for begin, end, quanta, its in zip(first, ends, mixes, leaves, strict=True):
        before[begin + 1 : end] = quanta[its]
    before = before.cumsum()
    splits = _split_together(before, np.array(first), np.array(ends) - 1)
    columns = _columns(before, splits)
    trees, begin = [], 0
    for quanta, its, start, levels in zip(mixes, leaves, first, splits.levels, strict=True):
        own = slice(begin, begin + levels[-1])
        of_tree = {name: column[own] for name, column in columns.items()}
        trees.append(MixTree(quanta, its, bounds=splits.bounds[:, own] - start, levels=levels, **of_tree))
        begin += levels[-1]
    return trees


def _grown_compiled(quanta: IntArray) -> MixTree:
    assert COMPILED is not None
    quanta = np.ascontiguousarray(quanta)
    leaves = np.empty(np.count_nonzero(quanta), dtype=np.int64)
    table = np.empty((_COLUMNS, len(leaves) - 1), dtype=np.int64)
    levels = COMPILED.grow(quanta, leaves, table)
    return MixTree(quanta, leaves, table[:3], *table[3:], levels=levels, table=table)  # type: ignore[misc]


def _columns(before: IntArray, splits: _Splits) -> dict[str, np.ndarray]:
    """Children, weights and thresholds of nodes, by the names that they have in `MixTree`.

    Args:
        before: Weight before each leaf of all trees.
        splits: The nodes.
    """
    low, split, high = before[splits.bounds]
    total, left = high - low, split - low
    right = total - left
    is_left = left <= right
    minor, slack = np.minimum(left, right), np.maximum(left, right)
    width = (slack * np.minimum(np.maximum(splits.freedom, 0.0), 1.0)).astype(np.int64)
    lowest = ((minor + 1) >> 1) + ((slack - width) >> 1)
    lighter, heavier = np.where(is_left, splits.children, splits.children[::-1])
    return {
        "heavier": heavier,
        "lighter": lighter,
        "is_left": is_left,
        "total": total,
        "minor": minor,
        "lowest": lowest,
        "width": width,
    }


def _leaves(quanta: IntArray) -> IntArray:
    """The domains with weight, heaviest first; of equal ones, the first first."""
    active = quanta.nonzero()[0]
    # Numbers that hold weight and domain: they are sorted several times as fast as their order is found.
    both = ((RESOLUTION - quanta[active]) << _DOMAIN_BITS) | active
    both.sort()
    return both & ((1 << _DOMAIN_BITS) - 1)


def _split_in_plain_numbers(before: list[int]) -> _Splits:
    """The nodes of one tree.

    Args:
        before: (L + 1,) weight before each leaf, and of all.
    """
    bounds: list[int] = []
    children: list[int] = []
    freedom = [1.0] * len(before)
    # Each interval comes with two bounds on its error in samples: the error of rounding to the nearest sample, and the
    # error that thresholds drawn from their full range would add.
    nodes = [(0, len(before) - 1, 0.0, 0.0)] if len(before) > 2 else []
    levels = [0]
    for node, (low, high, rounding, irregular) in enumerate(nodes):  # which grows while it is read
        if node == levels[-1]:
            levels.append(len(nodes))
        start, stop = before[low], before[high]
        split = low + 1
        if split + 1 < high:
            # The first boundary that is not below half of the weight, or the one before it, unless it is farther off.
            split = bisect_left(before, (start + stop + 1) // 2, low, high)
            if split - 1 > low and before[split - 1] + before[split] >= start + stop:
                split -= 1
        bounds += (low, split, high)
        whole, left = stop - start, before[split] - start
        added = (1 - min(left, whole - left) / whole) / 2
        share = left / whole
        for first, last, part in ((low, split, share), (split, high, 1 - share)):
            # A child inherits its share of the parent's error. Its own split adds up to half a sample by rounding, and
            # up to half of the threshold range.
            child_rounding, child_irregular = 0.5 + part * rounding, added + part * irregular
            if last - first == 1:
                freedom[first] = (DISCREPANCY - child_rounding) / child_irregular
                children.append(~first)
            else:
                children.append(len(nodes))
                nodes.append((first, last, child_rounding, child_irregular))
    table = np.array(bounds, dtype=np.int64).reshape(-1, 3)
    return _Splits(
        table.T,
        np.array(children, dtype=np.int64).reshape(-1, 2).T,
        np.minimum.reduceat(freedom, table[:, ::2].ravel())[::2] if bounds else np.empty(0),
        [levels],
    )


def _split_together(before: IntArray, first: IntArray, last: IntArray) -> _Splits:
    """The nodes of M trees, as `_split_in_plain_numbers` splits them, a level of all trees at a time.

    Args:
        before: Weight before each leaf of all trees.
        first: (M,) number of the first leaf of each tree.
        last: (M,) number after the last leaf of each tree.
    """
    tree = np.flatnonzero(last - first > 1)
    low, high = first[tree], last[tree]
    rounding, irregular = np.zeros(len(tree)), np.zeros(len(tree))
    freedom = np.empty(len(before))
    columns: list[tuple[IntArray, ...]] = []
    sizes = [np.zeros(len(first), dtype=np.int64)]
    end = 0
    while len(low):
        start, stop = before[low], before[high]
        twice = start + stop
        split = np.searchsorted(before, (twice + 1) // 2)  # the first whose weight is not below the middle
        split -= twice - 2 * before[split - 1] <= 2 * before[split] - twice
        split = np.minimum(np.maximum(split, low + 1), high - 1)
        whole, left = stop - start, before[split] - start
        share = left / whole
        part = np.column_stack([share, 1 - share])
        child_rounding = (0.5 + part * rounding[:, None]).ravel()
        added = (1 - np.minimum(left, whole - left) / whole) / 2
        child_irregular = (added[:, None] + part * irregular[:, None]).ravel()
        child_low, child_high = np.column_stack([low, split]).ravel(), np.column_stack([split, high]).ravel()
        is_leaf = child_high - child_low == 1
        leaf = child_low[is_leaf]
        freedom[leaf] = (DISCREPANCY - child_rounding[is_leaf]) / child_irregular[is_leaf]
        end += len(low)
        inner = ~is_leaf
        child = np.where(is_leaf, ~child_low, end - 1 + np.cumsum(inner))
        columns.append((tree, low, split, high, child[::2], child[1::2]))
        sizes.append(np.bincount(tree, minlength=len(first)))
        tree, low, high = np.repeat(tree, 2)[inner], child_low[inner], child_high[inner]
        rounding, irregular = child_rounding[inner], child_irregular[inner]
    # From the leaves to the roots: beside the nodes, `strictest` has the leaves, at the complements of their numbers.
    strictest = np.concatenate([np.empty(end), freedom[::-1]])
    for _, low, _, _, left_child, right_child in reversed(columns):
        strictest[end - len(low) : end] = np.minimum(strictest[left_child], strictest[right_child])
        end -= len(low)
    levels = np.cumsum(sizes, axis=0)
    tree, *bounds_and_children = map(np.concatenate, zip(*columns, strict=True)) if columns else [low] * 6
    by_tree = np.argsort(tree, kind="stable")
    tree, number = tree[by_tree], np.empty_like(by_tree)
    number[by_tree] = np.arange(len(tree)) - (np.cumsum(levels[-1]) - levels[-1])[tree]
    table = np.stack(bounds_and_children)[:, by_tree]
    bounds, children = table[:3], table[3:]
    inner = children >= 0
    children = np.where(inner, number[np.where(inner, children, 0)], children + first[tree])
    return _Splits(bounds, children, strictest[: len(by_tree)][by_tree], [_of_one(its) for its in levels.T])


def _of_one(levels: Iterable[int]) -> list[int]:
    """The first node of each level of one tree: other trees may have more levels."""
    return list(dict.fromkeys(map(int, levels)))
