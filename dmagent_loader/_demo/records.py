"""The plain data that reports are made from: what was trained on, and how the model scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict


class MixStep(TypedDict):
    """One stretch of a run with a constant mix; plain JSON."""

    start: float
    """Where it begins, in the unit of the chart's x axis (samples, tokens)."""
    stop: float
    mix: Mapping[str, float]
    """Domain -> weight; sums to 1."""


class FeedbackPoint(TypedDict):
    """The feedback of one evaluation; plain JSON."""

    at: float
    """How far the run was, in the unit of the chart's x axis."""
    feedback: Mapping[str, float]
    """Field of the environment -> mean log-probability per answer token, in nats."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a chart shows of one run.

    Args:
        name: As readers should see it.
        mix: In order of training.
        feedback: In order of training; the first is the base model's.
    """

    name: str
    mix: Sequence[MixStep]
    feedback: Sequence[FeedbackPoint]
