"""The training rows of one trajectory: a pure function of (corpus, mixes, seed, trajectory, step).

Nothing needs to be saved to continue a stream, and two machines that are given the same trajectory read the same rows.

Shapes: D = 52 domains, R rows of a step, L tokens of a row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dmagent_loader.domains import CANONICAL_TOPICS, FIELDS
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.pipeline.corpus import Corpus
from dmagent_loader.simplex import FloatArray, IntArray

NUM_TOPICS = len(CANONICAL_TOPICS)


def deliverable(mix: FloatArray, available: IntArray) -> FloatArray:
    """The mix with the weight of empty domains moved inside their field.

    It goes to the field's other domains in proportion to their own weights, or, where those are 0, to their data.

    Args:
        mix: (52,), sums to 1.
        available: (52,) rows of each domain.

    Returns:
        (52,), sums to 1.

    Raises:
        ConfigurationError: A field that has weight has no data at all.
    """
    result = np.where(available > 0, mix, 0.0)
    for number, name in enumerate(FIELDS):
        part = slice(number * NUM_TOPICS, (number + 1) * NUM_TOPICS)
        mass = float(mix[part].sum())
        shares = result[part] if result[part].sum() > 0 else available[part].astype(np.float64)
        if mass > 0 and shares.sum() == 0:
            raise ConfigurationError(f"the mix gives {mass:.3g} to field {name!r}, whose domains hold no full row")
        if mass > 0:
            result[part] = mass * shares / shares.sum()
    return result


class TrajectoryStream:
    """Rows of tokens along the mixes of one trajectory.

    In a step, row counts follow the mix by systematic sampling: each domain's count is its share rounded up or down,
    with the right expectation even for shares far below one row. Rows of a domain come without replacement in a seeded
    order of its own, and start over when it is used up.

    Args:
        corpus: Tokens of the 52 domains.
        mixes: (steps + 1, 52); row 0, the start state, is not trained on.
        rows_per_step: R.
        row_tokens: L; a row holds one token more, the last to be predicted.
        seed: Of all streams.
        number: Which trajectory this is; other numbers give other rows.
    """

    def __init__(
        self, corpus: Corpus, mixes: FloatArray, *, rows_per_step: int, row_tokens: int, seed: int, number: int
    ) -> None:
        self._corpus = corpus
        self._row_tokens = row_tokens
        available = np.maximum(corpus.num_tokens - 1, 0) // row_tokens
        self._domains = np.zeros((len(mixes), rows_per_step), dtype=np.int64)
        for step in range(1, len(mixes)):
            rng = np.random.default_rng([seed, number, step])
            edges = np.cumsum(deliverable(mixes[step], available))
            points = (np.arange(rows_per_step) + rng.random()) / rows_per_step * edges[-1]
            self._domains[step] = rng.permutation(np.searchsorted(edges, points, side="right"))
        self._orders = {
            int(d): np.random.default_rng([seed, number, int(d), 0]).permutation(available[d])
            for d in np.unique(self._domains[1:])
        }

    def domains(self, step: int) -> IntArray:
        """Domain of each row of a step, counted from 1: (R,)."""
        domains: IntArray = self._domains[step]
        return domains

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """Tokens of a step, counted from 1: (R, L + 1)."""
        starts = np.zeros(self._domains.shape[1], dtype=np.int64)
        for d in np.unique(self._domains[step]):
            here = self._domains[step] == d
            before = int((self._domains[1:step] == d).sum())
            order = self._orders[int(d)]
            blocks = order[(before + np.arange(here.sum())) % len(order)]
            starts[here] = self._corpus.bounds[d] + blocks * self._row_tokens
        return np.asarray(self._corpus.tokens[starts[:, None] + np.arange(self._row_tokens + 1)], dtype=np.int64)
