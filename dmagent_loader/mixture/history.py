"""The history that a policy sees, of mixes and the feedback after each, and the standardisation of feedback.

Shapes: T steps so far, D domains, K fields of the environment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dmagent_loader.errors import ConfigurationError, FeedbackError
from dmagent_loader.mixture.simplex import FloatArray

Standardization = Literal["frozen", "running", "anchored"]
STANDARDIZATIONS: tuple[Standardization, ...] = ("frozen", "running", "anchored")


@dataclass(frozen=True, kw_only=True)
class History:
    """The mixes of all reweighting steps so far and the feedback after each (state s_t of the paper, section 2).

    Row 0 is the start state: the mix of the base model's own training data, and the base model's feedback. Row i is the
    mix trained on in step i, and the feedback measured after it. A policy proposes the mix of step T.

    Args:
        domains: D domain names.
        fields: K names of the environment's fields, in the order of the feedback columns. An agent keeps the first
            (general) and acquires the second (math, code).
        mixes: (T, D), rows sum to 1.
        feedback: (T, K), mean log-probability per answer token, in nats.
    """

    domains: tuple[str, ...]
    fields: tuple[str, ...]
    mixes: FloatArray
    feedback: FloatArray

    def __post_init__(self) -> None:
        mixes, feedback = np.asarray(self.mixes, dtype=np.float64), np.asarray(self.feedback, dtype=np.float64)
        if mixes.ndim != 2 or mixes.shape[1] != len(self.domains):
            raise ConfigurationError(f"mixes have shape {mixes.shape}; expected (steps, {len(self.domains)})")
        if feedback.shape != (len(mixes), len(self.fields)):
            raise ConfigurationError(
                f"feedback has shape {feedback.shape}; expected ({len(mixes)}, {len(self.fields)}): one row for "
                "each mix"
            )
        object.__setattr__(self, "mixes", mixes)
        object.__setattr__(self, "feedback", feedback)

    def __len__(self) -> int:
        return len(self.mixes)

    def extended(self, mix: FloatArray, feedback: FloatArray) -> History:
        """This history with one more step."""
        return History(
            domains=self.domains,
            fields=self.fields,
            mixes=np.vstack([self.mixes, mix[None]]),
            feedback=np.vstack([self.feedback, feedback[None]]),
        )


def validate_feedback(feedback: Mapping[str, float], fields: Sequence[str]) -> FloatArray:
    """Feedback as a vector in the order of `fields`.

    Raises:
        FeedbackError: A field is missing or unknown, or a value is not finite.
    """
    missing = [f for f in fields if f not in feedback]
    unknown = [f for f in feedback if f not in fields]
    if missing or unknown:
        raise FeedbackError(
            f"the feedback has fields {list(feedback)}, but this run's fields are {list(fields)}: "
            "evaluate the same question sets at every step"
        )
    try:
        values = np.array([float(feedback[f]) for f in fields], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise FeedbackError(f"the feedback holds a value that is not a number: {dict(feedback)}") from error
    if not np.isfinite(values).all():
        bad = {f: float(v) for f, v in zip(fields, values, strict=True) if not np.isfinite(v)}
        raise FeedbackError(
            f"the feedback is not finite: {bad}; the mix was left unchanged. The model has probably diverged: check "
            "its loss"
        )
    return values


@dataclass(frozen=True, kw_only=True)
class FeedbackStatistics:
    """Mean and standard deviation of each field's feedback over all steps of all training trajectories (paper, C.3).

    Args:
        mean: K numbers.
        std: K positive numbers.
        count: Number of feedback values that they summarise.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ConfigurationError(f"{len(self.mean)} means but {len(self.std)} standard deviations")
        if not all(np.isfinite(self.mean)) or not all(np.isfinite(s) and s > 0 for s in self.std):
            raise ConfigurationError(f"feedback statistics must be finite with positive std, got {self}")

    @classmethod
    def of(cls, feedback: FloatArray) -> FeedbackStatistics:
        """Statistics of recorded feedback, (N, K)."""
        return cls(
            mean=tuple(float(x) for x in feedback.mean(axis=0)),
            std=tuple(float(x) for x in feedback.std(axis=0)),
            count=len(feedback),
        )


def standardize(
    feedback: FloatArray,
    statistics: FeedbackStatistics,
    mode: Standardization,
    *,
    prior_weight: float = 10.0,
) -> FloatArray:
    """Standardises one run's feedback for the agent.

    ``frozen`` uses the statistics of the training trajectories (paper, C.3). The feedback of an unseen model has a
    different range, so there are two more modes (extensions, not in the paper). ``running`` uses the mean and spread of
    the run so far. ``anchored`` puts the first feedback of the run at 0 and scales by the training spread, updated with
    the spread of the run: variance_t = (n0 s_train^2 + SS_t) / (n0 + t), SS_t = sum of squared deviations from the
    anchor.

    Row t uses only rows up to t, so an earlier step never looks different later.

    Args:
        feedback: (T, K).
        statistics: Statistics of the training trajectories.
        mode: ``"frozen"``, ``"running"`` or ``"anchored"``.
        prior_weight: n0, the number of observations that the training spread counts for.

    Returns:
        (T, K).
    """
    mean, std = np.array(statistics.mean), np.array(statistics.std)
    if feedback.shape[1:] != mean.shape:
        raise ConfigurationError(f"feedback has shape {feedback.shape}, but the statistics are for {len(mean)} fields")
    if mode == "frozen":
        return np.asarray((feedback - mean) / std, dtype=np.float64)
    if mode not in STANDARDIZATIONS:
        raise ConfigurationError(f"unknown standardization {mode!r}; choose one of {', '.join(STANDARDIZATIONS)}")
    steps = np.arange(len(feedback), dtype=np.float64)[:, None]
    if mode == "anchored":
        center = np.broadcast_to(feedback[:1], feedback.shape)
        squares = np.cumsum((feedback - center) ** 2, axis=0)
        variance = (prior_weight * std**2 + squares) / (prior_weight + steps)
    else:
        center = np.cumsum(feedback, axis=0) / (steps + 1)
        squares = np.cumsum(feedback**2, axis=0) - (steps + 1) * center**2
        variance = (std**2 + np.maximum(squares, 0.0)) / (steps + 1)
    return np.asarray((feedback - center) / np.sqrt(variance), dtype=np.float64)
