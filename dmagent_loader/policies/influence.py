"""Policy that turns the measured influence of each domain on each question set into a mix.

For the domains d of one field of the data:

    gain_kd = b_k (value_kd - mean) / u_k                        for each question field k, with its error_kd
    tau2_k  = var(gain_k) - F mean(error2_k)                     fields with tau2_k <= 0 are left out
    z_d     = sum over k of tau2_k / (tau2_k + error2_kd) gain_kd / sqrt(sum over k of var(gain_k))
    weight_d proportional to base_d exp(z_d / temperature)

u_k, the standard deviation of value_k over all domains of the run, makes question fields comparable. Means are over the
domains of the field, and so are errors: those of differences among its domains (`Influence.contrasts`). F is the 99%
quantile of the variance of pure noise: scores that noise alone could explain leave the base mix unchanged. The base mix
follows the natural shares, or the topics of the questions if these are combined with influence; in it, a domain counts
by its rows without copies, because the first step on boilerplate may help, the next ones do not. No domain gets more
than `most_boost` times its base weight, or more passes over its rows than `most_passes` (`policies.passes`).

Shapes: K question fields, D domains.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmagent_loader._validation import is_count, is_finite_number, shown, whole_number
from dmagent_loader.errors import ConfigurationError, DomainError, PolicyError, StateError
from dmagent_loader.mixture.domains import FIELDS, TARGET, DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.influence import Influence
from dmagent_loader.mixture.simplex import FloatArray, validate_mix
from dmagent_loader.policies.guard import project_to_bounds
from dmagent_loader.policies.informed import INFLUENCE, LENGTH
from dmagent_loader.policies.passes import MOST_PASSES, PassLimit
from dmagent_loader.policies.question_topics import DEFAULT_TARGET_SHARE, QuestionTopics

logger = logging.getLogger(__name__)

NORMAL_QUANTILE = 2.326
"""99% of a standard normal distribution."""

_STATE_KEYS = {"measured", "unavailable", "slots_done", "topics"}


class InfluencePolicy:
    """Proposes a mix from measured influence, and the base mix where there is no evidence.

    Args:
        space: Domains of the run, of any fields.
        natural: (D,), natural share of each domain, such as its share of rows; sums to 1.
        balance: Weight of each field of the data, or a number for the target field alone, with the rest split by the
            natural shares. None: 0.3 for the field ``target`` if there are other fields too, else the natural shares.
        temperature: Sensitivity to the scores: a domain one standard deviation above the mean gets
            exp(1 / temperature) times the weight of one at the mean. None: 0.5, or 1.0 if topics are combined.
        field_weights: b, weight of each question field; None: equal.
        most_boost: Maximum ratio of a domain's weight to its base weight; None: no limit.
        most_passes: Maximum number of passes over the rows of a repeating domain in the whole run, if its length is
            known; None: no limit. See `policies.passes`.
        every: Number of decisions between two measurements, which are averaged; None: a measurement before the first
            decision only.
        reliability: Share of the variance of scores that must not be noise, in each field of the data. Below it, the
            measurement is repeated on further rows.
        max_measurements: Most measurements before one decision.
        topics: Policy whose mix replaces the natural shares as the fallback if influence cannot be measured and, with
            `combine`, as the base. None: natural shares for both.
        combine: Whether `topics` is also the base mix; False: only the fallback.
        name: See `policies.base.Policy`.

    Raises:
        ConfigurationError: A setting is invalid.
        DomainError: `balance` is for a field that the data do not have, or for the only one.
    """

    always_answers = True

    def __init__(
        self,
        space: DomainSpace,
        natural: FloatArray,
        *,
        balance: float | Mapping[str, float] | None = None,
        temperature: float | None = None,
        field_weights: Mapping[str, float] | None = None,
        most_boost: float | None = 12.0,
        most_passes: float | None = MOST_PASSES,
        every: int | None = None,
        reliability: float = 0.8,
        max_measurements: int = 4,
        topics: QuestionTopics | None = None,
        combine: bool = False,
        name: str = "influence",
    ) -> None:
        if temperature is None:
            temperature = 1.0 if combine else 0.5
        if not is_finite_number(temperature) or temperature <= 0:
            raise ConfigurationError(f"temperature is {shown(temperature)}; it must be a positive number")
        if most_boost is not None and (not is_finite_number(most_boost) or most_boost < 1):
            raise ConfigurationError(f"most_boost is {shown(most_boost)}; it must be 1 or more, or None for no limit")
        if not is_finite_number(reliability) or not 0 <= reliability < 1:
            raise ConfigurationError(f"reliability is {shown(reliability)}; it must be at least 0 and less than 1")
        if combine and topics is None:
            raise ConfigurationError("combine=True needs topics=, the policy whose mix is combined with influence")
        self.name = name
        self.needs = frozenset({INFLUENCE, LENGTH}) | (topics.needs if topics is not None else frozenset())
        self.space = space
        self.natural = validate_mix(natural, space.names)
        self._masses = field_masses(space, self.natural, balance)
        self._temperature, self._most_boost = temperature, most_boost
        self.passes = PassLimit(space, most_passes)
        self._field_weights = None if field_weights is None else dict(field_weights)
        self._every = None if every is None else whole_number("every", every, least=1)
        self._topics, self._combine = topics, combine
        self._reliability = reliability
        self._max_measurements = whole_number("max_measurements", max_measurements, least=1)
        self._checked_fields: tuple[str, ...] = ()
        self._measured: list[Influence] = []
        self._in_slot = 0
        self._is_unavailable = False
        self._slots_done, self._slot = 0, 0
        """Slots whose measurement was tried, successfully or not, and the slot asked for last. Without `every` there is
        one slot for the run, otherwise one for `every` decisions."""

    @classmethod
    def configured(cls, space: DomainSpace, natural: FloatArray, **settings: Any) -> InfluencePolicy:
        """The policy of the name ``"influence"``.

        It starts from the topics of the questions if the topics of all domains are known, which was better in every
        environment measured (docs/influence-results.md). Otherwise it starts from the natural shares. If the fields of
        the domains are source and target, topics are also the fallback when influence cannot be measured.

        Args:
            space: Domains of the run.
            natural: (D,), natural share of each domain; sums to 1.
            settings: Further arguments of the class.
        """
        topics = QuestionTopics(space, natural) if set(space.fields) == set(FIELDS) else None
        labelled = all(domain.topic is not None or domain.composition is not None for domain in space.domains)
        return cls(space, natural, topics=topics, combine=labelled and topics is not None, **settings)

    @property
    def influence(self) -> Influence | None:
        """Mean of all measurements so far; None before the first."""
        return self._measured[0].averaged(self._measured[1:]) if self._measured else None

    def check_fields(self, fields: Sequence[str]) -> None:
        """If topics are combined, logs which field they keep and which they acquire; see `policies.fields`.

        Raises:
            ConfigurationError: `field_weights` names other fields.
        """
        self._check_weights(fields)
        if self._topics is not None and self._combine and tuple(fields) != self._checked_fields:
            self._checked_fields = tuple(fields)
            self._topics.report_roles(fields)

    def needed(self, decision: int) -> frozenset[str]:
        """Influence before the first decision and then at intervals of `every`; the questions if topics are used; the
        length of the run.

        Influence is needed again after a measurement that was not reliable.
        """
        wanted = self.passes.needed(decision)
        self._slot = 0 if self._every is None else decision // self._every
        if self._slot >= self._slots_done:
            wanted |= {INFLUENCE}
        if self._topics is not None and (self._combine or self._is_unavailable):
            wanted |= self._topics.needed(decision) - {LENGTH}
        return wanted

    def inform(self, need: str, evidence: Any) -> None:
        """Takes a measurement (`Influence`, or None if it is unavailable), the questions, or the length of the run.

        Raises:
            PolicyError: The evidence is of another kind.
            DomainError: The measurement lacks a domain of the run.
        """
        if need == LENGTH:
            self.passes.inform(evidence)
            return
        if need != INFLUENCE and self._topics is not None:
            self._topics.inform(need, evidence)
            return
        if need != INFLUENCE or not (evidence is None or isinstance(evidence, Influence)):
            raise PolicyError(
                f"policy {self.name!r} needs an Influence, but received {shown(need)}: {shown(evidence)}; pass the "
                "result of Environment.influence"
            )
        if evidence is not None:
            evidence.values(self._measurable())
            self._measured.append(evidence)
            self._in_slot += 1
        self._is_unavailable = not self._measured
        is_done = evidence is None or self._in_slot >= self._max_measurements
        if is_done or self.reliability() >= self._reliability:
            self._slots_done, self._in_slot = self._slot + 1, 0

    def reliability(self) -> float:
        """Share of the variance of scores that is not noise: that of the field of the data where it is least.

        1 if no field has domains to compare, 0 before the first measurement.
        """
        influence = self.influence
        if influence is None:
            return 0.0
        measurable = set(self._measurable())
        shares = [1.0]
        for name in self._masses:
            members = [self.space.names[i] for i in self.space.members(name) if self.space.names[i] in measurable]
            if len(members) > 1:
                gains, squared_errors = comparable(influence, members, self._weights(influence))
                variance = float(gains.var(axis=1, ddof=1).sum())
                shares.append(1.0 - float(squared_errors.mean(axis=1).sum()) / variance if variance > 0 else 0.0)
        return max(0.0, min(shares))

    def propose(self, history: History) -> FloatArray:
        """The mix of the next step; it changes only with a new measurement, or if the limit on passes does.

        Raises:
            DomainError: The history has other domains.
            PolicyError: There is no measurement yet.
        """
        return self.passes.limited(self.unlimited(history))

    def unlimited(self, history: History) -> FloatArray:
        """The mix before the limit on passes: (D,), sums to 1.

        Raises:
            DomainError: The history has other domains.
            PolicyError: There is no measurement yet.
        """
        if history.domains != self.space.names:
            raise DomainError(
                f"the history has the domains {shown(list(history.domains))}, but this policy was built for "
                f"{shown(list(self.space.names))}"
            )
        influence = self.influence
        if influence is None and not self._is_unavailable:
            raise PolicyError(
                f"policy {self.name!r} has no measurement yet: use DataMixingCallback or Mixing, which measure before "
                "the first decision, or call inform('influence', environment.influence(model, rows))"
            )
        base = self.base()
        result = np.zeros(len(self.space))
        measurable = self._measurable()
        for name, mass in self._masses.items():
            members = [i for i in self.space.members(name) if base[i] > 0 or self.natural[i] > 0]
            shares = base[members] / base[members].sum()
            known = [self.space.names[i] for i in members]
            if influence is not None and set(known) <= set(measurable):
                shares = tilted(
                    shares,
                    standardised(influence, known, self._weights(influence)),
                    temperature=self._temperature,
                    most_boost=self._most_boost,
                )
            result[members] = mass * shares
        return np.asarray(result / result.sum(), dtype=np.float64)

    def state_dict(self) -> dict[str, Any]:
        """All measurements, as JSON values."""
        return {
            "measured": [influence.to_json() for influence in self._measured],
            "unavailable": self._is_unavailable,
            "slots_done": self._slots_done,
            "topics": None if self._topics is None else self._topics.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`.

        Raises:
            StateError: The state is damaged or of another policy.
        """
        if not isinstance(state, Mapping) or not set(state) >= _STATE_KEYS:
            raise StateError(
                f"the state of policy {self.name!r} is {shown(state)}: it is damaged or of another policy; load an "
                "older one"
            )
        if not is_count(state["slots_done"]):
            raise StateError(
                f"the state of policy {self.name!r} has slots_done {shown(state['slots_done'])}, not a count: it is "
                "damaged; load an older one"
            )
        measured = [Influence.from_json(value) for value in state["measured"]]
        for influence in measured:
            influence.values(self._measurable())
        if self._topics is not None and state["topics"] is not None:
            self._topics.load_state_dict(state["topics"])
        self._measured, self._is_unavailable = measured, bool(state["unavailable"])
        self._slots_done = state["slots_done"]

    def _measurable(self) -> list[str]:
        """Domains with rows."""
        return [name for name, share in zip(self.space.names, self.natural, strict=True) if share > 0]

    @property
    def uses_topics(self) -> bool:
        """Whether `base` follows the topics of the questions."""
        topics = self._topics
        return topics is not None and (self._combine or self._is_unavailable) and bool(topics.topics)

    def base(self) -> FloatArray:
        """Weights that influence starts from, (D,); only their ratios inside a field of the data matter.

        A domain counts by its rows without copies.
        """
        weights = self._topics.within() if self._topics is not None and self.uses_topics else self.natural
        influence = self.influence
        if influence is None:
            return weights
        originals = np.array([influence.originals(name) for name in self.space.names])
        return np.asarray(weights * originals, dtype=np.float64)

    def _weights(self, influence: Influence) -> FloatArray:
        self._check_weights(influence.fields)
        given = self._field_weights
        return np.ones(len(influence.fields)) if given is None else np.array([given[name] for name in influence.fields])

    def _check_weights(self, fields: Sequence[str]) -> None:
        given = self._field_weights
        if given is not None and set(given) != set(fields):
            raise ConfigurationError(
                f"field_weights names {sorted(given)}, but the environment's fields are {list(fields)}: give each of "
                "them a weight"
            )


