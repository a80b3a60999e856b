"""Policy that takes the weights of the fields from one policy and the shares inside each field from another.

With an agent and influence, the agent decides how much target text is trained on, and influence decides which domains:
``AgentWeightedSampler(agent="dmagent-rl", topics="influence")``.

Shapes: D domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmagent_loader._validation import shown
from dmagent_loader.errors import PolicyError, StateError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies.base import Policy, name_of
from dmagent_loader.policies.fields import FieldPolicy
from dmagent_loader.policies.informed import InformedPolicy
from dmagent_loader.policies.passes import PassLimitedPolicy


class CombinedPolicy:
    """Proposes mixes whose field weights come from one policy and whose shares inside the fields come from another.

    For a domain d of field f, with the proposals p of `fields` and q of `within`:

        weight_d = sum of p over f * q_d / sum of q over f

    Where `within` gives a field no weight, the shares of `fields` remain. Both policies see the mixes that were trained
    on, and each receives the evidence that it requests. If `within` limits passes (`policies.passes`), the limit
    applies to the combined mix.

    Args:
        fields: Policy that sets the weight of each field.
        within: Policy that sets the shares of the domains inside each field.
        space: Domains of the run.

    Attributes:
        name: Names of both policies, for example ``dmagent-rl+influence``.
        parts: `fields` and `within`.

    Example:
        >>> from dmagent_loader.policies import StaticPolicy
        >>> space = DomainSpace.from_names(["source/web", "source/wiki", "target/math"])
        >>> policy = CombinedPolicy(StaticPolicy([0.3, 0.3, 0.4]), StaticPolicy([0.1, 0.4, 0.5]), space)
        >>> mixes, feedback = np.full((1, 3), 1 / 3), np.zeros((1, 1))
        >>> start = History(domains=space.names, fields=("general",), mixes=mixes, feedback=feedback)
        >>> policy.propose(start).round(2).tolist()
        [0.12, 0.48, 0.4]
    """

    always_answers = True
    """As far as both parts do: see `policies.base.answers_directly`."""

    def __init__(self, fields: Policy, within: Policy, space: DomainSpace) -> None:
        self.name = f"{name_of(fields)}+{name_of(within)}"
        self.parts = (fields, within)
        self.space = space
        self._informed = {
            label: part for label, part in (("fields", fields), ("within", within)) if isinstance(part, InformedPolicy)
        }
        self.needs = frozenset[str]().union(*(part.needs for part in self._informed.values()))
        self._requested = {label: part.needs for label, part in self._informed.items()}
        """Evidence that each part has requested last; before the first request, all that it may request."""

    def check_fields(self, fields: Sequence[str]) -> None:
        """Lets each part check the fields of the environment.

        Raises:
            ConfigurationError: One of them cannot decide on feedback of these fields.
        """
        for part in self.parts:
            if isinstance(part, FieldPolicy):
                part.check_fields(fields)

    def needed(self, decision: int) -> frozenset[str]:
        """Evidence that one of the parts requires."""
        self._requested = {label: part.needed(decision) for label, part in self._informed.items()}
        return frozenset[str]().union(*self._requested.values())

    def inform(self, need: str, evidence: Any) -> None:
        """Passes evidence to the parts that requested it.

        Raises:
            PolicyError: No part requested such evidence.
        """
        receivers = [part for label, part in self._informed.items() if need in self._requested[label]]
        if not receivers:
            raise PolicyError(
                f"policy {self.name!r} received {shown(need)}, which neither part requested: pass only what needed() "
                "returns"
            )
        for part in receivers:
            part.inform(need, evidence)

    def propose(self, history: History) -> FloatArray:
        """The mix of the next step: (D,), sums to 1.

        Raises:
            DMAgentError: Any error of one of the policies.
        """
        fields, within = self.parts
        limited = within if isinstance(within, PassLimitedPolicy) else None
        outer = np.asarray(fields.propose(history), dtype=np.float64)
        inner = np.asarray((limited.unlimited if limited else within.propose)(history), dtype=np.float64)
        for part, proposal in zip(self.parts, (outer, inner), strict=True):
            if proposal.shape != (len(self.space),):
                raise PolicyError(
                    f"policy {name_of(part)!r} returned shape {proposal.shape}, but there are {len(self.space)} domains"
                )
        mix = outer.copy()
        for name in self.space.fields:
            members = list(self.space.members(name))
            if inner[members].sum() > 0:
                mix[members] = outer[members].sum() * inner[members] / inner[members].sum()
        return limited.passes.limited(mix) if limited else mix

    def state_dict(self) -> dict[str, Any]:
        """The evidence of both parts, as JSON values."""
        return {label: part.state_dict() for label, part in self._informed.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`.

        Raises:
            StateError: The state is damaged or of another policy.
        """
        if not isinstance(state, Mapping) or set(state) != set(self._informed):
            raise StateError(
                f"the state of policy {self.name!r} is {shown(state)}, but it needs the states of "
                f"{sorted(self._informed)}: it is damaged or of another policy; load an older one"
            )
        for label, part in self._informed.items():
            part.load_state_dict(state[label])
