"""The critical share of the target field, CMR (arXiv 2407.17467), from the D-CPT law (arXiv 2406.01375)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from dmagent_loader._validation import is_finite_number, shown, whole_number
from dmagent_loader.errors import ConfigurationError, DomainError, require_extra
from dmagent_loader.mixture.domains import SOURCE, TARGET, DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray, validate_mix

logger = logging.getLogger(__name__)

_HUBER = 1e-3
_LOW = np.array([1e-3, -10.0, 0.1, 0.0, -10.0, 0.0, 1e-3])
_HIGH = np.array([20.0, 5.0, 5.0, 2.0, 5.0, 3.0, 0.5])
"""Bounds of E, log B, eta, beta, log C, gamma and eps."""
_SHARES = np.linspace(0.0, 1.0, 1001)


class MixtureLaw:
    """The loss on one field as a function of its share r and of the tokens n, for one model size.

        L(n, r) = E + B r^eta / m^beta + C / (r + eps)^gamma        m = n / largest n of the runs

    This is the D-CPT law without its term of the model size, which E takes up. It is fitted by the Huber loss of log
    residuals (delta 0.001), from several first guesses. The form is reconstructed from the paper's description, and
    the bounds of the parameters are ours.

    Args:
        shares: Share of the field in each measurement, from 0 to 1.
        tokens: Tokens trained on at each measurement.
        losses: Loss on the field, in nats per token.

    Attributes:
        parameters: E, log B, eta, beta, log C, gamma, eps.
        worst: Largest residual of the fit, in nats.

    Raises:
        ConfigurationError: The measurements do not fit together, are no more than the 7 parameters, or have fewer than
            3 shares.
        MissingExtraError: scipy is not installed.
    """

    def __init__(self, shares: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> None:
        optimize = require_extra("scipy.optimize", "baselines")
        r, n, loss = (np.asarray(values, dtype=np.float64) for values in (shares, tokens, losses))
        fits = r.shape == n.shape == loss.shape and r.ndim == 1 and len(np.unique(r)) >= 3
        if not fits or not ((r >= 0) & (r <= 1)).all():
            raise ConfigurationError(
                "the law needs a positive loss at each of at least 3 shares between 0 and 1, but there are "
                f"{loss.size} losses for the shares {shown(np.unique(r).tolist())}"
            )
        for label, values in (("loss", loss), ("number of tokens", n)):
            bad = np.flatnonzero(~((values > 0) & (values < np.inf)))
            if len(bad):
                raise ConfigurationError(
                    f"the law needs a positive loss at each of at least 3 shares, but the {label} of measurement "
                    f"{bad[0] + 1} of {loss.size} is {values[bad[0]]:g}, not a positive number: leave it out"
                )
        if loss.size <= len(_LOW):
            raise ConfigurationError(
                f"{loss.size} measurements cannot determine the {len(_LOW)} parameters of the law: measure the loss at "
                "more shares, or several times in each run"
            )
        self._unit = float(n.max())

        def residuals(parameters: FloatArray) -> FloatArray:
            return np.asarray(np.log(_law(parameters, r, n / self._unit)) - np.log(loss), dtype=np.float64)

        spread = max(1e-3, float(np.ptp(loss)))
        best = None
        for part in (0.5, 0.9):
            for exponent in (0.3, 1.0):
                first = [part * loss.min(), np.log(spread), 1.0, exponent, np.log(spread / 4), 0.5, 0.1]
                guess = np.clip(first, _LOW + 1e-6, _HIGH - 1e-6)
                found = optimize.least_squares(
                    residuals, guess, bounds=(_LOW, _HIGH), loss="huber", f_scale=_HUBER, max_nfev=4000, x_scale="jac"
                )
                if best is None or found.cost < best.cost:
                    best = found
        assert best is not None
        self.parameters = np.asarray(best.x, dtype=np.float64)
        self.worst = float(np.abs(self.loss(r, n) - loss).max())

    def loss(self, share: FloatArray | float, tokens: FloatArray | float) -> FloatArray:
        """Predicted loss at shares and numbers of tokens, in nats per token."""
        return _law(self.parameters, np.asarray(share, dtype=np.float64), np.asarray(tokens) / self._unit)


class CriticalRatio:
    """Proposes the largest share of the target field at which the loss on the source field stays within a limit.

    This is the critical mixture ratio of arXiv 2407.17467, read off laws that are fitted to short runs of the user's
    own. Inside the fields, the mix is natural. If no share keeps to the limit, the one of least source loss is taken,
    with a warning.
    If the law of the target field is given, it is the share within the limit of least target loss.

    Args:
        space: Domains of the run, of the fields ``source`` and ``target``.
        natural: (D,), natural share of each domain.
        source: Law of the source field, in the share of the source field.
        tokens: Tokens of the planned run.
        limit: Largest allowed loss on the source field, such as that of the base model plus a tolerance.
        target: Law of the target field, in the share of the target field; None: its loss falls with its share.
        proxy_tokens: Tokens of the runs behind the laws, for the account of costs; None: unknown.
        name: See `policies.base.Policy`.

    Attributes:
        share: Share of the target field.
        proxy_tokens: As given.

    Raises:
        ConfigurationError: A setting is invalid.
        DomainError: The fields are not ``source`` and ``target``.
    """

    always_answers = True

    def __init__(
        self,
        space: DomainSpace,
        natural: FloatArray,
        *,
        source: MixtureLaw,
        tokens: float,
        limit: float,
        target: MixtureLaw | None = None,
        proxy_tokens: int | None = None,
        name: str = "critical-ratio",
    ) -> None:
        for label, value in (("tokens", tokens), ("limit", limit)):
            if not is_finite_number(value) or value <= 0:
                raise ConfigurationError(f"{label} is {shown(value)}; it must be a positive number")
        if set(space.fields) != {SOURCE, TARGET}:
            raise DomainError(
                "a ratio of two fields needs the fields ['source', 'target'], but the domains have "
                f"{list(space.fields)}"
            )
        self.name = name
        self.proxy_tokens = None if proxy_tokens is None else whole_number("proxy_tokens", proxy_tokens, least=0)
        losses = source.loss(1 - _SHARES, tokens)
        feasible = np.flatnonzero(losses <= limit)
        if not len(feasible):
            chosen = int(np.argmin(losses))
            logger.warning(
                "policy %r cannot keep to limit=%g: the least loss on the source field that its law predicts after "
                "%g tokens is %.4f nats, at a target share of %.3f, which it takes; raise the limit",
                name,
                limit,
                tokens,
                losses[chosen],
                _SHARES[chosen],
            )
        elif target is None:
            chosen = int(feasible[-1])
        else:
            chosen = int(feasible[np.argmin(target.loss(_SHARES[feasible], tokens))])
        self.share = float(_SHARES[chosen])
        self._domains = space.names
        self._mix = space.mix({SOURCE: 1 - self.share, TARGET: self.share}, shares=validate_mix(natural, space.names))

    def propose(self, history: History) -> FloatArray:
        """The mix.

        Raises:
            DomainError: The history lacks a domain.
        """
        return validate_mix(dict(zip(self._domains, self._mix.tolist(), strict=True)), history.domains)


def _law(parameters: FloatArray, share: FloatArray, tokens: FloatArray) -> FloatArray:
    irreducible, log_b, eta, beta, log_c, gamma, eps = parameters
    forgetting = np.exp(log_b) * share**eta / tokens**beta
    return np.asarray(irreducible + forgetting + np.exp(log_c) / (share + eps) ** gamma, dtype=np.float64)
