"""Domains, domain spaces, and the map between a user's space and the canonical one.

A *field* is the purpose of a corpus: the model must not forget ``source`` data, and should learn ``target`` data. A
*domain* is a named part of the data inside one field. The canonical space is the 26 topics of the NVIDIA domain
classifier in each of the two fields.

Shapes: U user domains, C = 52 canonical domains.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property

import numpy as np

from dmagent_loader.errors import DomainError, MixError
from dmagent_loader.mixture.simplex import FloatArray, em_projection, kl_divergence, numbers, validate_mix

SOURCE = "source"
TARGET = "target"
FIELDS = (SOURCE, TARGET)

CANONICAL_TOPICS = (
    "Adult",
    "Arts_and_Entertainment",
    "Autos_and_Vehicles",
    "Beauty_and_Fitness",
    "Books_and_Literature",
    "Business_and_Industrial",
    "Computers_and_Electronics",
    "Finance",
    "Food_and_Drink",
    "Games",
    "Health",
    "Hobbies_and_Leisure",
    "Home_and_Garden",
    "Internet_and_Telecom",
    "Jobs_and_Education",
    "Law_and_Government",
    "News",
    "Online_Communities",
    "People_and_Society",
    "Pets_and_Animals",
    "Real_Estate",
    "Science",
    "Sensitive_Subjects",
    "Shopping",
    "Sports",
    "Travel_and_Transportation",
)
"""The 26 topics of the NVIDIA domain classifier, in the order that the agent uses (paper, Fig. 1)."""

NUM_TOPICS = len(CANONICAL_TOPICS)
NUM_CANONICAL = len(FIELDS) * NUM_TOPICS


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One named part of the data.

    Args:
        name: Unique in its space, for example ``"source/Science"``.
        field: ``"source"`` or ``"target"``; other names are allowed for policies that do not need the two roles.
        composition: P(topic | this domain) over the canonical topics, or the number of its documents of each topic;
            None: the topic named by the last part of the domain name, or a uniform distribution if it names none.
    """

    name: str
    field: str
    composition: Mapping[str, float] | None = None

    @property
    def topic(self) -> str | None:
        """The canonical topic at the end of the name, if there is one."""
        last = self.name.rsplit("/", 1)[-1]
        return last if last in CANONICAL_TOPICS else None

    def topic_distribution(self) -> FloatArray:
        """P(topic | this domain): (26,), sums to 1.

        Raises:
            DomainError: The composition names an unknown topic.
            MixError: The composition neither sums to 1 nor consists of counts.
        """
        if self.composition is not None:
            unknown = sorted(set(self.composition) - set(CANONICAL_TOPICS), key=str)
            if unknown:
                nearest = {name: nearest_topic(str(name)) for name in unknown}
                meant = ", ".join(f"{name!r} for {topic!r}" for name, topic in nearest.items() if topic is not None)
                raise DomainError(
                    f"the composition of domain {self.name!r} names unknown topics {unknown}"
                    + (f" (is {meant} meant?)" if meant else "")
                    + "; topics are listed in dmagent_loader.mixture.CANONICAL_TOPICS"
                )
            try:
                values = numbers(list(self.composition.values()))
                counts = bool(np.isfinite(values).all()) and bool((values == np.floor(values)).all())
                return validate_mix(self.composition, CANONICAL_TOPICS, renormalize=counts)
            except MixError as error:
                raise MixError(
                    f"the composition of domain {self.name!r} is neither a distribution nor counts: {error}"
                ) from error
        topics = np.zeros(NUM_TOPICS)
        if self.topic is not None:
            topics[CANONICAL_TOPICS.index(self.topic)] = 1.0
        else:
            topics[:] = 1.0 / NUM_TOPICS
        return topics


def nearest_topic(name: str) -> str | None:
    """The canonical topic that a name most likely means; None: none is close.

    Example:
        >>> nearest_topic("law & government"), nearest_topic("computers"), nearest_topic("web")
        ('Law_and_Government', 'Computers_and_Electronics', None)
    """
    words = re.split(r"[\W_]+", name.lower())
    whole = {topic.lower(): topic for topic in CANONICAL_TOPICS}
    single = {word.lower(): topic for topic in CANONICAL_TOPICS for word in topic.split("_") if word != "and"}
    for known, wanted in ((whole, "_".join(words)), *((single, word) for word in words)):
        found = get_close_matches(wanted, known, 1, 0.75)
        if found:
            return known[found[0]]
    return None


