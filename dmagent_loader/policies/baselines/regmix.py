"""RegMix, arXiv 2407.01492: a regression from the mixes of proxy runs to their losses, and the mix it predicts best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from dmagent_loader._validation import is_finite_number, shown, whole_number
from dmagent_loader.errors import ConfigurationError, require_extra
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray, validate_mix
from dmagent_loader.policies.baselines.proxies import ProxyTable

Regressor = Literal["lightgbm", "linear", "log-linear"]

_LEAF = 20
"""Least number of runs in a leaf, LightGBM's default."""
LEAST_TREE_RUNS = 2 * _LEAF
"""Runs that LightGBM needs for a single split."""
_LIGHTGBM = {
    "objective": "regression",
    "learning_rate": 0.01,
    "min_data_in_leaf": _LEAF,
    "num_threads": 1,
    "deterministic": True,
    "verbosity": -1,
}
_ROUNDS = 1000
_SMALLEST_WEIGHT = 1e-3
_RIDGE = 1.0


class Regression:
    """A regression from mixes to losses.

    ``"lightgbm"`` and ``"linear"`` (ordinary least squares on the weights) are the two of the paper. The gradient
    boosting has the settings of the authors' code (1,000 trees, learning rate 0.01), but not its early stopping, which
    looks at the test set; it needs 40 runs at least. ``"log-linear"`` is a ridge regression on log(weight + 0.001),
    standardised (extension): it needs no package, and sees that the first percent of a domain matters most.

    Shapes: N runs, D domains, K metrics.

    Args:
        table: Proxy runs.
        regressor: Kind of regression.
        seed: Seed of the gradient boosting.

    Raises:
        ConfigurationError: There is no such regressor, there are too few runs, or all mixes are the same.
        MissingExtraError: lightgbm is not installed.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> mixes = rng.dirichlet([1.0, 1.0], 20)
        >>> table = ProxyTable(
        ...     domains=("web", "math"), metrics=("loss",), mixes=mixes, losses=3.0 - mixes @ [[0.0], [0.5]]
        ... )
        >>> Regression(table, "linear").predict(np.array([[0.5, 0.5]])).round(3).tolist()
        [[2.75]]
    """

    def __init__(self, table: ProxyTable, regressor: Regressor = "lightgbm", *, seed: int = 0) -> None:
        if regressor not in get_args(Regressor):
            raise ConfigurationError(f"regressor is {shown(regressor)}; choose one of {list(get_args(Regressor))}")
        table.check_variation()
        self._kind = regressor
        if regressor == "lightgbm":
            lightgbm = require_extra("lightgbm", "baselines")
            if len(table) < LEAST_TREE_RUNS:
                raise ConfigurationError(
                    f"{len(table)} proxy runs cannot be split with {_LEAF} in a leaf, so LightGBM would predict a "
                    "constant: use regressor='log-linear' or Olmix, or add runs"
                )
            settings = {**_LIGHTGBM, "seed": whole_number("seed", seed, least=0)}
            self._trees: list[Any] = [
                lightgbm.train(settings, lightgbm.Dataset(table.mixes, losses), num_boost_round=_ROUNDS)
                for losses in table.losses.T
            ]
            return
        features = self._features(table.mixes)
        self._centre, offset = features.mean(axis=0), table.losses.mean(axis=0)
        spread = features.std(axis=0)
        self._scale = np.where((spread > 0) & (regressor == "log-linear"), spread, 1.0)
        inputs = (features - self._centre) / self._scale
        ridge = _RIDGE if regressor == "log-linear" else 0.0
        # The weights of a mix sum to 1, so the plain matrix is singular: lstsq takes the solution of least norm.
        normal = inputs.T @ inputs + ridge * np.eye(inputs.shape[1])
        self._slopes = np.linalg.lstsq(normal, inputs.T @ (table.losses - offset), rcond=1e-10)[0]
        self._offset = offset

    def predict(self, mixes: FloatArray) -> FloatArray:
        """Predicted losses: (N, D) -> (N, K)."""
        if self._kind == "lightgbm":
            return np.stack([trees.predict(mixes) for trees in self._trees], axis=1)
        inputs = (self._features(mixes) - self._centre) / self._scale
        return np.asarray(self._offset + inputs @ self._slopes, dtype=np.float64)

    def _features(self, mixes: FloatArray) -> FloatArray:
        return np.log(mixes + _SMALLEST_WEIGHT) if self._kind == "log-linear" else mixes


