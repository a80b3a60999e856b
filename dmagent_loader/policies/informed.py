"""Protocol of policies that need evidence beyond mixes and feedback.

Before each decision, the integrations call `needed` and pass each piece of evidence to `inform`. The evidence is saved
in the run's state, so a resumed run makes the same decisions without collecting it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray

INFLUENCE = "influence"
"""Evidence of type `mixture.influence.Influence`, over all domains of the run."""

LENGTH = "length"
"""Evidence of type `mixture.RunLength`, as far as the length of the run is known before the decision."""

LOSSES = "losses"
"""Evidence of type ``Mapping[str, float]``: domain -> mean loss per token of the current model on rows of it, in nats.
The rows are the same before each decision. They belong to the training data. None: the losses cannot be measured, or
one of them is not finite."""

QUESTIONS = "questions"
"""Evidence of type ``Mapping[str, Sequence[str]]``: field of the environment -> its questions with their answers."""


@runtime_checkable
class InformedPolicy(Protocol):
    """A policy (see `policies.base.Policy`) that needs evidence.

    Attributes:
        name: See `policies.base.Policy`.
        needs: Kinds of evidence that the policy may request: `INFLUENCE`, `LENGTH`, `LOSSES`, `QUESTIONS`.
    """

    name: str
    needs: frozenset[str]

    def needed(self, decision: int) -> frozenset[str]:
        """Kinds of evidence required before a decision; the same on all ranks.

        Args:
            decision: Index of the decision, from 0.
        """
        ...

    def inform(self, need: str, evidence: Any) -> None:
        """Takes a piece of evidence, the same on all ranks.

        Args:
            need: Kind of evidence.
            evidence: Evidence, of a type that depends on `need`; None: unavailable in this run.
        """
        ...

    def propose(self, history: History) -> FloatArray:
        """See `policies.base.Policy`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Evidence received so far, as JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`.

        Raises:
            StateError: The state is damaged or of another policy.
        """
        ...
