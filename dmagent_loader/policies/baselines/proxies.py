"""`ProxyTable`: the mixes and losses of a user's proxy runs, from which RegMix and Olmix are fitted."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmagent_loader._validation import shown
from dmagent_loader.errors import ConfigurationError, DomainError, require_extra
from dmagent_loader.mixture.simplex import FloatArray, IntArray

INDEX = "index"
MIX, LOSS = "mix/", "loss/"
"""Prefixes of the columns of a table in one file: those of the package's metrics."""

_SUM_TOLERANCE = 0.01
"""Weights are often rounded to three digits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ProxyTable:
    """Proxy runs, each with a constant mix, and the losses at their ends.

    Shapes: N runs, D domains, K metrics.

    Args:
        domains: D names.
        metrics: K names.
        mixes: (N, D); each row sums to 1 within 1%, and is divided by its sum.
        losses: (N, K), lower is better: losses, bits per byte, or minus a score.
        run_tokens: Tokens that one run was trained on; None: unknown.
        parameters: Parameters of the proxy; None: unknown.

    Raises:
        ConfigurationError: The arrays do not fit together, or hold other values.
    """

    domains: tuple[str, ...]
    metrics: tuple[str, ...]
    mixes: FloatArray
    losses: FloatArray
    run_tokens: int | None = None
    parameters: int | None = None

    def __post_init__(self) -> None:
        mixes, losses = np.asarray(self.mixes, dtype=np.float64), np.asarray(self.losses, dtype=np.float64)
        if mixes.ndim != 2 or losses.ndim != 2 or len(mixes) != len(losses) or not len(mixes):
            raise ConfigurationError(
                "a table of proxies needs a row of weights and a row of losses for each run, but the weights have "
                f"shape {mixes.shape} and the losses {losses.shape}"
            )
        if mixes.shape[1] != len(self.domains) or losses.shape[1] != len(self.metrics) or not self.metrics:
            raise ConfigurationError(
                f"a table of proxies has {mixes.shape[1]} columns of weights for {len(self.domains)} domains and "
                f"{losses.shape[1]} columns of losses for {len(self.metrics)} metrics"
            )
        sums = mixes.sum(axis=1)
        wrong = ~np.isfinite(mixes).all(axis=1) | (mixes < 0).any(axis=1) | ~(abs(sums - 1) <= _SUM_TOLERANCE)
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            raise ConfigurationError(
                f"the weights of proxy run {first} sum to {sums[first]:.6g}, or are not all at least 0: each run needs "
                f"a mix of {shown(list(self.domains))}"
            )
        if not np.isfinite(losses).all():
            first = int(np.flatnonzero(~np.isfinite(losses).all(axis=1))[0])
            raise ConfigurationError(
                f"the losses of proxy run {first} are not all finite numbers: leave runs out that diverged"
            )
        object.__setattr__(self, "mixes", mixes / sums[:, None])
        object.__setattr__(self, "losses", losses)

    def __len__(self) -> int:
        return len(self.mixes)

    @classmethod
    def from_csv(
        cls,
        mixes: str | os.PathLike[str],
        losses: str | os.PathLike[str] | None = None,
        *,
        run_tokens: int | None = None,
        parameters: int | None = None,
    ) -> ProxyTable:
        """Reads a table from one file, or from one with the mixes and one with the losses.

        In one file, the columns ``mix/<domain>`` and ``loss/<metric>`` count, and others are ignored. In two files, all
        columns do, except ``index``, by which the rows of both are matched; without it, they are matched by position.

        Args:
            mixes: CSV file with a header.
            losses: Second file; None: there is one.
            run_tokens: See `ProxyTable`.
            parameters: See `ProxyTable`.

        Raises:
            ConfigurationError: A file cannot be read, or is not such a table.
        """
        first = _read(mixes)
        if losses is None:
            weights = {name.removeprefix(MIX): column for name, column in first.items() if name.startswith(MIX)}
            measured = {name.removeprefix(LOSS): column for name, column in first.items() if name.startswith(LOSS)}
            if not weights or not measured:
                raise ConfigurationError(
                    f"{mixes} has the columns {shown(list(first))}: it needs mix/<domain> for each domain and "
                    "loss/<metric> for each metric, or pass the losses as a second file"
                )
        else:
            second = _read(losses)
            weights, measured = _matched(first, second, f"{mixes} and {losses}")
        return cls(
            domains=tuple(weights),
            metrics=tuple(measured),
            mixes=_numbers(weights, mixes),
            losses=_numbers(measured, losses or mixes),
            run_tokens=run_tokens,
            parameters=parameters,
        )

    @property
    def tokens(self) -> int | None:
        """Tokens that all runs together were trained on; None: unknown."""
        return None if self.run_tokens is None else len(self) * self.run_tokens

    @property
    def flops(self) -> float | None:
        """Training compute of all runs, 6 x parameters x tokens; None: unknown."""
        return None if self.tokens is None or self.parameters is None else 6.0 * self.parameters * self.tokens

    def subset(self, rows: Sequence[int] | IntArray) -> ProxyTable:
        """A table of some of the runs."""
        return ProxyTable(
            domains=self.domains,
            metrics=self.metrics,
            mixes=self.mixes[rows],
            losses=self.losses[rows],
            run_tokens=self.run_tokens,
            parameters=self.parameters,
        )

    def ordered(self, domains: Sequence[str]) -> ProxyTable:
        """The same table with its domains in another order.

        Raises:
            DomainError: The domains are not those of the table.
        """
        if sorted(domains) != sorted(self.domains):
            raise DomainError(
                f"the proxies were trained on the domains {shown(list(self.domains))}, but the run has "
                f"{shown(list(domains))}: a fit holds for its own domains only"
            )
        order = [self.domains.index(name) for name in domains]
        return ProxyTable(
            domains=tuple(domains),
            metrics=self.metrics,
            mixes=self.mixes[:, order],
            losses=self.losses,
            run_tokens=self.run_tokens,
            parameters=self.parameters,
        )

    def metric_weights(self, weights: Mapping[str, float] | None) -> FloatArray:
        """Weight of each metric in the objective: (K,), sum to 1.

        Args:
            weights: Metric -> weight; metrics left out do not count. None: all count equally.

        Raises:
            ConfigurationError: A name is not a metric, or the weights are not positive numbers.
        """
        if weights is None:
            return np.full(len(self.metrics), 1 / len(self.metrics))
        unknown = sorted(set(weights) - set(self.metrics))
        values = np.array([float(weights.get(name, 0.0)) for name in self.metrics])
        if unknown or not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
            raise ConfigurationError(
                f"metrics is {shown(dict(weights))}; it must map some of {shown(list(self.metrics))} to positive "
                "weights"
            )
        return np.asarray(values / values.sum(), dtype=np.float64)


def rank_correlation(predicted: FloatArray, measured: FloatArray) -> FloatArray:
    """Spearman's rank correlation of each column: (N, K), (N, K) -> (K,); NaN for a constant column.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    stats = require_extra("scipy.stats", "baselines")
    ranks = [stats.rankdata(values, axis=0) for values in (predicted, measured)]
    centred = [rank - rank.mean(axis=0) for rank in ranks]
    norms = np.sqrt((centred[0] ** 2).sum(axis=0) * (centred[1] ** 2).sum(axis=0))
    products = (centred[0] * centred[1]).sum(axis=0)
    return np.asarray(np.divide(products, norms, out=np.full_like(norms, np.nan), where=norms > 0), dtype=np.float64)


