"""Olmix, arXiv 2602.12237: a log-linear law for each metric, and the mix that minimises it near a prior."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from dmagent_loader._validation import is_finite_number, shown
from dmagent_loader.errors import ConfigurationError, PolicyError, require_extra
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray, validate_mix
from dmagent_loader.policies.baselines.proxies import ProxyTable
from dmagent_loader.policies.guard import project_to_bounds
from dmagent_loader.policies.informed import LENGTH
from dmagent_loader.policies.passes import MOST_PASSES, PassLimit

logger = logging.getLogger(__name__)

HUBER = 0.02
"""Residual in nats beyond which the Huber loss of the fit is linear."""

_FRACTIONS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.97)
"""First guesses of the irreducible loss, as parts of the smallest loss."""
_SMALLEST = 1e-9
_ACCURACY = 1e-9
_MOST_STEPS = 20_000
_MOST_SOLUTIONS = 25
"""Problems that are solved for one mix under the cap, at most."""
_TOLERANCE = 1e-6
"""Relative excess over the cap that counts as rounding."""
_BISECTED = 1e-4
"""Relative distance of the ceilings from those of the mix's own length at which the bisection ends."""


class LogLinearLaw:
    """The law of each metric k (arXiv 2403.16952, as used by Olmix):

        L_k(p) = c_k + exp(A_k . p)        c_k >= 0

    fitted by the Huber loss of the residuals (delta 0.02), from several first guesses of c_k. A constant in the
    exponent would change nothing, because the weights p sum to 1.

    Shapes: N runs, D domains, K metrics.

    Args:
        table: Proxy runs, with positive losses.

    Attributes:
        irreducible: (K,), c.
        slopes: (K, D), A.

    Raises:
        ConfigurationError: A loss is not positive, or all mixes are the same.
        MissingExtraError: scipy is not installed.

    Example:
        >>> mixes = np.random.default_rng(0).dirichlet([1.0, 1.0], 30)
        >>> losses = 2.0 + np.exp(mixes @ [[0.5], [-1.0]])
        >>> law = LogLinearLaw(ProxyTable(domains=("web", "math"), metrics=("loss",), mixes=mixes, losses=losses))
        >>> law.irreducible.round(2).tolist(), law.slopes.round(2).tolist()
        ([2.0], [[0.5, -1.0]])
    """

    def __init__(self, table: ProxyTable) -> None:
        optimize = require_extra("scipy.optimize", "baselines")
        table.check_variation()
        if (table.losses <= 0).any():
            raise ConfigurationError(
                f"the law needs positive losses, but the smallest is {table.losses.min():g}: pass losses or bits per "
                "byte, not scores"
            )
        fits = [_fitted(table.mixes, losses, optimize) for losses in table.losses.T]
        self.irreducible = np.array([fit[0] for fit in fits])
        self.slopes = np.array([fit[1:] for fit in fits])

    def predict(self, mixes: FloatArray) -> FloatArray:
        """Predicted losses: (N, D) -> (N, K)."""
        return np.asarray(self.irreducible + np.exp(mixes @ self.slopes.T), dtype=np.float64)

    def gradient(self, mix: FloatArray, weights: FloatArray) -> FloatArray:
        """Gradient of the weighted sum of the losses: (D,), (K,) -> (D,)."""
        return np.asarray((weights * np.exp(self.slopes @ mix)) @ self.slopes, dtype=np.float64)


