"""The history and the forecast of one run, from its saved state: no shards, no model.

Shapes: D domains, K fields of the environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from dmagent_loader._report.records import FeedbackPoint, MixStep, RunRecord
from dmagent_loader._report.selection import Groups
from dmagent_loader._run.state import RestoredState, rebuild_state
from dmagent_loader._validation import shown
from dmagent_loader.errors import StateError
from dmagent_loader.mixture.influence import Influence
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.mixture.simplex import FloatArray, IntArray
from dmagent_loader.policies.influence import measured_influence


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The end of the run if the present mix stays.

    Attributes:
        end: Global sample index at which the data end the run, after its last whole step; None: they never do.
        used_up: Domains that are used up there.
        fails: Whether the run ends with an error there, because a domain with rule ``error`` is used up.
        stop: Samples at which the trainer stops by its own count of steps; None: unknown.
        runs_out: (D,) global sample index at which each domain runs out; -1: it does not before the end.
    """

    end: int | None
    used_up: tuple[str, ...]
    fails: bool
    stop: int | None
    runs_out: IntArray

    @property
    def last_sample(self) -> int | None:
        """Whichever comes first: the end of the data or the trainer's last step."""
        known = [sample for sample in (self.end, self.stop) if sample is not None]
        return min(known, default=None)


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """Everything that a report about one run shows.

    Attributes:
        name: Name of the run for readers.
        policy: Name of the policy; None: mixes changed by hand only.
        samples_per_reweight: Samples between two decisions; None: not derived from the length of the run yet.
        run: The checked state.
        counts: (D,) samples trained on.
        forecast: End of the run.
        influence: Mean of the influence measured during the run; None: the policy measured none.
    """

    name: str
    policy: str | None
    samples_per_reweight: int | None
    run: RestoredState
    counts: IntArray
    forecast: Forecast
    influence: Influence | None = None

    @property
    def plan(self) -> Plan:
        """The plan of the run."""
        return self.run.plan

    @property
    def consumed(self) -> int:
        """Samples trained on."""
        return self.run.consumed

    @cached_property
    def passes(self) -> FloatArray:
        """(D,) how often the rows of each domain were trained on."""
        return np.asarray(self.counts / self.plan.num_rows, dtype=np.float64)

    @cached_property
    def rows_left(self) -> IntArray:
        """(D,) rows that the present pass over each domain has not reached; 0 for a domain that is used up."""
        left = self.plan.rows_left(self.consumed)
        repeats = np.array([rule == "repeat" for rule in self.plan.rules])
        return np.where(repeats & (left == 0), self.plan.num_rows, left)

    @cached_property
    def mix_now(self) -> FloatArray:
        """(D,) mix from which the next sample is drawn; all 0 after the end of the data."""
        return self.plan.mix_at(self.consumed)

    @property
    def next_decision(self) -> int | None:
        """Samples after which the next decision is due; None: unknown, or there is no policy."""
        done, interval = self.run.measurements, self.samples_per_reweight
        if self.policy is None:
            return None
        if not done:
            return 0
        return None if interval is None else (done[-1].consumed // interval + 1) * interval

    @cached_property
    def stretches(self) -> tuple[IntArray, FloatArray]:
        """Stretches of training with a constant mix: (S + 1,) edges in samples, and (S, D) mixes."""
        starts = {entry.start for entry in self.plan.ledger} | {index for index, _ in self.plan.changes()}
        begins = sorted(start for start in starts if start < self.consumed)
        mixes = np.array([self.plan.mix_at(start) for start in begins]).reshape(len(begins), len(self.plan.space))
        return np.array([*begins, self.consumed], dtype=np.int64), mixes

    def record(self, groups: Groups, name: str) -> RunRecord:
        """The data of the charts, with the domains of each group summed; the x axis counts samples."""
        edges, mixes = self.stretches
        summed = np.array([mixes[:, list(members)].sum(axis=1) for _, members in groups]).T
        names = [domain.name for domain, _ in groups]
        steps: list[MixStep] = [
            {"start": start, "stop": stop, "mix": dict(zip(names, row, strict=True))}
            for (start, stop), row in zip(pairwise(edges.tolist()), summed.tolist(), strict=True)
        ]
        feedback: list[FeedbackPoint] = [
            {"at": measurement.consumed, "feedback": measurement.feedback} for measurement in self.run.measurements
        ]
        return RunRecord(name=name, mix=steps, feedback=feedback)


def read_history(
    state: Mapping[str, Any], *, name: str, last_sample: int | None = None, samples_per_step: int | None = None
) -> RunHistory:
    """The history of a run from its saved state.

    Args:
        state: State of a sampler, as JSON values.
        name: Name of the run for readers.
        last_sample: Samples at which the trainer stops; None: unknown.
        samples_per_step: Samples of a step over all ranks; None: unknown.

    Raises:
        StateError: The state is damaged.
    """
    run = rebuild_state(state)
    policy = state["policy"]
    if not (policy is None or isinstance(policy, str)):
        raise StateError(f"the state's policy is {shown(policy)}, not a name: it is damaged; load an older one")
    return RunHistory(
        name=name,
        policy=policy,
        samples_per_reweight=run.samples_per_reweight,
        run=run,
        counts=run.plan.counts(run.consumed),
        forecast=_forecast(run, last_sample, samples_per_step or 1),
        influence=measured_influence(run.policy_state),
    )


def _forecast(run: RestoredState, stop: int | None, step: int) -> Forecast:
    plan, consumed = run.plan, run.consumed
    end, failure = plan.end, plan.failure
    first: dict[str, int] = {}
    for index, names in plan.changes():
        for name in names:
            first.setdefault(name, index)
    runs_out = np.array([first.get(name, -1) for name in plan.space.names], dtype=np.int64)
    last = failure[0] if failure is not None else end
    used_up = failure[1] if failure is not None else () if end is None else plan.used_up_at(end)
    if failure is None and last is not None:
        last = consumed + (last - consumed) // step * step
    return Forecast(end=last, used_up=used_up, fails=failure is not None, stop=stop, runs_out=runs_out)
