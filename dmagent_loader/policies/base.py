"""The one interface of the agent and every baseline."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray


@runtime_checkable
class Policy(Protocol):
    """Anything that proposes mixes.

    A class that says ``always_answers = True``, as those of this package do, ends soon whatever it is given: it is
    called directly. Any other one, also one that inherits from it, is called in a thread that is left behind when its
    time is over (`GuardConfig.timeout_seconds`).

    Attributes:
        name: Written beside each decision in the ledger and in logs; a policy without one goes by its class.
    """

    name: str

    def propose(self, history: History) -> FloatArray:
        """The mix of the next step.

        Args:
            history: All steps so far, the start state first. Its arrays are read-only.

        Returns:
            (D,) over `history.domains`, sums to 1. The caller guards it: see `policies.guard`.
        """
        ...


def name_of(policy: Policy) -> str:
    """What a policy is called in the ledger and in logs."""
    return str(getattr(policy, "name", type(policy).__name__))
