"""A mix that moves along a straight line."""

from __future__ import annotations

import numpy as np

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray, validate_mix
from dmagent_loader.policies.static import Weights, checked


class LinearSchedule:
    """Moves from one mix to another in equal parts, and stays there.

    Step t of the run (the first decision is t = 1, for the history then holds the start state only) gets
    start + (end - start) min(1, t / steps).

    Args:
        start: The mix at t = 0, usually that of the base model's own data; as in `StaticPolicy`.
        end: The mix from t = `steps` on.
        steps: Number of reweighting steps.
        name: See `policies.base.Policy`.

    Raises:
        ConfigurationError: `steps` is less than 1.
        MixError: `start` or `end` is no distribution.
    """

    always_answers = True

    def __init__(self, start: Weights, end: Weights, steps: int, *, name: str = "linear") -> None:
        if steps < 1:
            raise ConfigurationError(f"a schedule over {steps} steps is none: steps must be at least 1")
        self.name = name
        self._start, self._end, self._steps = checked(start), checked(end), steps

    def propose(self, history: History) -> FloatArray:
        """The mix of step `len(history)`; raises as `StaticPolicy.propose`."""
        start, end = validate_mix(self._start, history.domains), validate_mix(self._end, history.domains)
        part = min(1.0, len(history) / self._steps)
        return np.asarray((1.0 - part) * start + part * end, dtype=np.float64)
