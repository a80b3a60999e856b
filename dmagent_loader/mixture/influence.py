"""`Influence`: the effect of training on each domain on each field of the environment, with standard errors.

`Environment.influence` returns it, and `policies.InfluencePolicy` decides on it.

Shapes: K fields of the environment, D domains, G groups of questions, n groups of a domain's rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from dmagent_loader._validation import is_count, is_finite_number, shown
from dmagent_loader.errors import ConfigurationError, DomainError, InfluenceError, StateError
from dmagent_loader.mixture.simplex import FloatArray


class Score(NamedTuple):
    """The influence of one domain on one field, in nats per unit of learning rate (see `Influence`).

    Attributes:
        value: Influence; positive if training on the domain raises the field's mean answer log-probability.
        error: Standard error of `value`, over the domain's rows and the field's questions.
    """

    value: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Influence:
    """Influence of D domains on K fields: field -> domain -> `Score`.

    Unit: one optimizer update with learning rate lr on rows of the domain alone changes the field's feedback (mean
    answer log-probability, in nats) by lr x value, to first order. **Positive means that training on the domain helps
    the field.** Only comparisons inside one measurement are meaningful: the unit depends on the preconditioner.

    Args:
        scores: Field -> domain -> score; every field has the same domains.
        way: Method of measurement: ``"gradient"``, ``"ghost"``, ``"reverse"`` or another name.
        by_questions: Field -> (G, D), the influence on each of G groups of its questions, domains in the order of the
            scores. Empty: unknown; the errors of comparisons are then those of the single scores.
        rows: Domain -> number of different rows read.
        copies: Domain -> number of further rows read that are copies of those.
        questions: Field -> number of questions read.
        tokens: Tokens processed by the model in one direction; a backward pass counts twice.
        seconds: Duration of the measurement.
        notes: Deviations from the requested measurement, for example after a lack of memory.

    Raises:
        ConfigurationError: A field or group of questions has scores for other domains.
        InfluenceError: A score is not finite, or an error is negative.

    Example:
        >>> influence = Influence(
        ...     scores={"general": {"source/Science": Score(0.8, 0.1), "source/News": Score(-0.2, 0.1)}}, way="gradient"
        ... )
        >>> influence["general"]["source/Science"].value
        0.8
    """

    scores: Mapping[str, Mapping[str, Score]]
    way: str
    by_questions: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    copies: Mapping[str, int] = field(default_factory=dict)
    questions: Mapping[str, int] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.scores or not all(self.scores.values()):
            raise ConfigurationError("an influence needs scores: pass at least one field and one domain")
        domains = self.domains
        for name, by_domain in self.scores.items():
            if tuple(by_domain) != domains:
                raise ConfigurationError(
                    f"field {name!r} has scores for {shown(list(by_domain))}, but the first field has scores for "
                    f"{shown(list(domains))}: pass the same domains in the same order for every field"
                )
        if self.by_questions:
            shapes = {name: np.shape(self.by_questions.get(name, ())) for name in self.scores}
            if len(set(shapes.values())) > 1 or next(iter(shapes.values()))[1:] != (len(domains),):
                raise ConfigurationError(
                    f"by_questions has the shapes {shapes}: pass (groups, {len(domains)} domains) for every "
                    "field, or leave it out"
                )
        self._refuse_no_numbers()

    @property
    def fields(self) -> tuple[str, ...]:
        """The K fields of the environment."""
        return tuple(self.scores)

    @property
    def domains(self) -> tuple[str, ...]:
        """The D domains."""
        return tuple(next(iter(self.scores.values())))

    def __getitem__(self, field_name: str) -> Mapping[str, Score]:
        return self.scores[field_name]

    def values(self, domains: Sequence[str] | None = None) -> FloatArray:
        """The scores as numbers: (K, D).

        Args:
            domains: Domains to select, in order; None: all.

        Raises:
            DomainError: A domain was not measured.
        """
        return self._numbers(domains)[..., 0]

    def errors(self, domains: Sequence[str] | None = None) -> FloatArray:
        """The standard errors: (K, D); arguments and errors as in `values`."""
        return self._numbers(domains)[..., 1]

    def contrasts(self, domains: Sequence[str] | None = None) -> tuple[FloatArray, FloatArray]:
        """Differences from the mean over some domains, for comparisons among them.

        Another choice of questions changes the scores of similar domains alike. That part of a score's error cancels in
        comparisons, so the errors can be far smaller than those of the single scores.

        Args:
            domains: Domains to compare, in order; None: all.

        Returns:
            Differences and their standard errors, (K, D) each.

        Raises:
            DomainError: A domain was not measured.
        """
        values, errors = self.values(domains), self.errors(domains)
        differences = values - values.mean(axis=1, keepdims=True)
        by_group = self._by_group()
        if by_group is None or values.shape[1] < 2:
            return differences, errors
        chosen = self.domains if domains is None else domains
        among = by_group[..., self._places(chosen)]
        centred = among - among.mean(axis=-1, keepdims=True)
        degrees = values.shape[1] / (values.shape[1] - 1)
        over_questions = degrees * variance_over_questions(centred)[:, None]
        return differences, np.sqrt(self._variance_over_rows(errors) + over_questions)

    def originals(self, domain: str) -> float:
        """Share of the rows read of a domain that are not copies of another one, 1 if it is unknown."""
        rows, copies = self.rows.get(domain, 0), self.copies.get(domain, 0)
        return rows / (rows + copies) if rows else 1.0

    def averaged(self, others: Sequence[Influence]) -> Influence:
        """The unweighted mean of this and other measurements, which have read different rows.

        If every measurement knows the influence on each group of questions, only the errors over rows shrink, because
        the questions are the same. Otherwise all errors do.

        Args:
            others: Measurements of the same fields and domains, for example at later points of a run.

        Raises:
            DomainError: A measurement lacks a domain.
            ConfigurationError: A measurement has other fields.
        """
        parts = [self, *others]
        if any(set(part.fields) != set(self.fields) for part in parts):
            raise ConfigurationError(
                f"the measurements have fields {[list(part.fields) for part in parts]}, so they have no mean: average "
                "measurements of one environment"
            )
        order = [[part.fields.index(name) for name in self.fields] for part in parts]
        values = np.mean([part.values(self.domains)[k] for part, k in zip(parts, order, strict=True)], axis=0)
        groups = [part._by_group(self.fields, self.domains) for part in parts]
        known = [group for group in groups if group is not None]
        is_known = len(known) == len(parts) and len({group.shape for group in known}) == 1
        by_group = np.mean(known, axis=0) if is_known else None
        errors = [part.errors(self.domains)[k] for part, k in zip(parts, order, strict=True)]
        if by_group is None:
            squares = [error**2 for error in errors]
        else:
            squares = [part._variance_over_rows(error) for part, error in zip(parts, errors, strict=True)]
        variance = np.sum(squares, axis=0) / len(parts) ** 2
        if by_group is not None:
            variance = variance + variance_over_questions(by_group)[:, None]
        return Influence(
            scores=scores_from(self.fields, self.domains, values, np.sqrt(variance)),
            way=self.way,
            by_questions={} if by_group is None else grouped(self.fields, by_group),
            rows={name: sum(part.rows.get(name, 0) for part in parts) for name in self.domains},
            copies={name: sum(part.copies.get(name, 0) for part in parts) for name in self.domains},
            questions=self.questions,
            tokens=sum(part.tokens for part in parts),
            seconds=sum(part.seconds for part in parts),
            notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        )

    def to_json(self) -> dict[str, Any]:
        """The measurement as JSON values; `from_json` makes an equal object of them.

        The order of fields and domains is a value of its own, because JSON objects need not keep theirs: the Trainer
        sorts their keys, and `by_questions` lists the domains in order.
        """
        return {
            "fields": list(self.fields),
            "domains": list(self.domains),
            "scores": {
                name: {domain: [score.value, score.error] for domain, score in by_domain.items()}
                for name, by_domain in self.scores.items()
            },
            "way": self.way,
            "by_questions": {name: [list(group) for group in groups] for name, groups in self.by_questions.items()},
            "rows": dict(self.rows),
            "copies": dict(self.copies),
            "questions": dict(self.questions),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, value: Any) -> Influence:
        """Rebuilds a measurement from `to_json`.

        Raises:
            StateError: The value is not a measurement, or has numbers that are not finite.
        """
        try:
            fields, domains = value["fields"], value["domains"]
            if any(sorted(by_domain) != sorted(domains) for by_domain in value["scores"].values()):
                raise ValueError("scores of other domains than those listed")
            if sorted(value["scores"]) != sorted(fields):
                raise ValueError("scores of other fields than those listed")
            scores = {name: {domain: _score(value["scores"][name][domain]) for domain in domains} for name in fields}
            copies = dict(value.get("copies", {}))
            counts = [*value["rows"].values(), *copies.values(), *value["questions"].values(), value["tokens"]]
            if not all(map(is_count, counts)) or not is_finite_number(value["seconds"]):
                raise ValueError("counts or seconds that are not numbers")
            return cls(
                scores=scores,
                way=str(value["way"]),
                by_questions={
                    str(name): [[_finite(number) for number in group] for group in groups]
                    for name, groups in value["by_questions"].items()
                },
                rows=dict(value["rows"]),
                copies=copies,
                questions=dict(value["questions"]),
                tokens=value["tokens"],
                seconds=float(value["seconds"]),
                notes=tuple(str(note) for note in value["notes"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StateError(
                f"the saved influence cannot be read ({error!r}): the state is damaged or was edited; load an older one"
            ) from error

    def _refuse_no_numbers(self) -> None:
        """A policy would take scores that are not finite for noise, and no state could be saved with them."""
        values, errors = self.values(), self.errors()
        bad = ~np.isfinite(values) | ~np.isfinite(errors) | (errors < 0)
        by_group = self._by_group()
        if by_group is not None:
            bad |= ~np.isfinite(by_group).all(axis=1)
        if bad.any():
            first_field, first_domain = np.argwhere(bad)[0]
            raise InfluenceError(
                f"{int(bad.sum())} of {bad.size} scores are not finite or have a negative error (first: that of "
                f"{self.domains[first_domain]!r} on {self.fields[first_field]!r}): the model has probably diverged; "
                "check its loss"
            )

    def _by_group(self, fields: Sequence[str] | None = None, domains: Sequence[str] | None = None) -> FloatArray | None:
        """Influence on each group of questions, (K, G, D); None: unknown."""
        if not self.by_questions:
            return None
        places = self._places(domains or self.domains)
        return np.array([self.by_questions[name] for name in fields or self.fields], dtype=np.float64)[..., places]

    def _places(self, domains: Sequence[str]) -> list[int]:
        """Numbers of some domains, whose search in a tuple would take quadratic time."""
        numbers = {name: number for number, name in enumerate(self.domains)}
        return [numbers[name] for name in domains]

    def _variance_over_rows(self, errors: FloatArray) -> FloatArray:
        """The part of squared errors (K, D) of this measurement's scores that is due to the choice of rows."""
        by_group = self._by_group()
        assert by_group is not None
        return np.maximum(errors**2 - variance_over_questions(by_group)[:, None], 0.0)

    def _numbers(self, domains: Sequence[str] | None) -> FloatArray:
        chosen = self.domains if domains is None else tuple(domains)
        known = set(self.domains)
        missing = [name for name in chosen if name not in known]
        if missing:
            raise DomainError(
                f"the influence of {shown(missing)} was not measured, only that of {shown(list(self.domains))}: "
                "measure it on rows of all domains of the run"
            )
        return np.array([[self.scores[name][domain] for domain in chosen] for name in self.fields], dtype=np.float64)