class RegMix:
    """Proposes the mix that a regression on proxy runs predicts to be best, held static.

    The mix is the mean of the `best` of `candidates` mixes drawn from a Dirichlet distribution around the natural
    shares, by the predicted loss. The defaults of these numbers are those of the authors' notebook
    (github.com/sail-sg/regmix).

    Args:
        space: Domains of the run, those of the table.
        natural: (D,), natural share of each domain.
        table: Proxy runs.
        regressor: See `Regression`.
        metrics: Metric -> weight in the objective; None: all count equally. The paper takes one, the loss on Pile-CC.
        candidates: Number of candidates.
        best: Number of candidates that are averaged, fewer than all.
        concentration: Sum of the parameters of the Dirichlet distribution; 1, as in the authors' code, draws sparse
            mixes, and large values keep to the natural shares.
        seed: Seed of the draws and of the regression.
        name: See `policies.base.Policy`.

    Attributes:
        table: The table, in the order of the run's domains.
        regression: The fitted regression.
        mix: (D,), the mix.
        proxy_tokens: Tokens of the proxy runs; None: unknown.

    Raises:
        ConfigurationError: A setting is invalid, no proxy had a domain of the prior, or the regression predicts the
            same loss for all candidates.
        DomainError: The table has other domains than the run.
        MissingExtraError: lightgbm is not installed.
    """

    always_answers = True

    def __init__(
        self,
        space: DomainSpace,
        natural: FloatArray,
        *,
        table: ProxyTable,
        regressor: Regressor = "lightgbm",
        metrics: Mapping[str, float] | None = None,
        candidates: int = 100_000,
        best: int = 128,
        concentration: float = 1.0,
        seed: int = 0,
        name: str = "regmix",
    ) -> None:
        candidates, best = whole_number("candidates", candidates, least=1), whole_number("best", best, least=1)
        if best >= candidates:
            raise ConfigurationError(
                f"best={best} of candidates={candidates} would average all of them, whatever their predicted losses: "
                "lower best or raise candidates"
            )
        seed = whole_number("seed", seed, least=0)
        if not is_finite_number(concentration) or concentration <= 0:
            raise ConfigurationError(f"concentration is {shown(concentration)}; it must be a positive number")
        self.name = name
        self.table = table.ordered(space.names)
        self.proxy_tokens = table.tokens
        weights = self.table.metric_weights(metrics)
        prior = validate_mix(natural, space.names)
        self.table.check_coverage(prior)
        self.regression = Regression(self.table, regressor, seed=seed)
        drawn = np.zeros((candidates, len(space)))
        drawn[:, prior > 0] = np.random.default_rng(seed).dirichlet(concentration * prior[prior > 0], candidates)
        predicted = self.regression.predict(drawn) @ weights
        if (prior > 0).sum() > 1 and np.ptp(predicted) == 0:
            raise ConfigurationError(
                f"regressor={regressor!r} predicts a loss of {predicted[0]:g} for all {candidates} candidates, so none "
                "is best: add proxy runs, or use regressor='log-linear' or Olmix"
            )
        order = np.argsort(predicted, kind="stable")
        self.mix = validate_mix(drawn[order[:best]].mean(axis=0), space.names, renormalize=True)

    def propose(self, history: History) -> FloatArray:
        """The mix.

        Raises:
            DomainError: The history lacks a domain.
        """
        return validate_mix(dict(zip(self.table.domains, self.mix.tolist(), strict=True)), history.domains)