class Olmix:
    """Proposes the mix that minimises the laws near a prior, under a cap on repetition, held static.

        minimise  sum over k of b_k L_k(p) + kl KL(p || prior)     with p_d samples <= most_passes rows_d

    Reconstructed from the paper's description. The problem is convex, and solved by mirror descent. The cap concerns
    domains whose rows repeat, and holds as soon as the length of the run is known (`policies.passes`). Where the mix
    decides when the data end, the cap is that of the mix's own length, found by bisection. If all rows together are too
    few for it, it is left out, with a warning.

    Args:
        space: Domains of the run, those of the table.
        natural: (D,), natural share of each domain, the prior.
        table: Proxy runs.
        metrics: Metric -> weight b in the objective; None: all count equally.
        kl: Weight of the divergence from the prior, in nats of loss. The paper uses 0.1; others use 0.05.
        most_passes: Largest number of passes over the rows of a domain; None: no cap.
        name: See `policies.base.Policy`.

    Attributes:
        table: The table, in the order of the run's domains.
        law: The fitted law.
        passes: The limit on passes.
        proxy_tokens: Tokens of the proxy runs; None: unknown.

    Raises:
        ConfigurationError: A setting is invalid, a loss is not positive, or no proxy had a domain of the prior.
        DomainError: The table has other domains than the run.
        MissingExtraError: scipy is not installed.
    """

    always_answers = True
    needs = frozenset({LENGTH})

    def __init__(
        self,
        space: DomainSpace,
        natural: FloatArray,
        *,
        table: ProxyTable,
        metrics: Mapping[str, float] | None = None,
        kl: float = 0.1,
        most_passes: float | None = MOST_PASSES,
        name: str = "olmix",
    ) -> None:
        if not is_finite_number(kl) or kl <= 0:
            raise ConfigurationError(f"kl is {shown(kl)}; it must be a positive number")
        self.name = name
        self.table = table.ordered(space.names)
        self.proxy_tokens = table.tokens
        self._prior = validate_mix(natural, space.names)
        self.table.check_coverage(self._prior)
        self.passes = PassLimit(space, most_passes)
        self._weights = self.table.metric_weights(metrics)
        self.law = LogLinearLaw(self.table)
        self._kl, self._most_passes = kl, most_passes
        self._solved: dict[tuple[Any, ...] | None, FloatArray] = {}
        """Length of the run, in a hashable form -> mix; None -> the mix without a cap."""

    def needed(self, decision: int) -> frozenset[str]:
        """The length of the run, before each decision: it becomes known with the loader."""
        return self.passes.needed(decision)

    def inform(self, need: str, evidence: Any) -> None:
        """Takes the length of the run.

        Raises:
            PolicyError: The evidence is of another kind.
        """
        if need != LENGTH:
            raise PolicyError(
                f"policy {self.name!r} needs the length of the run, but received {shown(need)}: {shown(evidence)}"
            )
        self.passes.inform(evidence)

    def propose(self, history: History) -> FloatArray:
        """The mix; it changes only when the length of the run becomes known.

        Raises:
            DomainError: The history lacks a domain.
        """
        length = self.passes.length
        key = None if length is None else (*length.rows.tolist(), *length.repeats.tolist(), length.limit, length.ending)
        if key not in self._solved:
            self._solved[key] = self._capped(self._uncapped())
        return self._over(history, self._solved[key])

    def unlimited(self, history: History) -> FloatArray:
        """The mix without a cap: (D,), sums to 1.

        Raises:
            DomainError: The history lacks a domain.
        """
        return self._over(history, self._uncapped())

    def _uncapped(self) -> FloatArray:
        if None not in self._solved:
            self._solved[None] = self.solve()
        return self._solved[None]

    def _over(self, history: History, mix: FloatArray) -> FloatArray:
        return validate_mix(dict(zip(self.table.domains, mix.tolist(), strict=True)), history.domains)

    def solve(self, ceilings: FloatArray | None = None) -> FloatArray:
        """The mix of least objective: (D,), sums to 1.

        Args:
            ceilings: (D,), largest weight of each domain; None: no cap.
        """
        prior = self._prior
        high = np.where(prior > 0, 1.0 if ceilings is None else ceilings, 0.0)
        low, step = np.zeros_like(prior), 1.0
        log_prior = np.log(np.maximum(prior, _SMALLEST))
        mix = project_to_bounds(prior, low, high)
        value = self.objective(mix)
        for _ in range(_MOST_STEPS):
            # A step of mirror descent, with the divergence from the prior kept exact: weights stay positive.
            logits = np.log(np.maximum(mix, 1e-300)) - step * self.law.gradient(mix, self._weights)
            logits = (logits + step * self._kl * log_prior) / (1 + step * self._kl)
            tried = np.where(prior > 0, np.exp(logits - logits.max()), 0.0)
            tried = project_to_bounds(tried / tried.sum(), low, high)
            found = self.objective(tried)
            if found > value + 1e-15:
                step /= 2
                continue
            moved = float(np.abs(tried - mix).max())
            mix, value = tried, found
            if moved < _ACCURACY * min(1.0, step):
                break
        return mix

    def objective(self, mix: FloatArray) -> float:
        """Weighted sum of the predicted losses, and the divergence from the prior: (D,) -> number."""
        support = mix > 0
        divergence = float(np.sum(mix[support] * np.log(mix[support] / self._prior[support])))
        return float(self.law.predict(mix[None])[0] @ self._weights) + self._kl * divergence

    def _capped(self, mix: FloatArray) -> FloatArray:
        """The mix of least objective among those that keep to the cap in a run of their own length: (D,).

        The ceilings of a run are those of a shorter one, scaled down. The scale is bisected between ceilings that are
        tight enough and too loose ones.

        Args:
            mix: (D,), the mix without a cap.
        """
        tight = self.passes.ceilings(mix)
        if tight is None or self._keeps(mix, tight):
            return mix
        best, least, scale, most = None, 1.0, 1.0, 1.0 / float(tight.min())
        for _ in range(_MOST_SOLUTIONS):
            tried = np.minimum(1.0, scale * tight)
            if tried[self._prior > 0].sum() <= 1:
                break
            found = self.solve(tried)
            own = self.passes.ceilings(found)
            assert own is not None
            if self._keeps(found, own):
                best, least = found, scale
                if np.allclose(own, tried, rtol=_BISECTED, atol=0):
                    break
            elif best is None:
                tight = np.minimum(tight, own)
                most = 1.0 / float(tight.min())
                continue
            else:
                most = scale
            scale = float(np.sqrt(least * most))
        if best is not None:
            return best
        length = self.passes.length
        assert length is not None
        logger.warning(
            "policy %r has no cap on repetition: no mix was found that makes at most most_passes=%g passes over the "
            "%d rows of the domains in a run of %.0f samples: add rows, or train for fewer steps",
            self.name,
            self._most_passes,
            int(length.rows.sum()),
            length.samples(mix),
        )
        return mix

    def _keeps(self, mix: FloatArray, ceilings: FloatArray) -> bool:
        return bool((mix <= ceilings * (1 + _TOLERANCE)).all())

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the length of the run is asked for before each decision."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Does nothing: there is no state."""


