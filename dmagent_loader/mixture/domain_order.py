"""The order of domains under one mix: a low-discrepancy sequence with random access.

The domains with positive weight are the leaves of a binary tree. A node that has received m samples has passed

    L(m) = #{k : k q + T_k <= m p + carry}

of them to its lighter child, whose share of the node is p / q <= 1/2, and the other m - L(m) to the heavier one. L
grows by 0 or 1 at every sample because the thresholds T_k lie within [p/2, q - p/2]. Walking down the tree therefore
yields the domain of sample n, and the number of earlier samples of that domain, from n alone. There is no state and no
replay, the cost is O(log D), and a rank computes only the samples that it needs.

Each level rounds to the nearest sample. The error that it passes down shrinks with the share of the child, so after any
n samples every domain is within about one sample of its share. The thresholds are random, as far as `DISCREPANCY`
allows: with a fixed pattern, an even mix of two domains on two ranks would give each rank a single domain. The debt of
one mix to a domain is carried into the next mix. Otherwise a rare domain would get nothing while mixes change more
often than it is due.

Integer arithmetic makes every choice: weights are multiples of 2**-30.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from dmagent_loader.mixture.hashing import UIntArray, random_bits
from dmagent_loader.mixture.simplex import FloatArray, IntArray, largest_remainder

RESOLUTION = 1 << 30
"""Weights are rounded to multiples of 1 / RESOLUTION: an error of half a sample after 10**9 samples of one mix."""

DISCREPANCY = 1.25
"""Largest deviation of a domain from its share, in samples, up to which the order is made irregular."""

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
        key: Key of the random stream that makes the order irregular.
        carry: (D,) int64, debt to each domain in units of samples / RESOLUTION; None: no debt. A domain of weight 0
            gets nothing under this mix, and its debt stays for a later one.
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
        """The domain of each sample, and the number of earlier samples of that domain under this mix.

        Args:
            samples: (n,) int64 positions, counted from the start of this mix.

        Returns:
            Domain numbers (n,) and counts (n,).
        """
        samples = np.asarray(samples, dtype=np.int64)
        if len(self._leaves) == 1:
            return np.full(samples.shape, self._leaves[0]), samples.copy()
        domain, rank = np.empty_like(samples), np.empty_like(samples)
        # All samples walk down the tree together, one level per iteration; those that reach a leaf drop out.
        pending = np.arange(len(samples))
        node, received = np.full(samples.shape, _ROOT, dtype=np.int64), samples
        while len(pending):
            to_minor, minor = self._split(node, received)
            # Sample m of a node is sample L(m) of its lighter child, or sample m - L(m) of its heavier one.
            received = np.where(minor, to_minor, received - to_minor)
            node = self._children[2 * node + minor]
            if (done := node < 0).any():
                finished, remaining = pending[done], ~done
                domain[finished], rank[finished] = self._leaves[~node[done]], received[done]
                pending, node, received = pending[remaining], node[remaining], received[remaining]
        return domain, rank

    def counts(self, num_samples: int) -> IntArray:
        """Number of samples of each domain among the first `num_samples`: (D,) int64, sums to `num_samples`."""
        # A decision needs the same counts twice: for the history, and for the segment of the next mix.
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
            to_minor = self._to_minor(node, received)
            received = np.column_stack([received - to_minor, to_minor]).ravel()
            node = self._children.reshape(-1, 2)[node].ravel()
            leaf = node < 0
            counts[self._leaves[~node[leaf]]] = received[leaf]
            node, received = node[~leaf], received[~leaf]
        return counts

    def counts_and_owed(self, num_samples: int) -> tuple[IntArray, IntArray]:
        """`counts`, and the debt to each domain after them: (D,) int64, in units of samples / RESOLUTION.

        The debt is exact: share times samples, minus samples drawn, plus the debt carried in.
        """
        counts = self.counts(num_samples)
        # num_samples * quanta / RESOLUTION, in two parts: the whole product could overflow int64.
        whole, part = divmod(num_samples, RESOLUTION)
        extra, rest = np.divmod(part * self.quanta, RESOLUTION)
        owed = (whole * self.quanta + extra - counts) * RESOLUTION + rest + self._carry
        return counts, np.asarray(owed, dtype=np.int64)

    def _divide(self, node: IntArray, received: IntArray, shift: IntArray) -> tuple[IntArray, IntArray]:
        """Quotient and remainder of (received * p + shift) / q at each node; q fits in 30 bits."""
        total, minor = self._total[node], self._minor[node]
        if len(received) and int(received.max()) >= _DIRECT_LIMIT:
            # received * minor could overflow int64: whole cycles of q samples contribute exactly p each.
            cycles = received // total
            start = (received - cycles * total) * minor + shift
            k = start // total
            return k + cycles * minor, start - k * total
        start = received * minor + shift
        k = start // total
        return k, start - k * total

    def _to_minor(self, node: IntArray, received: IntArray) -> IntArray:
        """L(m) of each node: the number of its first m samples that went to its lighter child."""
        k, rest = self._divide(node, received, self._shift[node])
        # Thresholds 0 to k - 1 are passed, threshold k only if the remainder has reached it. A large carry would give
        # the child more samples than the node has received, or fewer than none: hence the bounds.
        to_minor: IntArray = np.minimum(np.maximum(k + (self._threshold(node, k) <= rest), 0), received)
        return to_minor

    def _split(self, node: IntArray, received: IntArray) -> tuple[IntArray, np.ndarray]:
        """L(m) of each node, and whether sample m itself goes to the lighter child: L(m + 1) > L(m)."""
        total, minor = self._total[node], self._minor[node]
        k, rest = self._divide(node, received, self._shift[node] + minor)
        # Thresholds keep p / 2 away from both ends, so a step passes at most one of them: threshold k, or threshold
        # k - 1 if the step has just crossed into the next cycle.
        wrapped = 2 * rest < minor
        position = rest + total * wrapped
        threshold = self._threshold(node, k - wrapped)
        passed = threshold <= position
        after = k + (passed & ~wrapped)
        before = after - (passed & (threshold > position - minor))
        before = np.minimum(np.maximum(before, 0), received)
        after = np.minimum(np.maximum(after, 0), received + 1)
        return before, after > before

    def _threshold(self, node: IntArray, k: IntArray) -> IntArray:
        """T_k of each node: uniform over an interval of length `_width` in the middle of its cycle."""
        bits = random_bits(self._key[node], k) >> _UNUSED_BITS
        drawn: IntArray = (bits.view(np.int64) * self._width[node]) >> _HASH_BITS
        return self._lowest[node] + drawn

    def _grow(self, key: int) -> None:
        """Builds the tree level by level. A node is an interval of the leaves, sorted by descending weight.

        This uses plain Python numbers: most levels are so short that numpy would take ten times as long.
        """
        num_leaves = len(self._leaves)
        # Prefix sums, so the weight and the debt of any interval of leaves are one subtraction.
        weight = [0, *np.cumsum(self.quanta[self._leaves]).tolist()]
        owed = [0, *np.cumsum(self._carry[self._leaves]).tolist()]
        total: list[int] = []
        lighter: list[int] = []
        shift: list[int] = []
        children: list[int] = []
        # Each interval comes with two bounds on its error in samples: the error of rounding to the nearest sample, and
        # the error that thresholds drawn from their full range would add.
        freedom = [1.0] * num_leaves
        queue = [(0, num_leaves, 0.0, 0.0)] if num_leaves > 1 else []
        intervals: list[tuple[int, int]] = []
        for low, high, rounding, irregular in queue:  # the loop appends to the queue
            # Split at the leaf boundary closest to half the weight: even splits keep heavy leaves near the root, so
            # most samples need few steps. Both sides get at least one leaf.
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
                # A child inherits its share of the parent's error. Its own split adds up to half a sample by rounding,
                # and up to half of the threshold range.
                child_rounding = 0.5 + share * rounding
                child_irregular = (1 - minor / whole) / 2 + share * irregular
                if last - first == 1:
                    # The part of the full range that keeps this leaf within DISCREPANCY.
                    freedom[first] = min(max((DISCREPANCY - child_rounding) / child_irregular, 0.0), 1.0)
                    ids.append(~first)
                else:
                    ids.append(len(queue))
                    queue.append((first, last, child_rounding, child_irregular))
            total.append(whole)
            lighter.append(minor)
            # The debt to the lighter child beyond its share of the node's debt, in the units of m p: the carry of L(m).
            shift.append(round(owed_minor / RESOLUTION * whole - minor * (owed_whole / RESOLUTION)))
            children += ids[::-1] if left_is_minor else ids
            intervals.append((low, high))

        self._total, self._minor = np.array(total, dtype=np.int64), np.array(lighter, dtype=np.int64)
        self._shift = np.array(shift, dtype=np.int64)
        self._children: IntArray = np.array(children, dtype=np.int64)
        """Heavier and lighter child of each node; a leaf is stored as its bitwise complement, so it is negative."""
        self._key: UIntArray = random_bits(key, np.arange(len(total), dtype=np.int64))
        # Thresholds may range over [p / 2, q - p / 2], of length q - p. A node affects every leaf below it, so the
        # strictest leaf limits its range, which stays centred.
        slack = self._total - self._minor
        node_freedom = np.array([min(freedom[low:high]) for low, high in intervals], dtype=np.float64)
        self._width = np.floor(slack * node_freedom).astype(np.int64)
        self._lowest = (self._minor + 1) // 2 + (slack - self._width) // 2
