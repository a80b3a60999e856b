"""Length of a run, as far as it is known before the last mix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dmagent_loader.mixture.simplex import FloatArray, IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class RunLength:
    """The facts that bound the length of a run.

    Shapes: D domains.

    Args:
        rows: (D,), rows of each domain.
        repeats: (D,), whether the rows of a domain are read again when they are used up.
        limit: Samples, over all ranks, at which the trainer stops; None: no limit is known.
        ending: Domain numbers of each field that ends the run when it is used up.
        interval: Samples, over all ranks, between two decisions; None: unknown.
    """

    rows: IntArray
    repeats: np.ndarray
    limit: int | None
    ending: tuple[tuple[int, ...], ...]
    interval: int | None = None

    def samples(self, mix: FloatArray) -> float | None:
        """Samples of a run with one mix, over all ranks; None: unknown.

        Args:
            mix: (D,), sums to 1.
        """
        ends = [] if self.limit is None else [float(self.limit)]
        for members in self.ending:
            weight = float(mix[list(members)].sum())
            if weight > 0:
                ends.append(float(self.rows[list(members)].sum()) / weight)
        return min(ends, default=None)
