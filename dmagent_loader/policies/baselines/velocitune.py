"""Velocitune, arXiv 2411.14318."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dmagent_loader._validation import is_finite_number, shown, whole_number
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies.baselines.losses import LossPolicy, by_domain


class Velocitune(LossPolicy):
    """Raises the weight of domains that have made less progress from their initial loss to a target loss.

        velocity_d = (loss_d - target_d) / (base_d - target_d)      1 at the start, 0 at the target
        w_d       <- w_d exp(velocity_d), normalised

    base is the loss of the base model, measured before the first decision. Targets come from a scaling law, fitted to a
    short training on each domain (`power_law_loss`).

    The definition is reconstructed from the paper's description, without access to code. The exponential update is that
    of Sheared LLaMA (`DynamicBatchLoading`). Velocities are clipped to [0, `max_velocity`]: that of a domain whose loss
    rises far above its initial value would otherwise take all the weight. A domain without progress to make (base at or
    below target) has velocity 0.

    Args:
        space: Domains of the run.
        natural: (D,), natural share of each domain, the mix of the first decision.
        target: Domain -> loss to reach, in nats per token, for all domains.
        max_velocity: Largest velocity.
        initial: Mix of the first decision: domain -> weight, or field -> weight; None: `natural`.
        proxy_tokens: Tokens of the trainings behind the targets, for the account of costs; None: unknown.
        name: See `policies.base.Policy`.

    Attributes:
        proxy_tokens: As given.

    Raises:
        ConfigurationError: A setting is invalid, or a domain has no target.
        DomainError: `target` names another domain.
    """

    always_answers = True

    def __init__(
        self,
        space: DomainSpace,
        natural: FloatArray,
        *,
        target: Mapping[str, float],
        max_velocity: float = 2.0,
        initial: Mapping[str, float] | None = None,
        proxy_tokens: int | None = None,
        name: str = "velocitune",
    ) -> None:
        super().__init__(space, natural, initial=initial, name=name)
        if not is_finite_number(max_velocity) or max_velocity <= 0:
            raise ConfigurationError(f"max_velocity is {shown(max_velocity)}; it must be a positive number")
        self.proxy_tokens = None if proxy_tokens is None else whole_number("proxy_tokens", proxy_tokens, least=0)
        self._target = by_domain("target", target, space)
        missing = [name for name in space.names if name not in target]
        if missing:
            raise ConfigurationError(f"target has no loss for {shown(missing)}: give one for every domain")
        self._max_velocity = max_velocity

    def updated(self, losses: FloatArray) -> FloatArray:
        """See `LossPolicy.updated`."""
        assert self.base_losses is not None
        way = self.base_losses - self._target
        velocity = np.divide(losses - self._target, way, out=np.zeros_like(way), where=way > 0)
        velocity = np.clip(velocity, 0.0, self._max_velocity)
        weights = self.mix * np.exp(velocity - velocity.max())
        return np.asarray(weights / weights.sum(), dtype=np.float64)


def power_law_loss(tokens: Sequence[float], losses: Sequence[float], at: float) -> float:
    """Extrapolates a loss curve by L(n) = E + A n^-b, fitted by least squares.

    For each irreducible loss E on a grid below the smallest loss, log(L - E) is linear in log n. The E with the
    smallest squared error of L is taken.

    Args:
        tokens: Tokens trained on at each point, at least 3 different numbers.
        losses: Loss at each point, in nats per token.
        at: Number of tokens to extrapolate to.

    Raises:
        ConfigurationError: There are too few points, losses are not positive or do not fall, or `at` is not a positive
            number.

    Example:
        >>> tokens = [1e6, 2e6, 4e6, 8e6]
        >>> losses = [2.0 + 3.0 * (n / 1e6) ** -0.5 for n in tokens]
        >>> round(power_law_loss(tokens, losses, 100e6), 1)  # 2 + 3 / 10
        2.3
    """
    n, loss = np.asarray(tokens, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    are_positive = all(((values > 0) & (values < np.inf)).all() for values in (n, loss))
    if n.shape != loss.shape or len(np.unique(n)) < 3 or not are_positive:
        raise ConfigurationError(
            "a scaling law needs positive, finite losses after at least 3 numbers of tokens, but there are "
            f"{shown(list(losses))} after {shown(list(tokens))} tokens"
        )
    if not is_finite_number(at) or at <= 0:
        raise ConfigurationError(f"at is {shown(at)}; it must be a positive number of tokens")
    inputs = np.log(n / n.max())
    best: tuple[float, float] | None = None
    for irreducible in loss.min() * np.linspace(0.0, 0.999, 1000):
        slope, offset = np.polyfit(inputs, np.log(loss - irreducible), 1)
        error = float(np.sum((irreducible + np.exp(offset + slope * inputs) - loss) ** 2))
        if slope < 0 and (best is None or error < best[0]):
            best = error, float(irreducible + np.exp(offset + slope * np.log(at / n.max())))
    if best is None:
        raise ConfigurationError(
            f"the losses {shown(list(losses))} do not fall with the tokens {shown(list(tokens))}: train longer, or "
            "give the target loss yourself"
        )
    return best[1]
