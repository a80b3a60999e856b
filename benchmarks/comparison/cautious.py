"""More cautious variants of the influence policy: ``--also benchmarks.comparison.cautious``.

They answer whether less trust in the scores avoids harm in the worst task, and what it costs in the others. All else is
as in ``"influence"``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from benchmarks.comparison.policies import Entry, TaskContext, natural
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies.influence import InfluencePolicy

HALF = "influence, half way to natural 30%"
VARIANTS: dict[str, dict[str, float]] = {
    "influence, boost at most 4": {"most_boost": 4.0},
    "influence, boost at most 2": {"most_boost": 2.0},
    "influence, temperature 2": {"temperature": 2.0},
}
"""Name -> settings. ``"influence"`` has a boost of at most 12, and temperature 1 on named domains, 0.5 on others."""


class HalfWay(InfluencePolicy):
    """The mean of the influence policy's mix and the natural mix with 30% target."""

    start: FloatArray

    def propose(self, history: History) -> FloatArray:
        """See `Policy.propose`."""
        return 0.5 * super().propose(history) + 0.5 * self.start


def variant(settings: dict[str, float], context: TaskContext) -> InfluencePolicy:
    """The policy with other settings."""
    return InfluencePolicy.configured(context.start.space, context.start.natural, **settings)


def half_way(context: TaskContext) -> InfluencePolicy:
    """See `HalfWay`."""
    policy = HalfWay.configured(context.start.space, context.start.natural)
    assert isinstance(policy, HalfWay)
    policy.start = natural(0.3, context)
    return policy


def entries() -> dict[str, Entry]:
    """The variants by name."""
    made: dict[str, Callable[[TaskContext], InfluencePolicy]] = {
        name: functools.partial(variant, settings) for name, settings in VARIANTS.items()
    }
    return {name: Entry(make=make, turn=6) for name, make in {**made, HALF: half_way}.items()}
