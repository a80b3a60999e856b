"""Policies that decide on more than mixes and feedback: what they need, who gives it, and how a run remembers it.

Before each decision the integrations look at `needed` and pass each piece of evidence to `inform`. What was learnt goes
into the run's state: a resumed run decides the same without asking again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray

INFLUENCE = "influence"
"""Evidence of type `mixture.influence.Influence`, over all domains of the run."""

QUESTIONS = "questions"
"""Evidence of type ``Mapping[str, Sequence[str]]``: field of the environment -> its questions with their answers."""


@runtime_checkable
class InformedPolicy(Protocol):
    """A policy (see `policies.base.Policy`) that needs evidence.

    Attributes:
        name: See `policies.base.Policy`.
        needs: All that it may ask for: `INFLUENCE`, `QUESTIONS`.
    """

    name: str
    needs: frozenset[str]

    def needed(self, decision: int) -> frozenset[str]:
        """What is to be given before a decision; the same on all ranks.

        Args:
            decision: Number of the decision, the first is 0.
        """
        ...

    def inform(self, need: str, evidence: Any) -> None:
        """Takes a piece of evidence. All ranks get the same.

        Args:
            need: What it is.
            evidence: The type depends on `need`; None: it cannot be had in this run.
        """
        ...

    def propose(self, history: History) -> FloatArray:
        """See `policies.base.Policy`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What it has learnt, as JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            StateError: It is something else.
        """
        ...