def measured_influence(state: Any) -> Influence | None:
    """Mean of the measurements in a state of `InfluencePolicy`, or of a combination with one; None: there are none.

    Args:
        state: Return value of a policy's `state_dict`; None: the policy has no state.

    Raises:
        StateError: A measurement cannot be read.
    """
    if not isinstance(state, Mapping):
        return None
    if not set(state) >= _STATE_KEYS:  # `CombinedPolicy` saves the state of each part under a label
        found = map(measured_influence, state.values())
        return next((influence for influence in found if influence is not None), None)
    if not state["measured"]:
        return None
    first, *others = map(Influence.from_json, state["measured"])
    return first.averaged(others)


def standardised(influence: Influence, domains: list[str], weights: FloatArray) -> FloatArray:
    """Scores z of the module docstring for the domains of one field: (domains,), 0 if noise explains the differences.

    Args:
        influence: Influence of all domains of the run.
        domains: Names of the field's domains.
        weights: (K,), b in the module docstring.
    """
    if len(domains) < 2:
        return np.zeros(len(domains))
    shrunk, scale = shrunken(*comparable(influence, domains, weights))
    return np.asarray(shrunk.sum(axis=0) / scale, dtype=np.float64)


def shrunken(gains: FloatArray, squared_errors: FloatArray) -> tuple[FloatArray, float]:
    """Gains of the module docstring times tau2 / (tau2 + error2), and the denominator of z.

    Args:
        gains: (K, domains), from `comparable`, as `squared_errors`.
        squared_errors: (K, domains).

    Returns:
        (K, domains), 0 where noise explains the differences, and the denominator, 1 if it does in all fields.
    """
    variances = gains.var(axis=1, ddof=1, keepdims=True)
    signal = variances - noise_quantile(gains.shape[1] - 1) * squared_errors.mean(axis=1, keepdims=True)
    has_signal = signal > 0
    if not has_signal.any():
        return np.zeros_like(gains), 1.0
    shrunk = np.divide(signal, signal + squared_errors, out=np.zeros_like(gains), where=has_signal) * gains
    return shrunk, float(np.sqrt(variances[has_signal].sum()))