def scores_from(
    fields: Sequence[str], domains: Sequence[str], values: FloatArray, errors: FloatArray
) -> dict[str, dict[str, Score]]:
    """Field -> domain -> score, from values and errors, (K, D) each."""
    return {
        name: {domain: Score(float(values[k, d]), float(errors[k, d])) for d, domain in enumerate(domains)}
        for k, name in enumerate(fields)
    }


def grouped(fields: Sequence[str], by_group: FloatArray) -> dict[str, list[list[float]]]:
    """`Influence.by_questions` of an array (K, G, D)."""
    return {name: by_group[k].tolist() for k, name in enumerate(fields)}


def variance_over_questions(by_group: FloatArray) -> FloatArray:
    """Squared standard error over groups of questions, as a mean over the domains: (K, G, D) -> (K,).

    Four groups are too few for the variance of one domain alone.
    """
    groups = by_group.shape[1]
    if groups < 2:
        return np.zeros(len(by_group))
    return np.asarray((by_group.var(axis=1, ddof=1) / groups).mean(axis=-1), dtype=np.float64)


def estimate(samples: Sequence[FloatArray], weights: Sequence[FloatArray]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Scores and standard errors from single observations.

    An observation is the influence of one group of a domain's rows on one group of a field's questions. Rows and
    questions are two crossed samples: variance = variance over rows / n + variance over question groups / G. The exact
    formula subtracts an interaction term. Leaving it out can make the error too large, but never too small. A domain
    with a single row group gets the mean variance over rows of the other domains.

    Args:
        samples: Observations of each of the D domains, (K, G, n); the number of row groups n may differ.
        weights: Shares of the questions of each field, (G,), sum to 1.

    Returns:
        Values and errors, (K, D) each, and the influence on each group of questions, (K, G, D).

    Raises:
        ConfigurationError: No domain has more than one group of rows.
    """
    if all(part.shape[-1] < 2 for part in samples):
        raise ConfigurationError(
            "no domain has more than one row, so the variance over rows is unknown: pass several rows for each domain"
        )
    share = np.stack(weights)
    values = np.stack([np.einsum("kgn,kg->k", part, share) / part.shape[-1] for part in samples], axis=1)
    by_rows = [np.einsum("kgn,kg->kn", part, share) for part in samples]
    spreads = [part.var(axis=1, ddof=1) if part.shape[1] > 1 else None for part in by_rows]
    pooled = np.mean([spread for spread in spreads if spread is not None], axis=0)
    over_rows = np.stack(
        [(pooled if s is None else s) / part.shape[1] for s, part in zip(spreads, by_rows, strict=True)], axis=1
    )
    by_group = np.stack([part.mean(axis=-1) for part in samples], axis=-1)
    return values, np.sqrt(over_rows + variance_over_questions(by_group)[:, None]), by_group


def _score(pair: Any) -> Score:
    value, error = pair
    if not is_finite_number(value) or not is_finite_number(error) or error < 0:
        raise ValueError(f"a score of {shown(pair)}")
    return Score(float(value), float(error))


def _finite(number: Any) -> float:
    if not is_finite_number(number):
        raise ValueError(f"an influence of {shown(number)}")
    return float(number)
