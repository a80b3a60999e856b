"""The guard between a policy and the data: a bad proposal leaves the previous mix in force and is logged as an error.

Shapes: D domains.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dmagent_loader.errors import ConfigurationError, DomainError, PolicyError
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray, total_variation
from dmagent_loader.policies.base import Policy, answers_directly, name_of
from dmagent_loader.policies.limited import LimitedCaller

logger = logging.getLogger(__name__)

SUM_TOLERANCE = 1e-3
"""Largest distance of a proposal's sum from 1; float16 arithmetic over 52 domains stays within it."""

NEGATIVE_TOLERANCE = 1e-9
"""Negative weights down to minus this value are rounding errors and become 0."""

Bound = float | Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Limits on the proposals of a policy.

    Args:
        floor: Smallest weight of every domain, or of the named ones.
        ceiling: Largest weight of every domain, or of the named ones.
        max_change: Largest total variation distance between two successive mixes, in (0, 1]; None: no limit.
        timeout_seconds: Time limit of a proposal; None: no limit. With a limit the policy runs in a thread, unless it
            sets `always_answers` (see `Policy`). Keep the limit below the timeout of the process group, because the
            other ranks wait for the proposal.

    Raises:
        ConfigurationError: `max_change` or `timeout_seconds` is outside its range.
    """

    floor: Bound = 0.0
    ceiling: Bound = 1.0
    max_change: float | None = None
    timeout_seconds: float | None = 300.0

    def __post_init__(self) -> None:
        if self.max_change is not None and not 0 < self.max_change <= 1:
            raise ConfigurationError(
                f"max_change is {self.max_change}; a total variation distance lies in (0, 1], 0 would freeze the mix"
            )
        if self.timeout_seconds is not None and not (0 < self.timeout_seconds <= threading.TIMEOUT_MAX):
            raise ConfigurationError(
                f"timeout_seconds is {self.timeout_seconds}; it must be positive, or None for none"
            )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one call of a policy.

    Attributes:
        mix: (D,), sums to 1: the guarded proposal, or the previous mix.
        accepted: Whether the policy returned a usable proposal.
        notes: Changes that the guard made to the proposal, in words.
        seconds: Duration of the call.
        error: Reason why the previous mix stays in force; None if `accepted`.
    """

    mix: FloatArray
    accepted: bool
    notes: tuple[str, ...]
    seconds: float
    error: str | None = None


class Guard:
    """Checks proposals for one set of domains.

    Args:
        config: The limits.
        domains: D names.

    Raises:
        DomainError: A bound names an unknown domain.
        ConfigurationError: A bound is outside [0, 1], or no mix can satisfy all bounds.

    Example:
        >>> guard = Guard(GuardConfig(floor={"source/web": 0.2}), ["source/web", "target/math"])
        >>> mix, notes = guard.check([0.0, 1.0], previous=np.array([0.5, 0.5]))
        >>> mix.tolist()
        [0.2, 0.8]
    """

    def __init__(self, config: GuardConfig, domains: Sequence[str]) -> None:
        self.config = config
        self.domains = tuple(domains)
        self._low = self._resolve(config.floor, "floor", 0.0)
        self._high = self._resolve(config.ceiling, "ceiling", 1.0)
        crossed = np.flatnonzero(self._low > self._high)
        if len(crossed):
            first = crossed[0]
            raise ConfigurationError(
                f"domain {self.domains[first]!r} has floor {self._low[first]:g} above its ceiling "
                f"{self._high[first]:g}: lower the one or raise the other"
            )
        if math.fsum(self._low) > 1 + 1e-9 or math.fsum(self._high) < 1 - 1e-9:
            raise ConfigurationError(
                f"over {len(self.domains)} domains the floors sum to {math.fsum(self._low):.6g} and the ceilings to "
                f"{math.fsum(self._high):.6g}: no mix fits, the first must be at most 1 and the second at least 1"
            )
        self._caller = LimitedCaller()

    def check(self, proposed: object, previous: FloatArray) -> tuple[FloatArray, tuple[str, ...]]:
        """Limits a proposal.

        If the previous mix violates the bounds (an initial mix below a new floor), `max_change` takes precedence: the
        mix moves toward the bounds as fast as allowed.

        Args:
            proposed: The return value of the policy.
            previous: (D,), the mix in force.

        Returns:
            The mix, (D,), sums to 1; and a note on each change that was made to the proposal.

        Raises:
            PolicyError: The proposal is not a mix.
        """
        mix = self._as_mix(proposed)
        notes = []
        bounded = project_to_bounds(mix, self._low, self._high)
        if (moved := float(total_variation(bounded, mix))) > 1e-9:
            below, above = np.flatnonzero(mix < self._low - 1e-9), np.flatnonzero(mix > self._high + 1e-9)
            names = ", ".join(self.domains[i] for i in (*below[:3], *above[:3]))
            notes.append(f"moved by {moved:.4g} to keep floor and ceiling ({names})")
        distance = float(total_variation(bounded, previous))
        if self.config.max_change is not None and distance > self.config.max_change:
            notes.append(f"change of {distance:.4g} cut to {self.config.max_change:g}")
            part = self.config.max_change / distance
            bounded = (1.0 - part) * previous + part * bounded
        return bounded, tuple(notes)

    def call(self, policy: Policy, history: History) -> object:
        """Returns the policy's proposal, within the time limit.

        Raises:
            PolicyError: The policy exceeds the limit, or is still busy with an earlier step.
            BaseException: Any error of the policy.
        """
        limit = self.config.timeout_seconds
        if limit is None or answers_directly(policy):
            return policy.propose(history)
        return self._caller.call(lambda: policy.propose(history), limit)

    def _resolve(self, bound: Bound, label: str, default: float) -> FloatArray:
        if isinstance(bound, Mapping):
            unknown = [name for name in bound if name not in self.domains]
            if unknown:
                raise DomainError(
                    f"the {label} names {unknown}, which are not domains; the domains are {list(self.domains)}"
                )
            values = np.array([float(bound.get(name, default)) for name in self.domains], dtype=np.float64)
        else:
            values = np.full(len(self.domains), float(bound), dtype=np.float64)
        for name, value in zip(self.domains, values, strict=True):
            if not 0 <= value <= 1:
                raise ConfigurationError(f"the {label} of domain {name!r} is {value:g}; a weight lies between 0 and 1")
        return values

    def _as_mix(self, proposed: object) -> FloatArray:
        try:
            array = np.asarray(proposed)
        except Exception as error:  # tensors that require grad or are on a GPU raise errors of their own
            raise PolicyError(f"it returned a {type(proposed).__name__} that is not an array: {error}") from error
        if array.dtype.kind not in "fiu":
            raise PolicyError(
                f"it returned {type(proposed).__name__} of {array.dtype}, not an array of numbers, one "
                "for each of history.domains, in their order"
            )
        mix = array.astype(np.float64)
        if mix.shape != (len(self.domains),):
            raise PolicyError(f"it returned shape {mix.shape}, but there are {len(self.domains)} domains")
        for fault, bad in (("not finite", ~np.isfinite(mix)), ("negative", mix < -NEGATIVE_TOLERANCE)):
            if bad.any():
                shown = ", ".join(f"{self.domains[i]}={mix[i]:.4g}" for i in np.flatnonzero(bad)[:4])
                raise PolicyError(f"it returned weights that are {fault}: {shown}")
        mix = np.maximum(mix, 0.0)
        total = float(mix.sum())
        if abs(total - 1.0) > SUM_TOLERANCE:
            raise PolicyError(f"it returned weights that sum to {total:.6g}, not to 1")
        return np.asarray(mix / total, dtype=np.float64)


