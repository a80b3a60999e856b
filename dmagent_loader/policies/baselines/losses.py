"""The common part of policies that update their mix from the loss of the model on each domain."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from dmagent_loader._validation import is_finite_number, shown
from dmagent_loader.errors import ConfigurationError, DomainError, PolicyError, StateError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray, validate_mix
from dmagent_loader.policies.informed import LOSSES

logger = logging.getLogger(__name__)


class LossPolicy(ABC):
    """A policy whose mix is updated once before each decision, from the loss on each domain (`LOSSES`).

    The first losses are those of the base model: they update nothing. If losses cannot be measured, the mix stays. An
    object decides for one run at a time: asked for an earlier decision than before, it begins anew.

    Args:
        space: Domains of the run.
        natural: (D,), natural share of each domain, the mix of the first decision; sums to 1.
        initial: Another mix of the first decision; None: `natural`.
        name: See `policies.base.Policy`.

    Attributes:
        mix: (D,), the mix of the next step.
        base_losses: (D,), losses at the first decision; None before.
        updates: Number of updates so far.
    """

    needs = frozenset({LOSSES})

    def __init__(
        self, space: DomainSpace, natural: FloatArray, *, initial: Mapping[str, float] | None = None, name: str
    ) -> None:
        self.name = name
        self.space = space
        self.mix = validate_mix(natural, space.names) if initial is None else space.mix(initial, shares=natural)
        self.base_losses: FloatArray | None = None
        self.updates = 0
        self._asked = self._informed = -1
        self._initial = self.mix
        self._silence_reported = False

    @abstractmethod
    def updated(self, losses: FloatArray) -> FloatArray:
        """The next mix.

        Args:
            losses: (D,), mean loss per token of each domain, in nats.

        Returns:
            (D,), sums to 1.
        """

    def needed(self, decision: int) -> frozenset[str]:
        """The losses, once before each decision."""
        if decision < self._informed:
            logger.warning(
                "policy %r begins anew, because it is asked for decision %d after decision %d, as by another run: to "
                "continue a run, load its state; for two runs at once, make two policies",
                self.name,
                decision,
                self._informed,
            )
            self._begin()
        self._asked = decision
        return frozenset() if self._informed >= decision else self.needs

    def inform(self, need: str, evidence: Any) -> None:
        """Takes the losses, domain -> nats per token, and updates the mix; None: they cannot be measured.

        Raises:
            PolicyError: The evidence is of another kind, or not a finite number for each domain.
        """
        if need != LOSSES or not (evidence is None or isinstance(evidence, Mapping)):
            raise PolicyError(
                f"policy {self.name!r} needs the loss on each domain, but received {shown(need)}: {shown(evidence)}"
            )
        self._informed = self._asked
        if evidence is None:
            return
        if set(evidence) != set(self.space.names) or not all(map(is_finite_number, evidence.values())):
            raise PolicyError(
                f"policy {self.name!r} needs a finite loss on each of {shown(list(self.space.names))}, but received "
                f"{shown(dict(evidence))}"
            )
        losses = np.array([float(evidence[name]) for name in self.space.names])
        if self.base_losses is None:
            if self._asked > 0:
                logger.warning(
                    "policy %r has no losses of the base model, and takes those before decision %d instead: it is as "
                    "if the run began there, and progress made before does not count",
                    self.name,
                    self._asked,
                )
            self.base_losses = losses
        else:
            self.mix = self.updated(losses)
            self.updates += 1

    def propose(self, history: History) -> FloatArray:
        """The mix of the next step.

        Raises:
            DomainError: The history has other domains.
        """
        if history.domains != self.space.names:
            raise DomainError(
                f"the history has the domains {shown(list(history.domains))}, but this policy was built for "
                f"{shown(list(self.space.names))}"
            )
        if self._asked < 0 and self.base_losses is None and not self._silence_reported:
            self._silence_reported = True
            logger.warning(
                "policy %r keeps its first mix, because nobody gives it the loss on each domain: use "
                "DataMixingCallback or Mixing, which measure it before each decision, or call inform(%r, losses) "
                "before each decision, domain -> nats per token",
                self.name,
                LOSSES,
            )
        return self.mix.copy()

    def state_dict(self) -> dict[str, Any]:
        """What the policy has learnt, as JSON values: name -> domain -> number."""
        counts = {"informed": self._informed, "updates": self.updates}
        return {**counts, **{name: self._named(values) for name, values in self._learnt().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`. If it is of other domains (changed data), the policy begins anew.

        Raises:
            StateError: The state is damaged or of another policy.
        """
        names = self.space.names
        try:
            informed, updates = int(state["informed"]), int(state["updates"])
            saved = {name: state[name] for name in self._learnt()}
            learnt = {}
            for name, values in saved.items():
                if values is not None and set(values) != set(names):
                    logger.warning(
                        "policy %r begins anew, with the loss of the present model as that of the base model: its "
                        "state is for the domains %s, but the run now has %s",
                        self.name,
                        shown(sorted(values)),
                        shown(list(names)),
                    )
                    self._begin()
                    return
                if values is not None and not all(map(is_finite_number, values.values())):
                    raise ValueError(f"{name} is {shown(values)}, not a finite number for each domain")
                learnt[name] = None if values is None else np.array([float(values[domain]) for domain in names])
            if learnt["mix"] is None:
                raise ValueError("it has no mix")
            learnt["mix"] = validate_mix(learnt["mix"], names)
        except (ConfigurationError, ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise StateError(
                f"the state of policy {self.name!r} cannot be read ({error!r}): it is damaged or of another policy; "
                "load an older one"
            ) from error
        self._informed, self.updates = informed, updates
        self._restore(learnt)

    def _begin(self) -> None:
        """Forgets all that was learnt."""
        self.mix, self.base_losses, self.updates = self._initial, None, 0
        self._asked = self._informed = -1

    def _learnt(self) -> dict[str, FloatArray | None]:
        """Name -> (D,); a name that is None has no value yet."""
        return {"mix": self.mix, "base_losses": self.base_losses}

    def _restore(self, learnt: Mapping[str, FloatArray | None]) -> None:
        """Sets what `_learnt` returns."""
        assert learnt["mix"] is not None
        self.mix, self.base_losses = learnt["mix"], learnt["base_losses"]

    def _named(self, values: FloatArray | None) -> dict[str, float] | None:
        return None if values is None else self.space.as_dict(values)


def by_domain(label: str, values: Mapping[str, float], space: DomainSpace) -> FloatArray:
    """Losses that a user gives by domain: (D,), NaN for the domains left out.

    Raises:
        DomainError: A name is not a domain.
        ConfigurationError: A value is not a finite number.
    """
    if not isinstance(values, Mapping) or not all(map(is_finite_number, values.values())):
        raise ConfigurationError(f"{label} is {shown(values)}; it must map domains to losses in nats per token")
    unknown = sorted(set(values) - set(space.names))
    if unknown:
        raise DomainError(f"{label} names unknown domains {shown(unknown)}; the domains are {shown(list(space.names))}")
    return np.array([float(values.get(name, np.nan)) for name in space.names])
