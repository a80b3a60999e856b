"""Mixes that depend on the step alone."""

from __future__ import annotations

import numpy as np

from dmagent_loader._validation import is_finite_number, shown, whole_number
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
        ConfigurationError: `steps` is not a whole number of at least 1.
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
        steps = whole_number("steps", steps, least=1)
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


class TwoPhaseSchedule:
    """Keeps one mix for the first part of a run and another for the rest, such as a mid-training phase.

    Args:
        first: Mix of the first phase, in one of the forms of `StaticPolicy`.
        second: Mix of the second phase, in the same forms.
        steps: Number of reweighting steps of the run.
        switch: Part of the steps in the first phase; Marin's runs (github.com/marin-community/marin) have 0.8.
        name: See `policies.base.Policy`.

    Raises:
        ConfigurationError: `steps` or `switch` is not a number, or leaves a phase without a step.
        MixError: `first` or `second` is not a distribution.

    Example:
        >>> policy = TwoPhaseSchedule({"source/web": 1.0}, {"target/math": 1.0}, steps=10)
        >>> domains = ("source/web", "target/math")
        >>> history = History(domains=domains, fields=("x",), mixes=np.full((8, 2), 0.5), feedback=np.zeros((8, 1)))
        >>> policy.propose(history).tolist()  # the last of 8 steps
        [1.0, 0.0]
    """

    always_answers = True

    def __init__(
        self, first: Weights, second: Weights, steps: int, *, switch: float = 0.8, name: str = "two-phase"
    ) -> None:
        steps = whole_number("steps", steps, least=1)
        if not is_finite_number(switch):
            raise ConfigurationError(f"switch is {shown(switch)}; it must be a number between 0 and 1")
        self._first_steps = round(switch * steps)
        if not 0 < self._first_steps < steps:
            raise ConfigurationError(
                f"of {steps} steps, switch={switch:g} gives {self._first_steps} to the first phase: each phase needs a "
                "step"
            )
        self.name = name
        self._first, self._second = checked(first), checked(second)

    def propose(self, history: History) -> FloatArray:
        """The mix of step `len(history)`.

        Raises:
            DomainError, MixError: See `StaticPolicy.propose`.
        """
        # Both, so that a mistake in the second mix does not wait for the second phase.
        first, second = validate_mix(self._first, history.domains), validate_mix(self._second, history.domains)
        return first if len(history) <= self._first_steps else second