def _read(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Columns of a CSV file, by name.

    Raises:
        ConfigurationError: It cannot be read, or its rows differ in length.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(f"the table {os.fspath(path)!r} cannot be read: {error}") from error
    header = rows[0] if rows else []
    bad = next((number for number, row in enumerate(rows, 1) if len(row) != len(header)), None)
    if len(rows) < 2 or bad is not None or len(set(header)) < len(header):
        fault = f"row {bad} has another number of columns" if bad is not None else "it has no rows, or a name twice"
        raise ConfigurationError(f"{os.fspath(path)!r} is no table with a header and a row for each proxy run: {fault}")
    return {name: [row[position] for row in rows[1:]] for position, name in enumerate(header)}


def _matched(
    mixes: dict[str, list[str]], losses: dict[str, list[str]], label: str
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Columns of two tables without ``index``, with their rows in the same order."""
    left, right = mixes.pop(INDEX, None), losses.pop(INDEX, None)
    if left is None or right is None:
        return mixes, losses
    if len(set(left)) < len(left) or sorted(left) != sorted(right):
        raise ConfigurationError(
            f"the columns 'index' of {label} do not name the same runs, each once: every run needs both its mix and "
            "its losses"
        )
    order = [right.index(name) for name in left]
    return mixes, {name: [column[row] for row in order] for name, column in losses.items()}


def _numbers(columns: Mapping[str, Sequence[str]], path: str | os.PathLike[str]) -> FloatArray:
    """(N, columns)."""
    try:
        return np.array([[float(value) for value in column] for column in columns.values()]).T
    except ValueError as error:
        raise ConfigurationError(f"{os.fspath(path)!r} has a value that is not a number: {error}") from error
