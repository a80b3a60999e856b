"""One run of a task under a policy, and its reward.

Shapes: T steps, D domains, K = 2 fields of questions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.influence import Influence
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies import INFLUENCE, LENGTH, LOSSES, QUESTIONS, InformedPolicy, Policy, name_of
from dmagent_loader.training.tasks.simulator import Simulator, Start
from dmagent_loader.training.tasks.spec import Perturbation, TaskSpec

MOST_REQUESTS = 16
"""Requests for evidence before one decision."""
MOST_MEASUREMENTS = 1
"""Measurements of influence that a policy gets: integrations do not repeat one in a run that costs as little."""
RANGE_SHARES = (0.0, 0.3, 1.0)
"""Target shares of the natural mixes that show what is attainable in a task."""
RANGE_STREAM = 900
"""Stream of these runs."""
LEAST_RANGE = 0.02
"""Smallest attainable range of a field, in nats: below it, differences are noise of the questions."""

Measure = Callable[[int], Influence]
"""The measurement of influence that follows a number of others."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """A finished run.

    Attributes:
        mixes: (T + 1, D), as the policy asked for them; row 0 is the mix of the base model.
        feedback: (T + 1, K), in nats; NaN where it was not read.
        gains: (K,), of questions that no policy reads, in nats.
        influence: Mean of the measurements that the policy asked for; None: it asked for none.
        seconds: Duration of training and feedback, without the measurements.
    """

    mixes: FloatArray
    feedback: FloatArray
    gains: FloatArray
    influence: Influence | None
    seconds: float


def run_episode(
    simulator: Simulator,
    spec: TaskSpec,
    stream: int,
    choose: Callable[[Start], FloatArray | Policy],
    *,
    measure: Measure | None = None,
    feedback_every: int = 1,
    frozen_feedback: bool = False,
) -> Episode:
    """Runs a task to its end.

    Args:
        simulator: Simulator.
        spec: The task.
        stream: Number of the repetition.
        choose: Function from the start to a mix for all steps, (D,), to one for each, (T, D), or to a policy.
        measure: Source of influence; None: the simulator.
        feedback_every: Steps between two feedbacks; a policy, which is shown every row of the history, needs 1.
        frozen_feedback: Whether the policy is shown the first feedback at every step (an ablation).
    """
    start = simulator.reset(spec, stream)
    chosen = choose(start)
    if isinstance(chosen, np.ndarray):
        policy, path = None, np.broadcast_to(chosen, (spec.steps, len(start.natural)))
    else:
        policy, path = chosen, np.zeros((spec.steps, len(start.natural)))
    evidence = _Evidence(start, measure or simulator.influence, simulator)
    mixes, feedback = [start.mix], [start.feedback]
    seconds = 0.0
    for step in range(spec.steps):
        if policy is None:
            mix = path[step]
        else:
            evidence.inform(policy, step)
            shown = feedback[:1] * len(feedback) if frozen_feedback else feedback
            history = History(
                domains=start.space.names, fields=start.fields, mixes=np.array(mixes), feedback=np.array(shown)
            )
            mix = np.asarray(policy.propose(history), dtype=np.float64)
        started = time.perf_counter()
        is_read = policy is not None or (step + 1) % feedback_every == 0 or step + 1 == spec.steps
        mixes.append(mix)
        feedback.append(simulator.step(mix, feedback=is_read))
        seconds += time.perf_counter() - started
    return Episode(
        mixes=np.array(mixes),
        feedback=np.array(feedback),
        gains=simulator.finish(),
        influence=evidence.influence,
        seconds=seconds,
    )


class _Evidence:
    """Evidence for informed policies, see `policies.informed`."""

    def __init__(self, start: Start, measure: Measure, simulator: Simulator) -> None:
        self._start, self._measure, self._simulator = start, measure, simulator
        self._measured: list[Influence] = []

    @property
    def influence(self) -> Influence | None:
        return self._measured[0].averaged(self._measured[1:]) if self._measured else None

    def inform(self, policy: Policy, decision: int) -> None:
        if not isinstance(policy, InformedPolicy):
            return
        for _ in range(MOST_REQUESTS):
            needs = policy.needed(decision)
            if not needs:
                return
            for need in sorted(needs):
                policy.inform(need, self._of(need, policy))
        raise ConfigurationError(
            f"policy {name_of(policy)!r} still needs {sorted(needs)} after {MOST_REQUESTS} requests for one decision"
        )

    def _of(self, need: str, policy: Policy) -> object:
        if need == INFLUENCE:
            if len(self._measured) == MOST_MEASUREMENTS:
                return None
            self._measured.append(self._measure(len(self._measured)))
            return self._measured[-1]
        if need == LENGTH:
            return self._start.length
        if need == LOSSES:
            return self._simulator.losses()
        if need == QUESTIONS:
            return self._start.questions
        raise ConfigurationError(f"policy {name_of(policy)!r} needs {need!r}, which tasks do not provide")


def range_task(spec: TaskSpec) -> TaskSpec:
    """The task whose natural mixes show what is attainable: without the perturbation and with all target rows.

    A bad base model stays: it is the model that the run starts from.
    """
    return replace(spec, perturbation=Perturbation(), target_passes=None)


def range_gains(simulator: Simulator, spec: TaskSpec, share: float) -> FloatArray:
    """Gains of the natural mix with one of the target shares `RANGE_SHARES` in the `range_task`, in nats: (K,)."""
    return run_episode(
        simulator, range_task(spec), RANGE_STREAM, lambda start: start.at(share), feedback_every=spec.steps
    ).gains


def attainable(gains: Sequence[FloatArray]) -> FloatArray:
    """Attainable range of each field in a task: largest minus smallest gain of some static runs, in nats, (K,).

    The base model counts, too, with a gain of 0: all static runs from a bad one gain about as much.

    Args:
        gains: (K,) each, see `range_gains`.
    """
    stacked = np.vstack([*gains, np.zeros(2)])
    return np.asarray(np.maximum(stacked.max(axis=0) - stacked.min(axis=0), LEAST_RANGE), dtype=np.float64)


def reward(gains: FloatArray, ranges: FloatArray, balance: float) -> float:
    """Weighted mean over the fields of the gain as a part of the attainable range.

    Args:
        gains: (2,), keep and acquire, in nats.
        ranges: (2,), see `attainable`.
        balance: Weight of the field to acquire.
    """
    return float(np.array([1.0 - balance, balance]) @ (gains / ranges))