def project_to_bounds(mix: FloatArray, low: FloatArray, high: FloatArray) -> FloatArray:
    """The mix w within the bounds that minimises KL(w || mix): clip(s mix, low, high), with s such that it sums to 1.

    Domains that touch no bound keep their proportions. Weight that only domains of weight 0 can take is shared among
    them in proportion to the distance between their bounds.

    Args:
        mix: (D,), sums to 1.
        low: (D,), sums to at most 1.
        high: (D,), at least `low`, sums to at least 1.

    Returns:
        (D,), sums to 1.
    """
    if (mix >= low).all() and (mix <= high).all():
        return mix
    positive = mix > 1e-300  # below, a quotient could overflow
    # The sum is piecewise linear in s and does not decrease; its knots are where a weight meets a bound.
    knots = np.unique(np.concatenate([low[positive] / mix[positive], high[positive] / mix[positive]]))
    first, last = 0, len(knots)
    while first < last:
        middle = (first + last) // 2
        if np.clip(knots[middle] * mix, low, high).sum() < 1.0:
            first = middle + 1
        else:
            last = middle
    if first == len(knots):
        fixed = np.where(positive, high, low)
        room = np.where(positive, 0.0, high - low)
        left = max(0.0, 1.0 - float(fixed.sum()))
        result = fixed + (room * min(1.0, left / float(room.sum())) if room.sum() > 0 else 0.0)
    else:
        over = np.clip(knots[first] * mix, low, high)
        under = np.clip(knots[first - 1] * mix, low, high) if first else low
        span = float(over.sum() - under.sum())
        part = (1.0 - float(under.sum())) / span if span > 0 else 1.0
        result = under + min(1.0, max(0.0, part)) * (over - under)
    return np.asarray(result / result.sum(), dtype=np.float64)


def propose_guarded(policy: Policy, history: History, previous: FloatArray, guard: Guard) -> Outcome:
    """Asks a policy for the next mix; if it raises, is late or proposes no mix, the previous mix stays in force.

    Args:
        policy: The policy, which receives a read-only view of the history.
        history: All steps so far.
        previous: (D,), the mix in force.
        guard: The limits.

    Returns:
        The outcome. A failure is logged as an error and never raised.
    """
    started = time.perf_counter()
    try:
        proposed = guard.call(policy, _read_only(history))
        mix, notes = guard.check(proposed, previous)
    except (Exception, SystemExit) as error:  # a policy must not end the training either
        seconds = time.perf_counter() - started
        fault = str(error) if isinstance(error, PolicyError) else f"{type(error).__name__}: {error}"
        text = f"policy {name_of(policy)!r} failed at step {len(history)}: {fault}; the previous mix stays in force"
        logger.error(text, exc_info=not isinstance(error, PolicyError))
        return Outcome(mix=previous.copy(), accepted=False, notes=(), seconds=seconds, error=text)
    for note in notes:
        logger.info("policy %r, step %d: %s", name_of(policy), len(history), note)
    return Outcome(mix=mix, accepted=True, notes=notes, seconds=time.perf_counter() - started)


def _read_only(history: History) -> History:
    mixes, feedback = history.mixes.view(), history.feedback.view()
    mixes.flags.writeable = feedback.flags.writeable = False
    return History(domains=history.domains, fields=history.fields, mixes=mixes, feedback=feedback)
