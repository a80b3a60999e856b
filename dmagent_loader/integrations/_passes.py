"""Passes over the rows of each domain, and the end of a run: metrics, warnings and what the log says."""

from __future__ import annotations

import logging

import numpy as np

from dmagent_loader.sampler import AgentWeightedSampler

logger = logging.getLogger(__name__)

_UNWARNED_PASSES = 3
"""Passes over a domain without a warning. Up to four epochs of repeated data cost almost nothing against new data
(arXiv 2305.16264)."""
_LISTED = 5
"""Domains named in one line of the log."""
ENDS_EARLY = 0.95
"""Part of the planned run, or of the data, before which an end is warned of."""


class Passes:
    """How often the rows of each domain are read in one run.

    Args:
        sampler: Sampler of the run.
    """

    def __init__(self, sampler: AgentWeightedSampler) -> None:
        self._sampler = sampler
        self._warned: set[str] = set()

    def begin(self, consumed: int) -> None:
        """Begins or resumes after a number of consumed samples: domains beyond the limit were warned of before."""
        self._warned = set(self._beyond(consumed))

    def metrics(self, consumed: int) -> dict[str, float]:
        """``epochs/<domain>``, passes over its rows so far, and ``rows_left/<domain>``, rows not read yet."""
        names, (passes, left) = self._sampler.space.names, _passes(self._sampler, consumed)
        return {f"epochs/{name}": float(value) for name, value in zip(names, passes, strict=True)} | {
            f"rows_left/{name}": float(value) for name, value in zip(names, left, strict=True)
        }

    def warn(self, consumed: int) -> None:
        """Warns, once for each domain, of its fourth pass."""
        new = [name for name in self._beyond(consumed) if name not in self._warned]
        if not new:
            return
        self._warned.update(new)
        logger.warning(
            "the %dth pass over the rows of %s has begun after %d samples: more than four passes teach a model little; "
            "add rows, lower the weight (most_passes= of a policy, ceiling= of GuardConfig), or train for fewer steps",
            _UNWARNED_PASSES + 1,
            _listed(new),
            consumed,
        )

    def forecast(self, limit: int | None) -> None:
        """Logs the end of the run under the present mix, and warns if the data end before the trainer does.

        Args:
            limit: Samples at which the trainer stops; None: unknown.
        """
        sampler, end = self._sampler, self._sampler.end
        total, batch = sampler.total_samples, sampler.global_batch
        if total is None:
            logger.info("the data repeat without end, so the training loop ends the run")
            return
        changes = [(index, names) for index, names in sampler.plan.changes() if index <= total]
        first = f"; {_listed(changes[0][1])} runs out first, after {changes[0][0]} samples" if changes else ""
        logger.info(
            "under the present mix, the run ends after %d samples (step %d) because %s%s; by then, %s",
            total,
            -(-total // batch),
            "its data are used up" if total == end else "the trainer stops",
            first,
            _summary(sampler, total),
        )
        if limit is not None and end is not None and end < ENDS_EARLY * limit:
            logger.warning(
                "under the present mix, the data are used up after step %d, but the trainer plans %d steps, and with "
                "them its learning rate: set max_steps=%d, or let the domains repeat (exhausted='repeat')",
                end // batch,
                limit // batch,
                end // batch,
            )

    def end(self, consumed: int) -> None:
        """Logs what a run of `consumed` samples has left and repeated."""
        sampler = self._sampler
        plan_end = sampler.plan.ends_by(consumed + sampler.global_batch)
        used_up = sampler.plan.used_up_at(consumed if plan_end is None else plan_end)
        left = 0 if plan_end is None else plan_end - consumed
        self.warn(consumed)
        logger.info(
            "training ended after %d samples; used up: %s%s; %s",
            consumed,
            _listed(used_up) if used_up else "nothing",
            f", but for {left} samples that make no whole step" if left > 0 else "",
            _summary(sampler, consumed),
        )

    def _beyond(self, consumed: int) -> list[str]:
        passes, _ = _passes(self._sampler, consumed)
        names = zip(self._sampler.space.names, passes, strict=True)
        return [name for name, value in names if value > _UNWARNED_PASSES]


def _passes(sampler: AgentWeightedSampler, consumed: int) -> tuple[np.ndarray, np.ndarray]:
    """Passes over each domain, and its rows that were not read: both (D,)."""
    rows, counts = sampler.plan.num_rows, sampler.plan.counts(consumed)
    return counts / rows, np.maximum(0, rows - counts)


def _summary(sampler: AgentWeightedSampler, consumed: int) -> str:
    """Passes over the domains read most often, and the part of each field's rows that was never read."""
    passes, left = _passes(sampler, consumed)
    most = [f"{sampler.space.names[i]} {passes[i]:.2f}" for i in np.argsort(-passes, kind="stable")[:_LISTED]]
    unread = []
    for name in sampler.space.fields:
        members = list(sampler.space.members(name))
        rows = int(sampler.plan.num_rows[members].sum())
        unread.append(f"{int(left[members].sum())} of {rows} rows of {name}")
    others = " (most of all)" if len(passes) > _LISTED else ""
    return f"passes{others}: {', '.join(most)}; never read: {', '.join(unread)}"


def _listed(names: list[str] | tuple[str, ...]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
