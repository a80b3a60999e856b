"""The training rows of a trajectory: a pure function of (corpus, mixes, seed, stream number, step).

A stream has no state to save, and two machines read the same rows of a trajectory. `TrajectoryStream` is for mixes that
are known in advance, `MixStream` for mixes that are decided step by step.

Shapes: D = 52 domains, R rows of a step, L tokens of a row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import FIELDS, NUM_CANONICAL, NUM_TOPICS
from dmagent_loader.mixture.simplex import FloatArray, IntArray
from dmagent_loader.training.data.corpus import Corpus


def deliverable(mix: FloatArray, available: IntArray) -> FloatArray:
    """Moves the weight of empty domains to other domains of their field.

    The other domains receive it in proportion to their weights, or to their data if these weights are 0.

    Args:
        mix: (52,), sums to 1.
        available: (52,), number of rows of each domain.

    Returns:
        (52,), sums to 1.

    Raises:
        ConfigurationError: A field with weight has no data.
    """
    result = np.where(available > 0, mix, 0.0)
    for number, name in enumerate(FIELDS):
        part = slice(number * NUM_TOPICS, (number + 1) * NUM_TOPICS)
        mass = float(mix[part].sum())
        shares = result[part] if result[part].sum() > 0 else available[part].astype(np.float64)
        if mass > 0 and shares.sum() == 0:
            raise ConfigurationError(
                f"the mix gives {mass:.3g} to field {name!r}, whose domains hold no full row: add text or choose "
                "shorter rows"
            )
        if mass > 0:
            result[part] = mass * shares / shares.sum()
    return result


class MixStream:
    """Rows of tokens for one mix after another, as in a closed loop.

    The row counts of a step follow its mix by systematic sampling: the count of a domain is its share rounded up or
    down, with the right expectation even for shares far below one row. Rows of a domain are read without replacement in
    a seeded order, which is repeated when the domain is used up. Streams with the same seed and number have the same
    orders whatever their mixes, so two policies that are compared read the same rows of a domain first.

    Args:
        corpus: Tokens of the 52 domains.
        rows_per_step: R.
        row_tokens: L; a row has one more token, the last to be predicted.
        seed: Seed of all streams.
        number: Number of the stream; streams of different numbers have different orders.
    """

    def __init__(self, corpus: Corpus, *, rows_per_step: int, row_tokens: int, seed: int, number: int) -> None:
        self._rows = _Rows(corpus, rows_per_step, row_tokens, seed, number)
        self._step = 0
        self._taken = np.zeros(NUM_CANONICAL, dtype=np.int64)

    def next(self, mix: FloatArray) -> npt.NDArray[np.int64]:
        """Tokens of the next step under a mix: (52,) -> (R, L + 1)."""
        taken = self._taken.copy()
        return self._rows.tokens(self.skip(mix), taken)

    def skip(self, mix: FloatArray) -> IntArray:
        """Skips a step that was trained on before a run was resumed; returns the domain of each of its rows: (R,)."""
        self._step += 1
        domains = self._rows.domains(mix, self._step)
        self._taken += np.bincount(domains, minlength=NUM_CANONICAL)
        return domains


class TrajectoryStream:
    """Rows of tokens along the mixes of one trajectory; steps can be read in any order. See `MixStream`.

    Args:
        corpus: Tokens of the 52 domains.
        mixes: (steps + 1, 52); row 0, the start state, is not trained on.
        rows_per_step: R.
        row_tokens: L; a row has one more token, the last to be predicted.
        seed: Seed of all streams.
        number: Number of the stream; streams of different numbers have different orders.
    """

    def __init__(
        self, corpus: Corpus, mixes: FloatArray, *, rows_per_step: int, row_tokens: int, seed: int, number: int
    ) -> None:
        self._rows = _Rows(corpus, rows_per_step, row_tokens, seed, number)
        self._domains = np.zeros((len(mixes), rows_per_step), dtype=np.int64)
        for step in range(1, len(mixes)):
            self._domains[step] = self._rows.domains(mixes[step], step)

    def domains(self, step: int) -> IntArray:
        """Domain of each row of a step, with steps counted from 1: (R,)."""
        domains: IntArray = self._domains[step]
        return domains

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """Tokens of a step, with steps counted from 1: (R, L + 1)."""
        taken = np.bincount(self._domains[1:step].ravel(), minlength=NUM_CANONICAL)
        return self._rows.tokens(self._domains[step], taken)


class _Rows:
    """Common part of both streams: the domains of a step's rows, and the tokens of each domain's n-th row."""

    def __init__(self, corpus: Corpus, rows_per_step: int, row_tokens: int, seed: int, number: int) -> None:
        self._corpus = corpus
        self._rows_per_step, self._row_tokens = rows_per_step, row_tokens
        self._key = (seed, number)
        self._available = np.maximum(corpus.num_tokens - 1, 0) // row_tokens
        self._orders: dict[int, IntArray] = {}

    def domains(self, mix: FloatArray, step: int) -> IntArray:
        """Domain of each row of a step under a mix: (R,)."""
        rng = np.random.default_rng([*self._key, step])
        edges = np.cumsum(deliverable(mix, self._available))
        points = (np.arange(self._rows_per_step) + rng.random()) / self._rows_per_step * edges[-1]
        return np.asarray(rng.permutation(np.searchsorted(edges, points, side="right")), dtype=np.int64)

    def tokens(self, domains: IntArray, taken: IntArray) -> npt.NDArray[np.int64]:
        """Tokens of the next rows of some domains.

        Args:
            domains: (R,), domain of each row.
            taken: (52,), number of rows of each domain that were read before.

        Returns:
            (R, L + 1).
        """
        starts = np.zeros(len(domains), dtype=np.int64)
        for d in np.unique(domains):
            here = domains == d
            order = self._order(int(d))
            blocks = order[(taken[d] + np.arange(here.sum())) % len(order)]
            starts[here] = self._corpus.bounds[d] + blocks * self._row_tokens
        return np.asarray(self._corpus.tokens[starts[:, None] + np.arange(self._row_tokens + 1)], dtype=np.int64)

    def _order(self, domain: int) -> IntArray:
        if domain not in self._orders:
            rng = np.random.default_rng([*self._key, domain, 0])
            self._orders[domain] = rng.permutation(self._available[domain])
        return self._orders[domain]
