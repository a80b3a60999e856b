"""A constant mix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray, validate_mix

Weights = Mapping[str, float] | Sequence[float] | FloatArray


class StaticPolicy:
    """Proposes the same mix at every step.

    Args:
        weights: Domain name -> weight (omitted domains get 0), or one weight for each domain in order.
        name: See `policies.base.Policy`.

    Raises:
        MixError: The weights are not a distribution.

    Example:
        >>> policy = StaticPolicy({"source/web": 0.25, "target/math": 0.75})
        >>> policy.name
        'static'
    """

    always_answers = True

    def __init__(self, weights: Weights, *, name: str = "static") -> None:
        self.name = name
        self._weights = checked(weights)

    def propose(self, history: History) -> FloatArray:
        """The mix over the domains of the history.

        Raises:
            DomainError: The weights name a domain that the run does not have.
            MixError: The number of weights differs from the number of domains.
        """
        return validate_mix(self._weights, history.domains)


def checked(weights: Weights) -> Weights:
    """Copies the weights and checks that they are a distribution, before the domains of the run are known."""
    if isinstance(weights, Mapping):
        validate_mix(weights, tuple(weights))
        return dict(weights)
    return validate_mix(weights, [f"weight {i}" for i in range(len(weights))])
