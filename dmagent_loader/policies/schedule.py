"""Mixes that depend on the step alone."""

from __future__ import annotations

import numpy as np

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray, validate_mix
from dmagent_loader.policies.static import Weights, checked


class LinearSchedule:
    """Moves linearly from one mix to another and stays there.

    Reweighting step t has the mix start + (end - start) min(1, t / steps). The first decision is t = 1: the history
    then holds only the start state.

    Args:
        start: Mix at t = 0, usually that of the base model's own data, in one of the forms of `StaticPolicy`.
        end: Mix from t = `steps` on, in the same forms.
        steps: Number of reweighting steps.
        name: See `policies.base.Policy`.

    Raises:
        ConfigurationError: `steps` is less than 1.
        MixError: `start` or `end` is not a distribution.

    Example:
        >>> policy = LinearSchedule({"source/web": 1.0}, {"source/web": 0.2, "target/math": 0.8}, steps=4)
        >>> domains = ("source/web", "target/math")
        >>> start = History(
        ...     domains=domains, fields=("general",), mixes=np.array([[1.0, 0.0]]), feedback=np.array([[-3.0]])
        ... )
        >>> policy.propose(start).round(3).tolist()
        [0.8, 0.2]
    """

    always_answers = True

    def __init__(self, start: Weights, end: Weights, steps: int, *, name: str = "linear") -> None:
        if steps < 1:
            raise ConfigurationError(f"a schedule over {steps} steps never moves: steps must be at least 1")
        self.name = name
        self._start, self._end, self._steps = checked(start), checked(end), steps

    def propose(self, history: History) -> FloatArray:
        """The mix of step `len(history)`.

        Raises:
            DomainError, MixError: See `StaticPolicy.propose`.
        """
        start, end = validate_mix(self._start, history.domains), validate_mix(self._end, history.domains)
        part = min(1.0, len(history) / self._steps)
        return np.asarray((1.0 - part) * start + part * end, dtype=np.float64)
