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

from bisect import bisect_right
from itertools import pairwise

import numpy as np

from dmagent_loader.mixture.compiled import ORDER as COMPILED
from dmagent_loader.mixture.hashing import UIntArray, random_bits
from dmagent_loader.mixture.mix_tree import RESOLUTION, MixTree, grow
from dmagent_loader.mixture.simplex import FloatArray, IntArray, largest_remainder

# As arrays without dimensions: operations with plain numbers take twice the time on short arrays.
_HASH_BITS = np.array(30)
_UNUSED_BITS = np.array(64 - 30, dtype=np.uint64)
_ZERO = np.array(0)
_DIRECT_LIMIT = 1 << 32
_ROOT = 0
_FEW_NODES = 512
"""Nodes up to which plain numbers are faster than numpy, because most levels have few of them."""
_MORE = 8
"""More samples than a node passes to its lighter child beyond its share, but for large debts."""
_NEAR = 64
"""Samples that can be followed one by one in the time it takes to compute one level of the tree."""
_DENSE, _MOST_IN_RANGE = 4, 1 << 16
"""Samples of a range for each one of them that is looked up, and in all, up to which all of the range are."""


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
        tree: The tree of the mix, if it was grown before.
    """

    def __init__(self, quanta: IntArray, key: int, carry: IntArray | None = None, tree: MixTree | None = None) -> None:
        self._tree = tree = grow([quanta.astype(np.int64)])[0] if tree is None else tree
        self.quanta = tree.quanta
        """(D,) int64: the mix in force in units of 1 / RESOLUTION; sums to RESOLUTION."""
        self._carry = np.zeros(len(quanta), dtype=np.int64) if carry is None else carry
        self._leaves = tree.leaves
        self._counted: tuple[int, IntArray] | None = None
        self._reached: tuple[int, IntArray] | None = None
        """The end of the last range that was located, and `_received` there: the next one mostly begins there."""
        self._range: tuple[int, IntArray, IntArray] | None = None
        """First sample of this range, `_received` there, and the domain of each sample."""
        self._total, self._minor, self._lowest, self._width = tree.total, tree.minor, tree.lowest, tree.width
        self._key, self._shift = self._prepared_compiled(key) if self._is_compiled else self._prepared(key)

    @property
    def _is_compiled(self) -> bool:
        """Whether the compiled loops can be used: an order may come from a process that has them, and this one not."""
        return COMPILED is not None and self._tree.table is not None

    def _prepared(self, key: int) -> tuple[UIntArray, IntArray]:
        """Key and carry of each node, (N,) and (N,).

        The carry is the debt to the lighter child beyond its share of the node's debt, in the units of m p.
        """
        tree = self._tree
        owed = np.zeros(len(self._leaves) + 1, dtype=np.int64)
        self._carry[self._leaves].cumsum(out=owed[1:])
        low, split, high = owed[tree.bounds]
        of_minor = np.where(tree.is_left, split - low, high - split)
        shift = of_minor / RESOLUTION * self._total - self._minor * ((high - low) / RESOLUTION)
        return random_bits(key, np.arange(len(tree.total), dtype=np.int64)), np.rint(shift).astype(np.int64)

    def _prepared_compiled(self, key: int) -> tuple[UIntArray, IntArray]:
        assert COMPILED is not None
        keys, shift = np.empty(len(self._total), dtype=np.uint64), np.empty(len(self._total), dtype=np.int64)
        COMPILED.prepare(key, np.ascontiguousarray(self._carry), self._leaves, self._tree.table, keys, shift)
        return keys, shift

    def locate(self, samples: IntArray, span: tuple[int, int] | None = None) -> tuple[IntArray, IntArray]:
        """The domain of each sample, and the number of earlier samples of that domain under this mix.

        Args:
            samples: (n,) int64 positions, counted from the start of this mix.
            span: The least and the largest of them, if they are known.

        Returns:
            Domain numbers (n,) and counts (n,).
        """
        samples = np.asarray(samples, dtype=np.int64)
        if len(self._leaves) == 1:
            return np.full(samples.shape, self._leaves[0]), samples.copy()
        if not len(samples):
            return samples.copy(), samples.copy()
        first, last = (int(samples.min()), int(samples.max())) if span is None else span
        end = last + 1
        if end - first > min(_DENSE * len(samples), _MOST_IN_RANGE) or end > _DIRECT_LIMIT:
            return self._locate_each(samples, end)
        domain, rank = self._locate_range(first, end)
        within = samples - first
        return domain[within], rank[within]

    def _locate_each(self, samples: IntArray, end: int) -> tuple[IntArray, IntArray]:
        """`locate` for samples that lie far apart, all below `end`."""
        domain, rank = np.empty_like(samples), np.empty_like(samples)
        # All samples walk down the tree together, one level per iteration; those that reach a leaf drop out.
        pending = np.arange(len(samples))
        node, received = np.full(samples.shape, _ROOT, dtype=np.int64), samples
        while len(pending):
            to_minor, minor = self._split(node, received, end > _DIRECT_LIMIT)
            # Sample m of a node is sample L(m) of its lighter child, or sample m - L(m) of its heavier one.
            received = np.where(minor, to_minor, received - to_minor)
            node = np.where(minor, self._tree.lighter[node], self._tree.heavier[node])
            if (done := node < 0).any():
                finished, remaining = pending[done], ~done
                domain[finished], rank[finished] = self._leaves[~node[done]], received[done]
                pending, node, received = pending[remaining], node[remaining], received[remaining]
        return domain, rank

    def _locate_range(self, first: int, end: int) -> tuple[IntArray, IntArray]:
        """`locate` for the samples from `first` to `end` - 1, of all nodes together.

        A node and a leaf have a block each, of the samples in the range that they receive. Each place in a block comes
        from one in the block of the parent; those in the block of the root are the samples.
        """
        tree, num_nodes = self._tree, len(self._total)
        reached = self._reached
        before = self._received(first) if reached is None or reached[0] != first else reached[1]
        if self._is_compiled:
            return self._follow(before, first, end)
        after, received = self._passed(before, end)
        number = after - before
        begin = number.cumsum() - number
        to_lighter, to_heavier = number[tree.lighter], number[tree.heavier]
        lighter = (begin - before)[:num_nodes].repeat(to_lighter) + received - 1
        is_heavier = np.ones(int(begin[num_nodes]), dtype=bool)
        is_heavier[lighter] = False
        parent = np.arange(int(begin[-1] + number[-1]))
        parent[ranges(begin[tree.lighter], to_lighter)] = lighter
        parent[ranges(begin[tree.heavier], to_heavier)] = is_heavier.nonzero()[0]
        sample = parent[len(is_heavier) :]
        for _ in tree.levels[2:]:
            sample = parent.take(sample)
        of_leaves = number[num_nodes:]
        domain, rank = np.empty_like(sample), np.empty_like(sample)
        domain[sample] = self._leaves[::-1].repeat(of_leaves)
        rank[sample] = ranges(before[num_nodes:], of_leaves)
        self._reached, self._range = (end, after), (first, before, domain)
        return domain, rank

    def _follow(self, before: IntArray, first: int, end: int) -> tuple[IntArray, IntArray]:
        """`_locate_range` by the compiled loop, which follows one sample after the other."""
        assert COMPILED is not None
        after, domain, rank = np.empty_like(before), *np.empty((2, end - first), dtype=np.int64)
        COMPILED.follow(self._tree.table, self._leaves, self._key, self._shift, before, after, domain, rank)
        self._reached, self._range = (end, after), (first, before, domain)
        return domain, rank

    def _passed(self, before: IntArray, end: int) -> tuple[IntArray, IntArray]:
        """The samples of a range that nodes pass to their lighter children.

        Args:
            before: (N + L,) `_received` at the first sample of the range.
            end: Sample after the last one.

        Returns:
            `_received` at the end of the range, (N + L,); and for each sample passed, node by node, the number of
            samples that the node has received with it, (n,).
        """
        if len(self._total) <= _FEW_NODES:
            # The least number of samples of a node with which its child gets each of the next ones tells how many it
            # gets in the range. The other way is to find that number first, level by level.
            likely = ((end - int(before[_ROOT])) * self._minor >> _HASH_BITS) + _MORE
            received = self._next_passed(before, likely)
            after = self._received_after(before, end, likely, received)
            if after is not None:
                return after, received[received <= after[: len(likely)].repeat(likely)]
        after = self._received(end)
        return after, self._next_passed(before, (after - before)[self._tree.lighter])

    def _next_passed(self, before: IntArray, number: IntArray) -> IntArray:
        """For the next samples, (N,) of each node, that go to its lighter child: see `_passed`."""
        k = ranges(before[self._tree.lighter], number)
        # The lighter child gets its sample k once the node has received m of them, with m p + carry >= k q + T_k: m is
        # the quotient, rounded up. The bound holds for a large carry, as in `_to_minor`.
        rest = (self._lowest - self._shift + self._minor - 1).repeat(number)
        due = k * self._total.repeat(number) + self._drawn(self._key.repeat(number), k, self._width.repeat(number))
        return np.maximum((due + rest) // self._minor.repeat(number), k + 1)

    def _received_after(self, before: IntArray, end: int, number: IntArray, received: IntArray) -> IntArray | None:
        """`_received` at the end of a range, by the samples that nodes pass next (`_next_passed`).

        Returns:
            (N + L,). None: a node may pass more samples than these.
        """
        tree = self._tree
        after, in_order, first = [end] * len(before), memoryview(received), 0  # type: ignore[arg-type]
        columns = (tree.lighter, tree.heavier, before[tree.lighter], number)
        for node, (lighter, heavier, k, count) in enumerate(zip(*(its.tolist() for its in columns), strict=True)):
            found = bisect_right(in_order, after[node], first, first + count) - first
            if found == count:
                return None
            after[lighter], after[heavier] = k + found, after[node] - k - found
            first += count
        return np.array(after)

    def counts(self, num_samples: int) -> IntArray:
        """Number of samples of each domain among the first `num_samples`: (D,) int64, sums to `num_samples`."""
        # A decision needs the same counts twice: for the history, and for the segment of the next mix.
        if self._counted is None or self._counted[0] != num_samples:
            self._counted = (num_samples, self._count(num_samples))
        return self._counted[1].copy()

    def _count(self, num_samples: int) -> IntArray:
        if len(self._leaves) == 1:
            return self._of_domains(np.array([num_samples]))
        if self._range is not None:
            first, before, domain = self._range
            if first <= num_samples <= first + len(domain):
                counts = self._of_domains(before)
                return counts + np.bincount(domain[: num_samples - first], minlength=len(counts))
        # Where few samples follow on those that were located, it is cheaper to follow each than to go down the tree.
        begin, before = self._reached or (0, self._received(0))
        is_near = 0 <= num_samples - begin <= _NEAR * len(self._tree.levels) and len(self._total) <= _FEW_NODES
        return self._of_domains(self._passed(before, num_samples)[0] if is_near else self._received(num_samples))

    def _of_domains(self, received: IntArray) -> IntArray:
        """Samples of each domain, (D,), by those that each node and leaf has received."""
        counts = np.zeros(len(self.quanta), dtype=np.int64)
        counts[self._leaves] = received[: -len(self._leaves) - 1 : -1]
        return counts

    def _received(self, num_samples: int) -> IntArray:
        """Samples that each node and, from the end on, each leaf has received among the first `num_samples`: (N + L,).

        So the numbers of children in the tree are their places.
        """
        tree, is_long = self._tree, num_samples >= _DIRECT_LIMIT
        received = np.zeros(len(self._total) + len(self._leaves), dtype=np.int64)
        if not num_samples:
            return received
        received[_ROOT] = num_samples
        for first, last in pairwise(tree.levels):
            level = slice(first, last)
            here = received[level]
            to_minor = self._to_minor(level, here, is_long)
            received[tree.lighter[level]] = to_minor
            received[tree.heavier[level]] = here - to_minor
        return received

    def counts_and_owed(self, num_samples: int) -> tuple[IntArray, IntArray]:
        """`counts`, and the debt to each domain after them: (D,) int64, in units of samples / RESOLUTION.

        The debt is exact: share times samples, minus samples drawn, plus the debt carried in.
        """
        counts = self.counts(num_samples)
        # The two products may be too large for int64 and wrap around, but their difference is not.
        return counts, np.asarray(num_samples * self.quanta - counts * RESOLUTION + self._carry)

    def _divide(
        self, node: IntArray | slice, received: IntArray, shift: IntArray, is_long: bool
    ) -> tuple[IntArray, IntArray]:
        """Quotient and remainder of (received * p + shift) / q at each node; q fits in 30 bits.

        Args:
            node: The nodes.
            received: Samples that each has received.
            shift: Added to received * p.
            is_long: Whether any node may have received _DIRECT_LIMIT samples or more.
        """
        total, minor = self._total[node], self._minor[node]
        if is_long:
            # received * minor could overflow int64: whole cycles of q samples contribute exactly p each.
            cycles = received // total
            start = (received - cycles * total) * minor + shift
            k = start // total
            return k + cycles * minor, start - k * total
        start = received * minor + shift
        k = start // total
        return k, start - k * total

    def _to_minor(self, node: IntArray | slice, received: IntArray, is_long: bool) -> IntArray:
        """L(m) of each node: the number of its first m samples that went to its lighter child."""
        k, rest = self._divide(node, received, self._shift[node], is_long)
        # Thresholds 0 to k - 1 are passed, threshold k only if the remainder has reached it. A large carry would give
        # the child more samples than the node has received, or fewer than none: hence the bounds.
        passed = k + (self._threshold(node, k) <= rest)
        return np.asarray(np.minimum(np.maximum(passed, _ZERO), received))

    def _split(self, node: IntArray, received: IntArray, is_long: bool) -> tuple[IntArray, np.ndarray]:
        """L(m) of each node, and whether sample m itself goes to the lighter child: L(m + 1) > L(m)."""
        total, minor = self._total[node], self._minor[node]
        k, rest = self._divide(node, received, self._shift[node] + minor, is_long)
        # Thresholds keep p / 2 away from both ends, so a step passes at most one of them: threshold k, or threshold
        # k - 1 if the step has just crossed into the next cycle.
        wrapped = rest + rest < minor
        position = rest + total * wrapped
        threshold = self._threshold(node, k - wrapped)
        passed = threshold <= position
        after = k + (passed & ~wrapped)
        before = after - (passed & (threshold > position - minor))
        before = np.minimum(np.maximum(before, _ZERO), received)
        after = np.minimum(np.maximum(after, _ZERO), received + 1)
        return before, after > before

    def _threshold(self, node: IntArray | slice, k: IntArray) -> IntArray:
        """T_k of each node: uniform over an interval of length `_width` in the middle of its cycle."""
        return self._lowest[node] + self._drawn(self._key[node], k, self._width[node])

    @staticmethod
    def _drawn(key: UIntArray, k: IntArray, width: IntArray) -> IntArray:
        """The part of T_k that is drawn: uniform below `width`."""
        bits = random_bits(key, k) >> _UNUSED_BITS
        return np.asarray((bits.view(np.int64) * width) >> _HASH_BITS)


def ranges(first: IntArray, lengths: IntArray) -> IntArray:
    """Ranges of numbers, one after the other, by the first number and the length of each."""
    ends = lengths.cumsum()
    return np.asarray(np.arange(int(ends[-1])) + (first - ends + lengths).repeat(lengths))
