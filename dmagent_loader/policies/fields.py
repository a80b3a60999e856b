"""Checks of what a policy is told by names: the fields of the environment, and the topics of the domains."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from dmagent_loader._validation import shown
from dmagent_loader.mixture.domains import CANONICAL_TOPICS, SOURCE, TARGET, Domain, DomainSpace, nearest_topic
from dmagent_loader.mixture.simplex import FloatArray

logger = logging.getLogger(__name__)

_TOPICS = "dmagent_loader.mixture.CANONICAL_TOPICS"
_SHOWN_TOPICS = 4
_STARVED, _NOTICED = 20.0, 0.02
"""A domain with this part of its field's rows is starved if its weight is so many times smaller."""
_PREFIX = 4
"""Letters of the shortest word that stands for a longer one, as ``math`` for ``mathematics``."""


@runtime_checkable
class FieldPolicy(Protocol):
    """A policy that treats the fields of the environment differently (see `policies.base.Policy`)."""

    def check_fields(self, fields: Sequence[str]) -> None:
        """Checks the environment's fields before the first decision, and logs the role of each.

        Args:
            fields: Names, in the environment's order.

        Raises:
            ConfigurationError: The policy cannot decide on feedback of these fields.
        """
        ...


def report_roles(label: str, keep: str, acquire: str, space: DomainSpace, *, remedy: str | None) -> None:
    """Logs which field of the environment is kept and which is acquired.

    Warns if both are the same, or if the names speak for the opposite.

    Args:
        label: Policy, as messages call it.
        keep: Field that the model must not forget.
        acquire: Field that the model should learn.
        space: Domains of the run.
        remedy: Way to exchange the roles; None: they were set on purpose.
    """
    logger.info("%s keeps the field %r of the environment and acquires %r", label, keep, acquire)
    if keep == acquire:
        logger.warning(
            "both roles of %s are the field %r, so it has nothing to weigh what is learnt against: if the environment "
            "has another field, name two in roles=",
            label,
            keep,
        )
    source, target = (_words(d.name for d in space.domains if d.field == field) for field in (SOURCE, TARGET))
    misplaced = [
        f"{field!r}, the field to {role}, is named like {side} domains"
        for field, role, side, like, unlike in (
            (keep, "keep", TARGET, target, source),
            (acquire, "acquire", SOURCE, source, target),
        )
        if _is_named_like(field, like) and not _is_named_like(field, unlike)
    ]
    if remedy is not None and misplaced:
        logger.warning(
            "%s: %s would work towards forgetting what should be learnt; if the fields are exchanged, %s (a "
            "configuration with sorted names exchanges them)",
            " and ".join(misplaced),
            label,
            remedy,
        )


def report_unknown_topics(label: str, space: DomainSpace) -> None:
    """Warns of domains of unknown topics, which count as evenly spread over all 26 topics.

    If the topics of all domains of a field are unknown, only the total weight of the field is decided, and row counts
    split it. If only some are unknown, domains of known topics receive only the excess over an even spread, which may
    be zero.

    Args:
        label: Policy, as messages call it.
        space: Domains of the run.
    """
    undecided: list[str] = []
    for field in space.fields:
        members = [domain for domain in space.domains if domain.field == field]
        unknown = [domain.name for domain in members if domain.topic is None and domain.composition is None]
        if not unknown or len(members) == 1:
            continue
        if len(unknown) == len(members):
            undecided += unknown
            continue
        logger.warning(
            "the topics of %s are unknown, but those of other domains of the field %r are known: unknown topics count "
            "as an even spread over all topics, which may leave the other domains without weight; state the topics by "
            "compositions=, or name each domain after one of %s%s",
            shown(unknown),
            field,
            _TOPICS,
            _suggested(unknown),
        )
    if undecided:
        logger.warning(
            "the topics of %s are unknown, so %s sets only the total weight of each field, and row counts split it: "
            "name each domain after one of %s%s, pass the topics of its documents by compositions=, or measure their "
            "influence, which needs no topics (policy='influence', or topics='influence' beside an agent)",
            shown(undecided),
            label,
            _TOPICS,
            _suggested(undecided),
        )


def report_topics(space: DomainSpace, sources: Mapping[str, str]) -> None:
    """Logs what is known of the topics of each domain, and how.

    Args:
        space: Domains of the run.
        sources: Domain -> origin of its composition, of those that were measured.
    """
    named = sum(domain.composition is None and domain.topic is not None for domain in space.domains)
    lines = [f"{named} of {len(space.domains)} by their names"] if named else []
    lines += [line for domain in space.domains if (line := _topics_line(domain, sources))]
    logger.info("topics of the domains:%s", "".join(f"\n  {line}" for line in lines))


def _topics_line(domain: Domain, sources: Mapping[str, str]) -> str:
    if domain.composition is None:
        if domain.topic is not None:
            return ""
        meant = nearest_topic(domain.name.rsplit("/", 1)[-1])
        return f"{domain.name}: unknown" + (f" (is {meant!r} meant?)" if meant else "")
    shares = domain.topic_distribution()
    order = [i for i in np.argsort(-shares) if shares[i] > 0]
    listed = ", ".join(f"{CANONICAL_TOPICS[i]} {shares[i]:.0%}" for i in order[:_SHOWN_TOPICS])
    more = f", {len(order) - _SHOWN_TOPICS} more" if len(order) > _SHOWN_TOPICS else ""
    return f"{domain.name}: {listed}{more} ({sources.get(domain.name, 'compositions=')})"


def report_starved(label: str, space: DomainSpace, mix: FloatArray, natural: FloatArray) -> None:
    """Warns of domains to which a first proposal gives far less than their rows, because of their topics.

    Args:
        label: Policy, as messages call it.
        space: Domains of the run.
        mix: (D,) proposal, sums to 1.
        natural: (D,) share of all rows of each domain.
    """
    starved = []
    for field in space.fields:
        members = list(space.members(field))
        weight, rows = mix[members].sum(), natural[members].sum()
        if weight <= 0 or rows <= 0:
            continue
        for i in members:
            share, expected = float(mix[i] / weight), float(natural[i] / rows)
            if expected >= _NOTICED and share < expected / _STARVED:
                starved.append(f"{space.names[i]!r} {share:.2%} of its field (it has {expected:.0%} of the rows)")
    if starved:
        logger.warning(
            "%s gives %s: it finds their topics in other domains, or does not want them. Compositions that are a guess "
            "can do that: measure them (`dmagent compose`), or set a floor (GuardConfig(floor=...))",
            label,
            ", ".join(starved),
        )


def _suggested(names: Iterable[str]) -> str:
    alike = {name: nearest_topic(name.rsplit("/", 1)[-1]) for name in names}
    meant = ", ".join(f"{name!r} for {topic!r}" for name, topic in alike.items() if topic is not None)
    return f" (is {meant} meant?)" if meant else ""


def _words(names: Iterable[str]) -> set[str]:
    return {word for name in names for word in re.split(r"[\W_]+", name.lower()) if word}


def _is_named_like(field: str, words: set[str]) -> bool:
    return any(
        a == b or (min(len(a), len(b)) >= _PREFIX and (a.startswith(b) or b.startswith(a)))
        for a in _words([field])
        for b in words
    )
