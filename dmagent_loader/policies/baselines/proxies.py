"""`ProxyTable`: the mixes and losses of a user's proxy runs, from which RegMix and Olmix are fitted."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dmagent_loader._validation import is_finite_number, shown, whole_number
from dmagent_loader.errors import ConfigurationError, DomainError
from dmagent_loader.mixture.simplex import FloatArray, IntArray

INDEX = "index"
MIX, LOSS = "mix/", "loss/"
"""Prefixes of the columns of a table in one file: those of the package's metrics."""

_SAME = 1e-9
"""Difference between two weights that is rounding."""
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
        mixes, losses = _array("mixes", self.mixes), _array("losses", self.losses)
        if mixes.ndim != 2 or losses.ndim != 2 or len(mixes) != len(losses) or not len(mixes):
            raise ConfigurationError(
                "a table of proxies needs a row of weights and a row of losses for each run, but the weights have "
                f"shape {mixes.shape} and the losses {losses.shape}"
            )
        for kind, names, columns in (("domain", self.domains, mixes), ("metric", self.metrics, losses)):
            if columns.shape[1] != len(names) or not names:
                raise ConfigurationError(
                    f"a table of proxies has {columns.shape[1]} columns for the {kind}s {shown(list(names))}: give "
                    "each one column"
                )
            wrong = [name for name in names if not isinstance(name, str) or not name or names.count(name) > 1]
            if wrong:
                raise ConfigurationError(
                    f"{wrong[0]!r} cannot name a {kind} of a table of proxies: use texts that are not empty, each once"
                )
        for name in ("run_tokens", "parameters"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        _check(self.domains, mixes, self.metrics, losses, lambda run: f"proxy run {run + 1} of {len(mixes)}")
        object.__setattr__(self, "mixes", mixes / mixes.sum(axis=1, keepdims=True))
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

        In one file, the columns ``mix/<domain>`` and ``loss/<metric>`` count, and others are ignored. In two files, the
        columns with these prefixes count, or all columns if none has the prefix. If both files have a column ``index``,
        their rows are matched by it; without it, by position.

        Args:
            mixes: CSV file with a header.
            losses: Second file; None: there is one.
            run_tokens: See `ProxyTable`.
            parameters: See `ProxyTable`.

        Raises:
            ConfigurationError: A file cannot be read, or is not such a table.
        """
        first = _Columns.read(mixes)
        weights = first.under(MIX)
        if losses is None:
            measured = first.under(LOSS)
            if not weights.texts or not measured.texts:
                raise ConfigurationError(
                    f"{first.label} has the columns {shown(list(first.texts))}: it needs mix/<domain> for each domain "
                    "and loss/<metric> for each metric, or pass the losses as a second file"
                )
        else:
            second = _Columns.read(losses)
            second = second.rows(_matching(first, second))
            weights = weights if weights.texts else first.without(INDEX)
            measured = second.under(LOSS) if second.under(LOSS).texts else second.without(INDEX)
        domains = tuple(name.removeprefix(MIX) for name in weights.texts)
        metrics = tuple(name.removeprefix(LOSS) for name in measured.texts)
        values = weights.numbers(), measured.numbers()
        if len(values[0]) == len(values[1]):
            _check(domains, values[0], metrics, values[1], weights.row, measured.row)
        return cls(
            domains=domains,
            metrics=metrics,
            mixes=values[0],
            losses=values[1],
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
        return replace(self, mixes=self.mixes[rows], losses=self.losses[rows])

    def ordered(self, domains: Sequence[str], metrics: Sequence[str] | None = None) -> ProxyTable:
        """The same table with its columns in another order.

        Args:
            domains: Names of the domains.
            metrics: Names of the metrics; None: their order stays.

        Raises:
            DomainError: The domains are not those of the table.
            ConfigurationError: The metrics are not those of the table.
        """
        metrics = self.metrics if metrics is None else metrics
        if sorted(domains) != sorted(self.domains):
            raise DomainError(
                f"the proxies were trained on the domains {shown(list(self.domains))}, but the run has "
                f"{shown(list(domains))}: a fit holds for its own domains only"
            )
        if sorted(metrics) != sorted(self.metrics):
            raise ConfigurationError(
                f"the table has the metrics {shown(list(self.metrics))}, but {shown(list(metrics))} are needed: give "
                "the same losses for both"
            )
        return replace(
            self,
            domains=tuple(domains),
            metrics=tuple(metrics),
            mixes=self.mixes[:, [self.domains.index(name) for name in domains]],
            losses=self.losses[:, [self.metrics.index(name) for name in metrics]],
        )

    def check_variation(self) -> None:
        """Checks that the mixes differ, as a fit needs.

        Raises:
            ConfigurationError: All runs have the same mix.
        """
        if (np.ptp(self.mixes, axis=0) <= _SAME).all():
            raise ConfigurationError(
                f"all {len(self)} proxy runs have the same mix, so their losses say nothing about other mixes: train "
                "proxies on different mixes"
            )

    def check_coverage(self, prior: FloatArray) -> None:
        """Checks that some proxy was trained on each domain that a fit may give weight to.

        Args:
            prior: (D,), natural share of each domain.

        Raises:
            ConfigurationError: A domain with a share has weight 0 in all runs.
        """
        unseen = (prior > 0) & (self.mixes <= 0).all(axis=0)
        if unseen.any():
            names = [name for name, is_unseen in zip(self.domains, unseen, strict=True) if is_unseen]
            raise ConfigurationError(
                f"no proxy was trained on {shown(names)}, so a fit knows nothing about the effect of these domains: "
                "add proxies with them, or leave the domains out of the run"
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
        are_numbers = all(map(is_finite_number, weights.values()))
        values = np.array([float(weights.get(name, 0.0)) if are_numbers else -1.0 for name in self.metrics])
        if unknown or (values < 0).any() or values.sum() <= 0:
            raise ConfigurationError(
                f"metrics is {shown(dict(weights))}; it must map some of {shown(list(self.metrics))} to positive "
                "weights"
            )
        return np.asarray(values / values.sum(), dtype=np.float64)


def rank_correlation(predicted: FloatArray, measured: FloatArray) -> FloatArray:
    """Spearman's rank correlation of each column: (N, K), (N, K) -> (K,); NaN for a constant column."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (predicted, measured)]
    centred = [rank - rank.mean(axis=0) for rank in ranks]
    norms = np.sqrt((centred[0] ** 2).sum(axis=0) * (centred[1] ** 2).sum(axis=0))
    products = (centred[0] * centred[1]).sum(axis=0)
    return np.asarray(np.divide(products, norms, out=np.full_like(norms, np.nan), where=norms > 0), dtype=np.float64)


def _ranks(values: FloatArray) -> FloatArray:
    """Ranks in each column, the mean rank for ties: (N, K) -> (N, K)."""
    ranks = np.empty_like(values)
    for column in range(values.shape[1]):
        _, group, sizes = np.unique(values[:, column], return_inverse=True, return_counts=True)
        ranks[:, column] = (np.cumsum(sizes) - (sizes - 1) / 2)[group]
    return ranks


def _array(label: str, values: object) -> FloatArray:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{label} is {shown(values)}; it must be an array of numbers ({error})") from error


def _check(
    domains: Sequence[str],
    mixes: FloatArray,
    metrics: Sequence[str],
    losses: FloatArray,
    mixes_of: Callable[[int], str],
    losses_of: Callable[[int], str] | None = None,
) -> None:
    """Checks the values of a table.

    Args:
        domains: D names.
        mixes: (N, D).
        metrics: K names.
        losses: (N, K).
        mixes_of: Name of a row of the mixes, for messages.
        losses_of: Name of a row of the losses; None: the same.

    Raises:
        ConfigurationError: A weight is not a number of at least 0, a sum is not 1, or a loss is not finite.
    """
    for run, row in enumerate(mixes):
        for domain, weight in zip(domains, row, strict=True):
            if not weight >= 0 or not np.isfinite(weight):
                raise ConfigurationError(
                    f"the weight of domain {domain!r} is {weight:g} in {mixes_of(run)}; it must be a number of at "
                    "least 0"
                )
        total = float(row.sum())
        if abs(total - 1) > _SUM_TOLERANCE:
            are_percentages = abs(total / 100 - 1) <= _SUM_TOLERANCE
            remedy = "divide percentages by 100" if are_percentages else "give the weight of every domain of the proxy"
            raise ConfigurationError(
                f"the weights of {mixes_of(run)} sum to {total:.6g}, but those of a mix sum to 1: {remedy}"
            )
    for run, row in enumerate(losses):
        for metric, loss in zip(metrics, row, strict=True):
            if not np.isfinite(loss):
                raise ConfigurationError(
                    f"metric {metric!r} is {loss:g} in {(losses_of or mixes_of)(run)}, which is not a finite number: "
                    "leave out runs that diverged"
                )


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Columns of a CSV file.

    Args:
        label: The path, for messages.
        lines: (N,), line of each row in the file.
        texts: Name -> (N,), values as they were written.
    """

    label: str
    lines: list[int]
    texts: dict[str, list[str]]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> _Columns:
        """All columns.

        Raises:
            ConfigurationError: The file cannot be read or has no rows, rows differ in length, or a name comes twice.
        """
        label = repr(os.fspath(path))
        try:
            with Path(path).open(encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file)
                rows = [(reader.line_num, row) for row in reader if row]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigurationError(f"the table {label} cannot be read: {error}") from error
        if len(rows) < 2:
            raise ConfigurationError(f"{label} has no rows: it needs a header and a row for each proxy run")
        header = [name.strip() for name in rows[0][1]]
        if len(header) == 1 and ";" in header[0]:
            raise ConfigurationError(
                f"{label} is separated by semicolons: save it with commas, and with decimal points"
            )
        for line, row in rows[1:]:
            if len(row) != len(header):
                raise ConfigurationError(
                    f"line {line} of {label} has {len(row)} values, but the header has {len(header)} columns"
                )
        for name in header:
            if header.count(name) > 1:
                raise ConfigurationError(f"{label} has the column {name!r} twice: rename or remove one of them")
        texts = {name: [row[position] for _, row in rows[1:]] for position, name in enumerate(header)}
        return cls(label=label, lines=[line for line, _ in rows[1:]], texts=texts)

    def under(self, prefix: str) -> _Columns:
        """The columns whose names have a prefix."""
        return replace(self, texts={name: texts for name, texts in self.texts.items() if name.startswith(prefix)})

    def without(self, name: str) -> _Columns:
        """All columns but one."""
        return replace(self, texts={other: texts for other, texts in self.texts.items() if other != name})

    def rows(self, order: Sequence[int]) -> _Columns:
        """Some of the rows."""
        return replace(
            self,
            lines=[self.lines[row] for row in order],
            texts={name: [texts[row] for row in order] for name, texts in self.texts.items()},
        )

    def row(self, number: int) -> str:
        """Name of a row for messages."""
        return f"line {self.lines[number]} of {self.label}"

    def numbers(self) -> FloatArray:
        """(N, columns).

        Raises:
            ConfigurationError: A value is not a number.
        """
        values = np.zeros((len(self.lines), len(self.texts)))
        for column, (name, texts) in enumerate(self.texts.items()):
            for row, text in enumerate(texts):
                try:
                    values[row, column] = float(text)
                except ValueError as error:
                    raise ConfigurationError(
                        f"column {name!r} is {shown(text)} in {self.row(row)}; it must be a number, with a decimal "
                        "point"
                    ) from error
        return values


def _matching(mixes: _Columns, losses: _Columns) -> list[int]:
    """Row of the losses that belongs to each row of the mixes.

    Raises:
        ConfigurationError: Only one file has the column ``index``, or both do not name the same runs.
    """
    left, right = mixes.texts.get(INDEX), losses.texts.get(INDEX)
    if left is None and right is None:
        return list(range(len(losses.lines)))
    if left is None or right is None:
        has, lacks = (mixes, losses) if right is None else (losses, mixes)
        raise ConfigurationError(
            f"{has.label} has the column {INDEX!r}, but {lacks.label} has not, so their rows cannot be matched: add it "
            "to both, or remove it if the rows are in the same order"
        )
    if len(set(left)) < len(left) or sorted(left) != sorted(right):
        raise ConfigurationError(
            f"the columns {INDEX!r} of {mixes.label} and {losses.label} do not name the same runs, each once: every "
            "run needs both its mix and its losses"
        )
    return [right.index(name) for name in left]
