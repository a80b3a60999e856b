"""The plain data behind reports: the mixes trained on, and the scores of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict


class MixStep(TypedDict):
    """One stretch of a run with a constant mix; plain JSON."""

    start: float
    """Beginning of the stretch, in the unit of the chart's x axis (samples, tokens)."""
    stop: float
    mix: Mapping[str, float]
    """Domain -> weight; sums to 1."""


class FeedbackPoint(TypedDict):
    """The feedback of one evaluation; plain JSON."""

    at: float
    """Progress of the run, in the unit of the chart's x axis."""
    feedback: Mapping[str, float]
    """Field of the environment -> mean log-probability per answer token, in nats."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The data of one run in a chart.

    Args:
        name: Name for readers.
        mix: Mixes in order of training.
        feedback: Feedback in order of training; the first is that of the base model.
    """

    name: str
    mix: Sequence[MixStep]
    feedback: Sequence[FeedbackPoint]
