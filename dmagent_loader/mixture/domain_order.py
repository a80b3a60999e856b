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

from bisect import bisect_left

import numpy as np

from dmagent_loader.mixture.hashing import UIntArray, random_bits
from dmagent_loader.mixture.simplex import FloatArray, IntArray, largest_remainder

RESOLUTION = 1 << 30
"""Weights are rounded to multiples of 1 / RESOLUTION: after 10**9 samples of one mix that moves half a sample."""

DISCREPANCY = 1.25
"""Bound in samples, on how far a domain may be off its share, up to which the order is made irregular."""

_HASH_BITS = 30
_UNUSED_BITS = np.uint64(64 - _HASH_BITS)
_DIRECT_LIMIT = 1 << 32
_ROOT = 0


def in_quanta(mix: FloatArray) -> IntArray:
    """A mix in units of 1 / RESOLUTION: (D,) int64, sums to RESOLUTION."""
    return largest_remainder(mix, RESOLUTION)


class DomainOrder:
    """The order of domains under one mix.

    Args:
        quanta: (D,) the mix in units of 1 / RESOLUTION (`in_quanta`). Domains with weight 0 never appear.
        key: Of the random stream that makes the order irregular.
        carry: (D,) int64, in units of samples / RESOLUTION: what each domain is still owed; None: nothing. A domain of
            weight 0 keeps its claim for later, but gets nothing now.
    """

    def __init__(self, quanta: IntArray, key: int, carry: IntArray | None = None) -> None:
        self.quanta: IntArray = quanta.astype(np.int64)
        """(D,) int64: the mix in force in units of 1 / RESOLUTION; sums to RESOLUTION."""
        self._carry = np.zeros(len(quanta), dtype=np.int64) if carry is None else carry
        active = np.flatnonzero(self.quanta > 0)
        self._leaves = active[np.argsort(-self.quanta[active], kind="stable")].astype(np.int64)
        self._counted: tuple[int, IntArray] | None = None
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
            to_minor, minor = self._split(node, received)
            received = np.where(minor, to_minor, received - to_minor)
            node = self._children[2 * node + minor]
            if (done := node < 0).any():
                left = open_[done]
                domain[left], rank[left] = self._leaves[~node[done]], received[done]
                going = ~done
                open_, node, received = open_[going], node[going], received[going]
        return domain, rank

    def counts(self, num_samples: int) -> IntArray:
        """How many of the first `num_samples` samples fall on each domain: (D,) int64, sums to `num_samples`."""
        # A decision asks twice: what was trained on, and where the next mix begins.
        if self._counted is None or self._counted[0] != num_samples:
            self._counted = (num_samples, self._count(num_samples))
        return self._counted[1].copy()

    def _count(self, num_samples: int) -> IntArray:
        counts = np.zeros(len(self.quanta), dtype=np.int64)
        if len(self._leaves) == 1:
            counts[self._leaves[0]] = num_samples
            return counts
        node, received = np.array([_ROOT]), np.array([num_samples])
        while len(node):
            to_minor = self._given(node, received)
            received = np.column_stack([received - to_minor, to_minor]).ravel()
            node = self._children.reshape(-1, 2)[node].ravel()
            leaf = node < 0
            counts[self._leaves[~node[leaf]]] = received[leaf]
            node, received = node[~leaf], received[~leaf]
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

    def _divide(self, node: IntArray, received: IntArray, shift: IntArray) -> tuple[IntArray, IntArray]:
        """Quotient and rest of (received * p + shift) / q of each node; q fits in 30 bits."""
        total, minor = self._total[node], self._minor[node]
        if len(received) and int(received.max()) >= _DIRECT_LIMIT:
            cycles = received // total
            start = (received - cycles * total) * minor + shift
            k = start // total
            return k + cycles * minor, start - k * total
        start = received * minor + shift
        k = start // total
        return k, start - k * total

    def _given(self, node: IntArray, received: IntArray) -> IntArray:
        """L(m) of each node: how many of its first m samples went to its lighter child."""
        k, rest = self._divide(node, received, self._shift[node])
        given: IntArray = np.minimum(np.maximum(k + (self._threshold(node, k) <= rest), 0), received)
        return given

    def _split(self, node: IntArray, received: IntArray) -> tuple[IntArray, np.ndarray]:
        """L(m) of each node, and whether sample m itself goes to the lighter child: L(m + 1) > L(m)."""
        total, minor = self._total[node], self._minor[node]
        k, rest = self._divide(node, received, self._shift[node] + minor)
        # Thresholds keep p / 2 away from both ends, so only one of them can be passed in a step: that of k, or that of
        # k - 1 if the step has just gone into the next cycle.
        late = 2 * rest < minor
        place = rest + total * late
        threshold = self._threshold(node, k - late)
        passed = threshold <= place
        after = k + (passed & ~late)
        before = after - (passed & (threshold > place - minor))
        before = np.minimum(np.maximum(before, 0), received)
        after = np.minimum(np.maximum(after, 0), received + 1)
        return before, after > before

    def _threshold(self, node: IntArray, k: IntArray) -> IntArray:
        bits = random_bits(self._key[node], k) >> _UNUSED_BITS
        drawn: IntArray = (bits.view(np.int64) * self._width[node]) >> _HASH_BITS
        return self._lowest[node] + drawn

    def _grow(self, key: int) -> None:
        """Grows the tree level by level. A node is an interval of the leaves, which are sorted by falling weight.

        In plain numbers: the arrays of most levels would be so short that numpy takes ten times as long.
        """
        num_leaves = len(self._leaves)
        weight = [0, *np.cumsum(self.quanta[self._leaves]).tolist()]
        owed = [0, *np.cumsum(self._carry[self._leaves]).tolist()]
        total: list[int] = []
        lighter: list[int] = []
        shift: list[int] = []
        children: list[int] = []
        # Error bounds: what rounding to the nearest sample costs, and what full irregularity would add.
        freedom = [1.0] * num_leaves
        waiting = [(0, num_leaves, 0.0, 0.0)] if num_leaves > 1 else []
        intervals: list[tuple[int, int]] = []
        for low, high, rounding, irregular in waiting:  # grows while it is gone through
            middle = (weight[low] + weight[high]) / 2
            split = bisect_left(weight, middle, low, high)
            split -= abs(weight[split - 1] - middle) <= abs(weight[split] - middle)
            split = min(max(split, low + 1), high - 1)
            whole, left = weight[high] - weight[low], weight[split] - weight[low]
            owed_whole, owed_left = owed[high] - owed[low], owed[split] - owed[low]
            left_is_minor = 2 * left <= whole
            minor, owed_minor = (left, owed_left) if left_is_minor else (whole - left, owed_whole - owed_left)
            ids = []
            for first, last, share in ((low, split, left / whole), (split, high, 1 - left / whole)):
                child_rounding = 0.5 + share * rounding
                child_irregular = (1 - minor / whole) / 2 + share * irregular
                if last - first == 1:
                    freedom[first] = min(max((DISCREPANCY - child_rounding) / child_irregular, 0.0), 1.0)
                    ids.append(~first)
                else:
                    ids.append(len(waiting))
                    waiting.append((first, last, child_rounding, child_irregular))
            total.append(whole)
            lighter.append(minor)
            shift.append(round(owed_minor / RESOLUTION * whole - minor * (owed_whole / RESOLUTION)))
            children += ids[::-1] if left_is_minor else ids
            intervals.append((low, high))

        self._total, self._minor = np.array(total, dtype=np.int64), np.array(lighter, dtype=np.int64)
        self._shift = np.array(shift, dtype=np.int64)
        self._children: IntArray = np.array(children, dtype=np.int64)
        """Heavier and lighter child of each node; a leaf is written as its complement."""
        self._key: UIntArray = random_bits(key, np.arange(len(total), dtype=np.int64))
        slack = self._total - self._minor
        node_freedom = np.array([min(freedom[low:high]) for low, high in intervals], dtype=np.float64)
        self._width = np.floor(slack * node_freedom).astype(np.int64)
        self._lowest = (self._minor + 1) // 2 + (slack - self._width) // 2
