"""The interface of all policies: the agent and every baseline."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray


@runtime_checkable
class Policy(Protocol):
    """Anything that proposes mixes.

    A class that sets ``always_answers = True`` in its own body, as the policies of this package do, promises to return
    quickly on any input and is called directly. Any other policy, including its subclasses, is called in a thread that
    is abandoned after `GuardConfig.timeout_seconds`.

    Attributes:
        name: Name in the ledger and in logs; default: the name of the class.
    """

    name: str

    def propose(self, history: History) -> FloatArray:
        """The mix of the next step.

        Args:
            history: All steps so far, beginning with the start state. Its arrays are read-only.

        Returns:
            (D,) over `history.domains`, sums to 1. The caller checks it, see `policies.guard`.
        """
        ...


def answers_directly(policy: Policy) -> bool:
    """Whether a policy promises to return quickly; a combination of `parts` does if each of them does."""
    return bool(vars(type(policy)).get("always_answers", False)) and all(
        answers_directly(part) for part in getattr(policy, "parts", ())
    )


def name_of(policy: Policy) -> str:
    """Name of a policy in the ledger and in logs."""
    return str(getattr(policy, "name", type(policy).__name__))