def comparable(influence: Influence, domains: list[str], weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Gains of the module docstring and their squared errors, (K, domains) each; arguments as in `standardised`."""
    units = influence.values().std(axis=1)
    scale = np.divide(weights, units, out=np.zeros_like(units), where=units > 0)[:, None]
    differences, errors = influence.contrasts(domains)
    return scale * differences, (scale * errors) ** 2


def tilted(base: FloatArray, z: FloatArray, *, temperature: float, most_boost: float | None) -> FloatArray:
    """base exp(z / temperature), normalised, with each weight at most `most_boost` times its base: all (domains,)."""
    logits = z / temperature
    weights = base * np.exp(logits - logits.max())
    weights = weights / weights.sum()
    if most_boost is None:
        return np.asarray(weights, dtype=np.float64)
    return project_to_bounds(weights, np.zeros_like(base), np.minimum(1.0, most_boost * base))


def noise_quantile(degrees: int) -> float:
    """99% quantile of the sample variance of unit-variance noise, by the Wilson-Hilferty approximation."""
    if degrees < 1:
        return float("inf")
    part = 2 / (9 * degrees)
    return float((1 - part + NORMAL_QUANTILE * np.sqrt(part)) ** 3)


def field_masses(
    space: DomainSpace, natural: FloatArray, balance: float | Mapping[str, float] | None
) -> dict[str, float]:
    """Weight of each field of the data, sums to 1; `balance` as in `InfluencePolicy`.

    Raises:
        ConfigurationError: The weights are not a distribution.
        DomainError: `balance` is for a field that the data do not have, or for the only one.
    """
    masses = space.field_mass(natural)
    if balance is None:
        if TARGET not in masses or len(masses) == 1:
            return masses
        balance = DEFAULT_TARGET_SHARE
    if isinstance(balance, Mapping):
        mix = validate_mix(balance, space.fields)
        return {name: float(weight) for name, weight in zip(space.fields, mix, strict=True)}
    if not is_finite_number(balance) or not 0 <= balance <= 1:
        raise ConfigurationError(f"balance is {shown(balance)}; the target field's weight must lie between 0 and 1")
    if TARGET not in masses:
        raise DomainError(
            f"balance={balance} is the weight of the field 'target', but the fields are {list(masses)}: pass a mapping "
            "from field to weight"
        )
    if len(masses) == 1:
        raise DomainError(
            f"balance={balance} is the weight of the field 'target', but the data have no other field, so it would "
            "have no effect: leave it out, or add domains of another field"
        )
    rest = sum(mass for name, mass in masses.items() if name != TARGET)
    return {
        name: float(balance) if name == TARGET else (1 - float(balance)) * mass / rest for name, mass in masses.items()
    }
