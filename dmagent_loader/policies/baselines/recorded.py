"""The path of a recorded run: replayed without looking at feedback, or its mean held static."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmagent_loader._validation import is_count, shown
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.ledger import Ledger
from dmagent_loader.mixture.simplex import FloatArray, validate_mix
from dmagent_loader.policies.static import StaticPolicy


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedPath:
    """The mixes of a run, decision by decision.

    Shapes: T decisions, D domains.

    Args:
        domains: D names.
        mixes: (T, D), the mix from each decision on; rows sum to 1.
        samples: (T,), samples drawn from each decision on.
        exposure: (D,), share of each domain in all samples, including those under mixes set by hand; None: the mean of
            `mixes` over the samples.

    Raises:
        ConfigurationError: The arrays do not fit together, or no sample was drawn.
        MixError: A row is not a mix.
    """

    domains: tuple[str, ...]
    mixes: FloatArray
    samples: Sequence[float] | FloatArray
    exposure: FloatArray | None = None

    def __post_init__(self) -> None:
        samples = np.asarray(self.samples, dtype=np.float64)
        rows = list(self.mixes)
        if not rows or samples.shape != (len(rows),) or not (samples >= 0).all() or samples.sum() <= 0:
            raise ConfigurationError(
                f"a path needs mixes and the samples drawn under each, but there are {len(rows)} mixes and the samples "
                f"{shown(samples.tolist())}"
            )
        object.__setattr__(self, "mixes", np.stack([validate_mix(row, self.domains) for row in rows]))
        object.__setattr__(self, "samples", samples)
        if self.exposure is not None:
            object.__setattr__(self, "exposure", validate_mix(self.exposure, self.domains))

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RecordedPath:
        """The path of a saved run.

        Args:
            state: Return value of `AgentWeightedSampler.state_dict`, or the part ``"sampler"`` of a trainer's state.

        Raises:
            StateError: The state is damaged, holds no decision, or is of a run whose data changed.
        """
        try:
            domains, consumed = tuple(state["domains"]), state["consumed"]
            decided = [measurement["consumed"] for measurement in state["measurements"]]
            begin, ledger = state["begin"], Ledger.from_json(domains, state["ledger"], state["begin"])
            if not all(map(is_count, [*decided, consumed, begin])):
                raise ValueError("a number of samples is not a whole number")
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(
                f"the path of the run cannot be read from its state ({error!r}): pass the return value of "
                "sampler.state_dict(), or the part 'sampler' of a trainer's state"
            ) from error
        if begin:
            raise StateError(
                f"the data of this run changed after {begin} samples, so its mixes are of different domains: pass a "
                "state from before"
            )
        if not decided or consumed <= decided[0]:
            raise StateError("the state holds no decision that samples were drawn under: pass that of a longer run")
        # A mix takes effect after the samples that were already fetched, so the ledger says how much it was used.
        starts = [entry.start for entry in ledger]
        by_entry = np.diff(np.minimum([*starts, max(consumed, starts[-1])], consumed))
        numbers = [max(n for n, entry in enumerate(ledger) if entry.decided_at <= at) for at in decided]
        samples = np.zeros(len(decided))
        for entry, drawn in enumerate(by_entry):
            # Entries made by hand between two decisions count to the decision before; the initial mix, to the first.
            position = max([p for p, number in enumerate(numbers) if number <= entry], default=0)
            samples[position] += drawn
        mixes = np.array([ledger[number].weights() for number in numbers])
        weights = np.array([entry.weights() for entry in ledger])
        return cls(domains=domains, mixes=mixes, samples=samples, exposure=by_entry @ weights / by_entry.sum())

    @classmethod
    def from_history(cls, history: History) -> RecordedPath:
        """The path of a policy's history, without its start state; all steps count equally.

        Raises:
            ConfigurationError: The history has only the start state.
        """
        mixes = history.mixes[1:]
        return cls(domains=history.domains, mixes=mixes, samples=np.ones(len(mixes)))

    def mean(self) -> FloatArray:
        """Mean mix over the samples: (D,), sums to 1."""
        if self.exposure is not None:
            return np.array(self.exposure)
        samples = np.asarray(self.samples)
        return np.asarray(samples @ self.mixes / samples.sum(), dtype=np.float64)

    def mean_policy(self, *, name: str = "mean-held-static") -> StaticPolicy:
        """The policy that keeps the mean mix: the same exposure to each domain in all, without a change in time."""
        return StaticPolicy(dict(zip(self.domains, self.mean().tolist(), strict=True)), name=name)


class ReplayPolicy:
    """Proposes the mixes of a recorded path, decision by decision, whatever the feedback; then the last one.

    The difference between a policy and the replay of its own path on another stream of samples is what reacting to
    feedback is worth.

    Args:
        path: The path, of a run with decisions at the same samples.
        name: See `policies.base.Policy`.

    Example:
        >>> domains = ("source/web", "target/math")
        >>> path = RecordedPath(domains=domains, mixes=np.array([[0.9, 0.1], [0.5, 0.5]]), samples=[100, 300])
        >>> start = History(
        ...     domains=domains, fields=("general",), mixes=np.array([[1.0, 0.0]]), feedback=np.array([[-3.0]])
        ... )
        >>> ReplayPolicy(path).propose(start).tolist()
        [0.9, 0.1]
        >>> path.mean().round(2).tolist()
        [0.6, 0.4]
    """

    always_answers = True

    def __init__(self, path: RecordedPath, *, name: str = "replay") -> None:
        self.name = name
        self._path = path

    def propose(self, history: History) -> FloatArray:
        """The mix of decision `len(history) - 1`.

        Raises:
            DomainError: The history lacks a domain of the path.
        """
        mix = self._path.mixes[min(len(history), len(self._path.mixes)) - 1]
        return validate_mix(dict(zip(self._path.domains, mix.tolist(), strict=True)), history.domains)
