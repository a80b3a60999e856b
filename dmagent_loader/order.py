"""In which order the domains of one mix follow each other: a low-discrepancy sequence with random access.

The domains with weight are the leaves of a binary tree. A node that has received m samples has given

    L(m) = #{k : k q + T_k <= m p + carry}

of them to its lighter child, whose share of the node is p / q <= 1/2, and the other m - L(m) to the heavier one. L
grows by 0 or 1 at every sample because the thresholds T_k lie within [p/2, q - p/2]. So the domain of sample n, and
how many samples of that domain came before it, follow from n alone by walking down the tree: no state, no replay, in
O(log D), and a rank computes only the samples that it needs.

Each level rounds to the nearest sample, and the error it passes down shrinks with the share of the child, so that after
any n samples no domain is off its share by more than about one. The thresholds vary at random as far as
`DISCREPANCY` allows: with a fixed pattern, an even mix of two domains on two ranks would give each rank one domain
only. What the last mix still owed a domain is carried into the next one; otherwise a rare domain would get nothing for
as long as the mix changes more often than the domain is due.

All arithmetic that decides is in integers: weights are multiples of 2**-30.
"""

from __future__ import annotations

import numpy as np

from dmagent_loader.hashing import UIntArray, random_bits
from dmagent_loader.simplex import FloatArray, IntArray, largest_remainder

RESOLUTION = 1 << 30
"""Weights are rounded to multiples of 1 / RESOLUTION: after 10**9 samples of one mix that moves half a sample."""

DISCREPANCY = 1.25
"""Bound in samples, on how far a domain may be off its share, up to which the order is made irregular."""

_HASH_BITS = 30
_DIRECT_LIMIT = 1 << 32
_ROOT = 0