def hint_of_field(name: str) -> str:
    """The probable name of a domain whose field is misspelt, for messages; empty if there is none.

    Example:
        >>> hint_of_field("sourc/web")
        " (is 'source/web' meant?)"
    """
    prefix, slash, rest = name.partition("/")
    similar = get_close_matches(prefix, FIELDS, n=1) if slash else []
    return f" (is '{similar[0]}/{rest}' meant?)" if similar else ""


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class DomainSpace:
    """An ordered list of domains.

    Example:
        >>> space = DomainSpace.from_names(["source/web", "target/math"])
        >>> space.fields
        ('source', 'target')
        >>> DomainSpace.canonical().names[21]
        'source/Science'
    """

    domains: tuple[Domain, ...]

    def __post_init__(self) -> None:
        if not self.domains:
            raise DomainError("a domain space needs at least one domain")
        seen: set[str] = set()
        for domain in self.domains:
            if not isinstance(domain.name, str) or not _is_text(domain.name):
                raise DomainError(f"domain name {domain.name!r} is not valid UTF-8 text: use text that is")
            if not domain.name or not domain.field:
                raise DomainError(f"{domain} needs both a name and a field")
            if domain.name in seen:
                raise DomainError(f"domain {domain.name!r} is listed twice: give every domain a unique name")
            seen.add(domain.name)

    @classmethod
    def canonical(cls) -> DomainSpace:
        """The paper's space: 26 topics of the source field, then 26 of the target field."""
        return cls(tuple(Domain(name=f"{f}/{topic}", field=f) for f in FIELDS for topic in CANONICAL_TOPICS))

    @classmethod
    def from_names(
        cls,
        names: Iterable[str],
        *,
        fields: Mapping[str, str] | None = None,
        compositions: Mapping[str, Mapping[str, float]] | None = None,
    ) -> DomainSpace:
        """Builds a space from domain names whose first part is the field: ``source``, ``target/math``.

        Args:
            names: Domain names, in order.
            fields: Field of each domain whose name does not contain it.
            compositions: P(topic | domain) of some or all domains, or numbers of documents by topic, by domain name.

        Raises:
            DomainError: A domain has no field, or an entry of `fields` or `compositions` names an unknown domain.
        """
        names = list(names)
        fields = dict(fields or {})
        compositions = dict(compositions or {})
        for label, mapping in (("fields", fields), ("compositions", compositions)):
            unknown = sorted(set(mapping) - set(names))
            if unknown:
                raise DomainError(f"{label} names {unknown}, which are not domains; the domains are {names}")
        domains = []
        for name in names:
            prefix = name.split("/", 1)[0]
            domain_field = fields.get(name, prefix if prefix in FIELDS else None)
            if domain_field is None:
                hint = hint_of_field(name)
                raise DomainError(
                    f"domain {name!r} belongs to no field, so it could be source or target data{hint}: name it "
                    f"'source/{name}' or 'target/{name}', or pass fields={{{name!r}: 'source'}}"
                )
            domains.append(Domain(name=name, field=domain_field, composition=compositions.get(name)))
        return cls(tuple(domains))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Domain names in order."""
        return tuple(domain.name for domain in self.domains)

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The distinct fields, in order of first appearance."""
        return tuple(dict.fromkeys(domain.field for domain in self.domains))

    def members(self, field_name: str) -> tuple[int, ...]:
        """Positions of the domains of one field.

        Raises:
            DomainError: No domain belongs to that field.
        """
        positions = tuple(i for i, domain in enumerate(self.domains) if domain.field == field_name)
        if not positions:
            raise DomainError(f"no domain belongs to field {field_name!r}; the fields are {self.fields}")
        return positions

    def index(self, name: str) -> int:
        """Position of a domain.

        Raises:
            DomainError: There is no such domain.
        """
        try:
            return self.names.index(name)
        except ValueError:
            raise DomainError(f"unknown domain {name!r}; the domains are {list(self.names)}") from None

    def mix(
        self,
        weights: Mapping[str, float] | Sequence[float] | FloatArray,
        *,
        renormalize: bool = False,
        shares: FloatArray | None = None,
    ) -> FloatArray:
        """Weights over this space as a mix: (D,), sums to 1.

        Args:
            weights: D numbers, or domain -> weight; with `shares` also field -> weight.
            renormalize: Divide by the sum, whatever it is.
            shares: (D,) proportions in which a field's weight is split over its domains, for example their rows.

        Raises:
            DomainError: A name is neither a domain nor, with `shares`, a field.
            MixError: The weights are not a distribution.
        """
        if shares is not None and isinstance(weights, Mapping) and not weights.keys().isdisjoint(self.fields):
            split: dict[str, float] = {}
            for name, weight in zip(weights, numbers(list(weights.values())).tolist(), strict=True):
                if name in self.fields and name not in self.names:
                    positions = list(self.members(name))
                    parts = shares[positions] / shares[positions].sum()
                    for position, part in zip(positions, parts, strict=True):
                        domain = self.names[position]
                        split[domain] = split.get(domain, 0.0) + weight * float(part)
                else:
                    split[name] = split.get(name, 0.0) + weight
            weights = split
        return validate_mix(weights, self.names, renormalize=renormalize)

    def as_dict(self, mix: FloatArray) -> dict[str, float]:
        """A vector over this space as a mapping from domain name to number."""
        return {name: float(value) for name, value in zip(self.names, mix, strict=True)}

    def field_mass(self, mix: FloatArray) -> dict[str, float]:
        """The mix summed over the domains of each field (the paper's 52 -> 2 reduction, D.6)."""
        return {f: float(sum(mix[i] for i in self.members(f))) for f in self.fields}

    def __len__(self) -> int:
        return len(self.domains)


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A canonical mix expressed over user domains.

    Attributes:
        mix: (U,), sums to 1.
        uncovered: Mass of the canonical mix on topics that no user domain of the field covers; it stayed in its field.
        kl: KL(a || wC) over the covered topics of each field in nats, weighted by the fields' masses. It measures the
            part of the mix that the user's domains cannot express. Uncovered mass adds nothing to it.
    """

    mix: FloatArray
    uncovered: float
    kl: float


@dataclass(frozen=True)
class DomainMap:
    """The map between a user's space and the canonical space (extension, not in the paper).

    ``composition[u, c] = P(canonical c | user domain u)``, block-diagonal by field. With one domain per field,
    `to_user` is exactly the paper's sum of 26 topics into one weight.

    Args:
        space: The user's space; its fields must be exactly ``source`` and ``target``.
        natural: (U,) natural shares, the starting point of the projection; None: equal shares.
        iterations: EM steps of the projection; 1 is the Bayes split.
    """

    space: DomainSpace
    natural: FloatArray | None = None
    iterations: int = 50
    composition: FloatArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if set(self.space.fields) != set(FIELDS):
            raise DomainError(
                f"the agent needs domains in both fields 'source' and 'target', but the fields are {self.space.fields}"
            )
        if self.iterations < 1:
            raise DomainError(f"a projection of {self.iterations} iterations would ignore the agent: use at least 1")
        if self.natural is not None:
            natural = np.asarray(self.natural, dtype=np.float64)
            if natural.shape != (len(self.space),) or not np.isfinite(natural).all() or (natural < 0).any():
                raise MixError(
                    f"natural shares must be {len(self.space)} finite numbers of 0 or more, one for each domain, but "
                    f"are {natural.tolist()}"
                )
            object.__setattr__(self, "natural", natural)
        composition = np.zeros((len(self.space), NUM_CANONICAL))
        for row, domain in enumerate(self.space.domains):
            start = FIELDS.index(domain.field) * NUM_TOPICS
            composition[row, start : start + NUM_TOPICS] = domain.topic_distribution()
        object.__setattr__(self, "composition", composition)

    def to_canonical(self, mix: FloatArray) -> FloatArray:
        """The user mix as the agent sees it: pC.

        Args:
            mix: (..., U), sums to 1.

        Returns:
            (..., 52), sums to 1.
        """
        return np.asarray(mix @ self.composition, dtype=np.float64)

    def to_user(self, canonical: FloatArray) -> Projection:
        """The user mix closest to the agent's: minimises KL(a || wC) inside each field.

        Args:
            canonical: (52,), sums to 1.
        """
        natural = np.ones(len(self.space)) if self.natural is None else self.natural
        mix = np.zeros(len(self.space))
        reached = kl = 0.0
        for position, field_name in enumerate(FIELDS):
            topics = slice(position * NUM_TOPICS, (position + 1) * NUM_TOPICS)
            members = list(self.space.members(field_name))
            mass = float(canonical[topics].sum())
            if mass <= 0:
                continue
            start = natural[members]
            start = start if start.sum() > 0 else np.ones(len(members))
            block = self.composition[members][:, topics]
            covered = (block[start > 0] > 0).any(axis=0)
            expressed = np.where(covered, canonical[topics], 0.0)
            expressed_mass = float(expressed.sum())
            if expressed_mass > 0:
                shares = em_projection(block, canonical[topics] / mass, start, self.iterations)
                reached += expressed_mass
                kl += mass * kl_divergence(expressed / expressed_mass, shares @ block)
            else:
                shares = start / start.sum()
            mix[members] = mass * shares
        return Projection(mix=mix / mix.sum(), uncovered=max(0.0, 1.0 - reached), kl=max(0.0, kl))


def start_state_mix(
    space: DomainSpace, natural: FloatArray, weights: Mapping[str, float] | None, *, are_topics: bool = False
) -> FloatArray:
    """The mix of the base model's own training data (paper, 3.1).

    Args:
        space: The domains.
        natural: (D,) share of all rows of each domain.
        weights: Domain or field -> weight; or canonical topic -> share or number of documents, which becomes the
            closest mix of the source domains (`DomainMap.to_user`). None: the source domains' shares of rows.
        are_topics: Whether the weights are of topics, even if domains have the same names.

    Returns:
        (D,), sums to 1.

    Raises:
        DomainError: A domain is unknown.
        MixError: The weights are not a distribution.
    """
    ambiguous = set() if are_topics else set(space.names)
    if isinstance(weights, Mapping) and weights and set(weights) <= set(CANONICAL_TOPICS) - ambiguous:
        topics = Domain(name="start_state", field=SOURCE, composition=weights).topic_distribution()
        return DomainMap(space, natural=natural).to_user(np.concatenate([topics, np.zeros(NUM_TOPICS)])).mix
    if weights is not None:
        return space.mix(weights, shares=natural)
    source = np.array([d.field == SOURCE for d in space.domains])
    kept = np.where(source, natural, 0.0)
    return kept / kept.sum() if kept.sum() > 0 else natural
