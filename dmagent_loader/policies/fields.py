"""Checks of what a policy is told by names: the fields of the environment, and the topics of the domains."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from dmagent_loader._validation import shown
from dmagent_loader.mixture.domains import SOURCE, TARGET, DomainSpace, nearest_topic

logger = logging.getLogger(__name__)

_TOPICS = "dmagent_loader.mixture.domains.CANONICAL_TOPICS"
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
    """Logs which field of the environment is kept and which is acquired, and warns if the names speak for the opposite.

    Args:
        label: Policy, as messages call it.
        keep: Field that the model must not forget.
        acquire: Field that the model should learn.
        space: Domains of the run.
        remedy: Way to exchange the roles; None: they were set on purpose.
    """
    logger.info("%s keeps the field %r of the environment and acquires %r", label, keep, acquire)
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
