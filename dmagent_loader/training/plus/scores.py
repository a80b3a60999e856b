"""Scores of a network on surrogate tasks, against the influence policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dmagent_loader.agent.plus.network import PlusNetwork
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.plus.evolution import Judged


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Advantages over the influence policy on tasks of one split: reward as a share of the attainable range.

    Args:
        advantages: One for each task.
        kinds: Perturbation of each task.
    """

    advantages: FloatArray
    kinds: tuple[str, ...]

    def mean(self, kind: str | None = None) -> float:
        """Mean over all tasks, or over those of one perturbation."""
        chosen = np.array([kind in (None, own) for own in self.kinds])
        return float(self.advantages[chosen].mean()) if chosen.any() else float("nan")


def score(network: PlusNetwork, batches: Sequence[Judged]) -> Scores:
    """Advantages of a network over the influence policy."""
    decide = network.in_float32().mix
    found = np.concatenate([batch.advantages(decide, number) for number, batch in enumerate(batches)])
    return Scores(advantages=found, kinds=tuple(kind for batch in batches for kind in batch.tasks.kinds))
