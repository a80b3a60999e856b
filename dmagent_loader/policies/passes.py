"""Limit on the passes that a mix makes over the rows of each domain.

    weight_d samples <= most_passes rows_d        samples: length of the run under the mix

It concerns domains whose rows repeat; the others are read once at most (`mixture.plan.exhaustion_rules`). Weight above
the limit goes to the rest of the domain's field, which keeps its share. A field too small for its share has all of its
rows read equally often, with a warning.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dmagent_loader._validation import is_finite_number, shown
from dmagent_loader.errors import ConfigurationError, PolicyError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.length import RunLength
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies.guard import project_to_bounds
from dmagent_loader.policies.informed import LENGTH

logger = logging.getLogger(__name__)

MOST_PASSES = 4.0
"""Up to four epochs of repeated data cost almost nothing against new data (arXiv 2305.16264)."""


class PassLimit:
    """The limit, and the length of the run that it is enforced from.

    Args:
        space: Domains of the run.
        most_passes: Largest number of passes over the rows of a domain in the whole run; None: no limit.

    Attributes:
        length: Length of the run; None: unknown.

    Raises:
        ConfigurationError: `most_passes` is not a positive number.
    """

    def __init__(self, space: DomainSpace, most_passes: float | None) -> None:
        if most_passes is not None and (not is_finite_number(most_passes) or most_passes <= 0):
            raise ConfigurationError(
                f"most_passes is {shown(most_passes)}; it must be a positive number, or None for no limit"
            )
        self._space, self._most = space, most_passes
        self.length: RunLength | None = None
        self._asked = self._informed = -1
        self._reported: set[str] = set()

    def needed(self, decision: int) -> frozenset[str]:
        """The length of the run, before each decision: it becomes known with the loader and with the mix."""
        self._asked = decision
        return frozenset() if self._most is None or self._informed == decision else frozenset({LENGTH})

    def inform(self, length: Any) -> None:
        """Takes the length of the run.

        Raises:
            PolicyError: The evidence is of another kind.
        """
        if length is not None and not isinstance(length, RunLength):
            raise PolicyError(f"the length of the run is {shown(length)}; pass the sampler's run_length")
        self.length, self._informed = length, self._asked

    def ceilings(self, mix: FloatArray) -> FloatArray | None:
        """Largest weight of each domain in a run as long as one with a mix: (D,); None: the length is unknown.

        Args:
            mix: (D,), sums to 1. It may decide when the data end, and thus how long the run is.
        """
        most, length = self._most, self.length
        if most is None or length is None:
            return None
        samples = length.samples(mix)
        if samples is None:
            self._report("length", logging.INFO, f"most_passes={most:g} limits nothing: the run has no known end")
            return None
        return np.where(length.repeats, np.minimum(1.0, most * length.rows / samples), 1.0)

    def limited(self, mix: FloatArray) -> FloatArray:
        """The mix nearest to a proposed one that respects the limit, with the same weight of each field.

        Args:
            mix: (D,), sums to 1.

        Returns:
            (D,), sums to 1; `mix` itself if the length of the run is unknown.
        """
        ceilings = self.ceilings(mix)
        if self._most is None or self.length is None or ceilings is None:
            return mix
        samples, rows = self.length.samples(mix), self.length.rows
        assert samples is not None
        result = np.array(mix)
        for name in self._space.fields:
            members = list(self._space.members(name))
            share = float(mix[members].sum())
            if (mix[members] <= ceilings[members]).all():
                continue
            if ceilings[members].sum() > share:
                high = ceilings[members] / share
                result[members] = share * project_to_bounds(mix[members] / share, np.zeros(len(members)), high)
                continue
            total = int(rows[members].sum())
            result[members] = share * rows[members] / total
            self._report(
                name,
                logging.WARNING,
                f"a run of {samples:.0f} samples with {share:.0%} of field {name!r} makes "
                f"{share * samples / total:.1f} passes over its {total} rows, more than most_passes={self._most:g}, so "
                "its domains get the natural mix: add rows, lower the weight of the field (balance=, target_share=), "
                "or train for fewer steps",
            )
        return result

    def _report(self, key: str, level: int, text: str) -> None:
        if key not in self._reported:
            self._reported.add(key)
            logger.log(level, text)


@runtime_checkable
class PassLimitedPolicy(Protocol):
    """A policy that limits passes; a combination sets other weights of the fields, so it enforces the limit itself.

    Attributes:
        passes: The limit.
    """

    passes: PassLimit

    def unlimited(self, history: History) -> FloatArray:
        """The mix before the limit: (D,), sums to 1."""
        ...