def _fitted(mixes: FloatArray, losses: FloatArray, optimize: Any) -> FloatArray:
    """c and A of one metric: (1 + D,)."""

    def objective(parameters: FloatArray) -> tuple[float, FloatArray]:
        raised = np.exp(np.minimum(mixes @ parameters[1:], 50.0))
        residuals = parameters[0] + raised - losses
        small = np.abs(residuals) <= HUBER
        values = np.where(small, 0.5 * residuals**2, HUBER * (np.abs(residuals) - 0.5 * HUBER))
        slopes = np.where(small, residuals, HUBER * np.sign(residuals)) / len(losses)
        return float(values.mean()), np.concatenate([[slopes.sum()], (slopes * raised) @ mixes])

    bounds = [(0.0, float(losses.min()))] + [(None, None)] * mixes.shape[1]
    best = None
    for fraction in _FRACTIONS:
        irreducible = fraction * float(losses.min())
        # Weights sum to 1, so a constant in the exponent adds to all slopes: those of rare domains start at the mean.
        logs = np.log(losses - irreducible)
        slopes = logs.mean() + np.linalg.lstsq(mixes, logs - logs.mean(), rcond=1e-10)[0]
        first = np.concatenate([[irreducible], slopes])
        found = optimize.minimize(
            objective,
            first,
            jac=True,
            bounds=bounds,
            method="L-BFGS-B",
            options={"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-10},
        )
        if best is None or found.fun < best.fun:
            best = found
    assert best is not None
    fitted = np.asarray(best.x, dtype=np.float64)
    fitted[1:][(mixes <= 0).all(axis=0)] = (mixes @ fitted[1:]).mean()  # nothing is known about these domains
    return fitted