class DomainOrder:
    """The order of domains under one mix.

    Args:
        mix: (D,), sums to 1. Domains with weight 0 never appear.
        key: Of the random stream that makes the order irregular.
        carry: (D,) int64, in units of samples / RESOLUTION: what each domain is still owed; None: nothing. A domain of
            weight 0 keeps its claim for later, but gets nothing now.
    """

    def __init__(self, mix: FloatArray, key: int, carry: IntArray | None = None) -> None:
        self.quanta = largest_remainder(mix, RESOLUTION)
        """(D,) int64: the mix in force in units of 1 / RESOLUTION; sums to RESOLUTION."""
        self._carry = np.zeros(len(mix), dtype=np.int64) if carry is None else carry
        active = np.flatnonzero(self.quanta > 0)
        self._leaves = active[np.argsort(-self.quanta[active], kind="stable")].astype(np.int64)
        self._grow(key)

    def locate(self, samples: IntArray) -> tuple[IntArray, IntArray]:
        """The domain of each sample, and how many samples of that domain came before it under this mix.

        Args:
            samples: (n,) int64, positions counted from the start of this mix.

        Returns:
            Domain numbers (n,) and counts (n,).
        """
        samples = np.asarray(samples, dtype=np.int64)
        if len(self._leaves) == 1:
            return np.full(samples.shape, self._leaves[0]), samples.copy()
        domain, rank = np.empty_like(samples), np.empty_like(samples)
        open_ = np.arange(len(samples))
        node, received = np.full(samples.shape, _ROOT, dtype=np.int64), samples
        while len(open_):
            before, minor = self._given_to_minor(node, received)
            received = np.where(minor, before, received - before)
            node = np.where(minor, self._minor_child[node], self._major_child[node])
            done = node < 0
            domain[open_[done]] = self._leaves[~node[done]]
            rank[open_[done]] = received[done]
            going = ~done
            open_, node, received = open_[going], node[going], received[going]
        return domain, rank

    def counts(self, num_samples: int) -> IntArray:
        """How many of the first `num_samples` samples fall on each domain: (D,) int64, sums to `num_samples`."""
        counts = np.zeros(len(self.quanta), dtype=np.int64)
        if len(self._leaves) == 1:
            counts[self._leaves[0]] = num_samples
            return counts
        received = np.zeros(len(self._total), dtype=np.int64)
        received[_ROOT] = num_samples
        for start, stop in self._levels:
            nodes = np.arange(start, stop)
            given, _ = self._given_to_minor(nodes, received[start:stop])
            for child, amount in ((self._minor_child, given), (self._major_child, received[start:stop] - given)):
                ids = child[start:stop]
                leaf = ids < 0
                counts[self._leaves[~ids[leaf]]] = amount[leaf]
                received[ids[~leaf]] = amount[~leaf]
        return counts

    def counts_and_owed(self, num_samples: int) -> tuple[IntArray, IntArray]:
        """`counts`, and what each domain is owed by then: (D,) int64, in units of samples / RESOLUTION.

        Exact: share times samples, minus samples given, plus what was carried in.
        """
        counts = self.counts(num_samples)
        whole, part = divmod(num_samples, RESOLUTION)
        extra, rest = np.divmod(part * self.quanta, RESOLUTION)
        owed = (whole * self.quanta + extra - counts) * RESOLUTION + rest + self._carry
        return counts, np.asarray(owed, dtype=np.int64)

    def _given_to_minor(self, node: IntArray, received: IntArray) -> tuple[IntArray, np.ndarray]:
        """L(m) of each node, and whether sample m itself goes to the lighter child."""
        total, minor = self._total[node], self._minor[node]
        if len(received) and int(received.max()) >= _DIRECT_LIMIT:
            cycles, within = np.divmod(received, total)
            k, rest = np.divmod(within * minor + self._shift[node], total)
            k = k + cycles * minor
        else:
            k, rest = np.divmod(received * minor + self._shift[node], total)
        before = np.clip(k + (self._threshold(node, k) <= rest), 0, received)
        rest = rest + minor
        wrapped = rest >= total
        k = k + wrapped
        rest = np.where(wrapped, rest - total, rest)
        after = np.clip(k + (self._threshold(node, k) <= rest), 0, received + 1)
        return before, after > before

    def _threshold(self, node: IntArray, k: IntArray) -> IntArray:
        bits = random_bits(self._key[node], k) >> np.uint64(64 - _HASH_BITS)
        drawn = (bits.astype(np.int64) * self._width[node]) >> _HASH_BITS
        return np.asarray(self._lowest[node] + drawn, dtype=np.int64)

    def _grow(self, key: int) -> None:
        """Grows the tree level by level. A node is an interval of the leaves, which are sorted by falling weight."""
        num_leaves = len(self._leaves)
        weight = np.concatenate([[0], np.cumsum(self.quanta[self._leaves])])
        owed = np.concatenate([[0], np.cumsum(self._carry[self._leaves])])
        low = np.array([0] if num_leaves > 1 else [], dtype=np.int64)
        high = np.array([num_leaves] if num_leaves > 1 else [], dtype=np.int64)
        # Error bounds of a node: what rounding to the nearest sample costs, and what full irregularity would add.
        rounding, irregular = np.zeros(len(low)), np.zeros(len(low))
        leaf_rounding, leaf_irregular = np.zeros(num_leaves), np.ones(num_leaves)
        columns: dict[str, list[IntArray]] = {
            name: [] for name in ("total", "minor", "shift", "minor_child", "major_child", "low", "high")
        }
        self._levels: list[tuple[int, int]] = []
        first = 0
        while len(low):
            middle = (weight[low] + weight[high]) / 2
            split = np.searchsorted(weight, middle)
            split = split - (np.abs(weight[split - 1] - middle) <= np.abs(weight[split] - middle))
            split = np.clip(split, low + 1, high - 1)
            left, total = weight[split] - weight[low], weight[high] - weight[low]
            left_is_minor = 2 * left <= total
            minor = np.where(left_is_minor, left, total - left)
            owed_left, owed_total = owed[split] - owed[low], owed[high] - owed[low]
            owed_minor = np.where(left_is_minor, owed_left, owed_total - owed_left)

            starts, stops = np.column_stack([low, split]).ravel(), np.column_stack([split, high]).ravel()
            share = np.column_stack([left, total - left]).ravel() / np.repeat(total, 2)
            child_rounding = 0.5 + share * np.repeat(rounding, 2)
            child_irregular = np.repeat((1 - minor / total) / 2, 2) + share * np.repeat(irregular, 2)
            is_leaf = stops - starts == 1
            leaf_rounding[starts[is_leaf]] = child_rounding[is_leaf]
            leaf_irregular[starts[is_leaf]] = child_irregular[is_leaf]
            ids = ~starts
            ids[~is_leaf] = first + len(low) + np.arange(int((~is_leaf).sum()))
            child = ids.reshape(-1, 2)

            columns["total"].append(total)
            columns["minor"].append(minor)
            columns["shift"].append(np.rint(owed_minor / RESOLUTION * total - minor * (owed_total / RESOLUTION)))
            columns["minor_child"].append(np.where(left_is_minor, child[:, 0], child[:, 1]))
            columns["major_child"].append(np.where(left_is_minor, child[:, 1], child[:, 0]))
            columns["low"].append(low)
            columns["high"].append(high)
            self._levels.append((first, first + len(low)))
            first += len(low)
            low, high = starts[~is_leaf], stops[~is_leaf]
            rounding, irregular = child_rounding[~is_leaf], child_irregular[~is_leaf]

        joined = {name: np.concatenate([*parts, []]).astype(np.int64) for name, parts in columns.items()}
        self._total, self._minor, self._shift = joined["total"], joined["minor"], joined["shift"]
        self._minor_child, self._major_child = joined["minor_child"], joined["major_child"]
        self._key: UIntArray = random_bits(key, np.arange(first, dtype=np.int64))
        freedom = np.append(np.clip((DISCREPANCY - leaf_rounding) / leaf_irregular, 0.0, 1.0), 1.0)
        node_freedom = np.array(
            [freedom[a:b].min() for a, b in zip(joined["low"], joined["high"], strict=True)], dtype=np.float64
        )
        slack = self._total - self._minor
        self._width = np.floor(slack * node_freedom).astype(np.int64)
        self._lowest = (self._minor + 1) // 2 + (slack - self._width) // 2
