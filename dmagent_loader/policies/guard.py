"""What stands between a policy and the data: a bad proposal leaves the mix in force, loudly.

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
from dmagent_loader.policies.base import Policy, name_of
from dmagent_loader.policies.limited import LimitedCaller

logger = logging.getLogger(__name__)

SUM_TOLERANCE = 1e-3
"""How far the sum of a proposal may be from 1; float16 arithmetic over 52 domains stays within it."""

NEGATIVE_TOLERANCE = 1e-9
"""Weights above minus this are rounding errors and become 0."""

Bound = float | Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Limits on what a policy may do.

    Args:
        floor: Least weight of every domain, or of those named.
        ceiling: Largest weight of every domain, or of those named.
        max_change: Largest total variation distance between two successive mixes, in (0, 1]; None: any.
        timeout_seconds: How long a policy may think; None: as long as it likes. With a limit it runs in a thread, if it
            is none that always answers. Keep it below the timeout of the process group, in which the other ranks wait.
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
    """What came of one call of a policy.

    Attributes:
        mix: (D,), sums to 1: the guarded proposal, or the previous mix.
        accepted: Whether the policy gave a usable proposal.
        notes: What the guard changed about it, in words.
        seconds: How long it took.
        error: Why the previous mix stays in force; None if `accepted`.
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
        DomainError: A bound for no domain.
        ConfigurationError: Bounds outside [0, 1], or that no mix can satisfy.

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
        """A proposal within the limits.

        If the previous mix lies outside the bounds (an initial mix below a new floor), `max_change` comes first:
        the mix then moves toward the bounds as fast as it may.

        Args:
            proposed: What the policy returned.
            previous: (D,), the mix in force.

        Returns:
            The mix, (D,), sums to 1; and a note on each change that was made to the proposal.

        Raises:
            PolicyError: The proposal is no mix.
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
        """What the policy returns, within the time limit.

        Raises:
            PolicyError: The policy is late, or still busy with an earlier step.
            BaseException: Whatever the policy raises.
        """
        limit = self.config.timeout_seconds
        if limit is None or vars(type(policy)).get("always_answers", False):
            return policy.propose(history)
        return self._caller.call(lambda: policy.propose(history), limit)

    def _resolve(self, bound: Bound, label: str, default: float) -> FloatArray:
        if isinstance(bound, Mapping):
            unknown = [name for name in bound if name not in self.domains]
            if unknown:
                raise DomainError(
                    f"the {label} names {unknown}, which are no domains; the domains are {list(self.domains)}"
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
        except Exception as error:  # tensors that need grad or lie on a GPU raise their own kinds
            raise PolicyError(f"it returned a {type(proposed).__name__} that is no array: {error}") from error
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
    """The mix w within the bounds that is closest in KL(w || mix): clip(s mix, low, high) with s so that it sums to 1.

    The domains that touch no bound keep their proportions. If even then weight is left over, because all of it may only
    go to domains of weight 0, these share it by the room that they have.

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
    # The sum rises with s, in straight pieces between the values of s at which a weight meets a bound.
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
    """Asks a policy for the next mix; if it raises, is late or returns nonsense, the previous mix stays in force.

    Args:
        policy: Gets a read-only view of the history.
        history: All steps so far.
        previous: (D,), the mix in force.
        guard: The limits.

    Returns:
        The outcome; a failure is logged as an error, never raised.
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
