"""What is refused, or said in a warning, when shards are opened: damage, domains without rows, and copies."""

from __future__ import annotations

import logging
from bisect import bisect_right
from typing import Literal

import numpy as np

from dmagent_loader.errors import HOW_TO_RESUME, DamagedShardError, EmptyShardError
from dmagent_loader.shards.index.catalogue import Catalogue
from dmagent_loader.shards.sources.urls import display_url

OnDamage = Literal["raise", "skip"]

_LISTED_DAMAGES, _LISTED_COPIES, _LISTED_EMPTY = 20, 5, 5

logger = logging.getLogger(__name__)


def check_damage(catalogue: Catalogue, on_damage: OnDamage) -> None:
    """Refuses damaged shards, or says what is lost.

    Raises:
        DamagedShardError: A shard is damaged, and `on_damage` is ``"raise"``.
    """
    damage = catalogue.all_damage
    if not damage:
        return
    effects = [_damage_effect(catalogue, number) for number in range(len(catalogue.domains))]
    lines = [str(item) for item in damage[:_LISTED_DAMAGES]] + [effect for effect in effects if effect]
    if len(damage) > _LISTED_DAMAGES:
        lines.insert(_LISTED_DAMAGES, f"... and {len(damage) - _LISTED_DAMAGES} more damaged places")
    report = "\n  ".join(lines)
    if on_damage == "raise":
        raise DamagedShardError(
            f"{len(damage)} damaged place(s):\n  {report}\nRestore the shards, or pass "
            "reading=ReadingConfig(on_damage='skip') to train on the rows that are whole"
        )
    logger.warning("damaged shards, using the rows that are whole:\n  %s", report)


def _damage_effect(catalogue: Catalogue, domain: int) -> str:
    """The loss of rows in a domain, as text; a shard that was cut is compared with the intact ones beside it."""
    shards = range(*catalogue.spans[domain])
    damaged = {number: damage for number, damage in catalogue.damage.items() if number in shards}
    if not damaged:
        return ""
    kept = int(catalogue.rows[slice(*catalogue.spans[domain])].sum())
    intact = [int(catalogue.rows[number]) for number in shards if number not in damaged]
    lost, certain = 0, True
    for number, damage in damaged.items():
        estimate = sum(item.rows_lost for item in damage)
        if any(item.at_least for item in damage):
            certain = certain and bool(intact)
            missing = round(float(np.median(intact))) - int(catalogue.rows[number]) if intact else 0
            estimate = max(estimate, missing)
        lost += estimate
    left = f"domain {catalogue.domains[domain]!r}: {kept} rows are left"
    if not lost and certain:
        return f"{left}, as many as there were"
    return (
        f"{left}, {'about' if certain else 'at least'} {lost} are lost ({lost / max(1, kept + lost):.1%} of the "
        "domain), so at equal weight its rows repeat sooner"
    )


def check_emptiness(catalogue: Catalogue) -> None:
    """Refuses domains without rows, and names shards without rows.

    Raises:
        EmptyShardError: A domain has no rows.
    """
    for domain, (first, end) in zip(catalogue.domains, catalogue.spans, strict=True):
        rows = catalogue.rows[first:end]
        empty = [display_url(catalogue.url(first + int(shard))) for shard in np.flatnonzero(rows == 0)]
        if len(empty) == len(rows):
            raise EmptyShardError(
                f"domain {domain!r} has no rows: none of its {len(rows)} shard(s) holds a sample (first: "
                f"{empty[0]}); a sample is a file with an extension, such as 0001.txt; give the domain other "
                "shards or take it out"
            )
        if empty:
            logger.warning(
                "domain %r: %d of %d shards hold no sample (%s); the other shards have %d rows",
                domain,
                len(empty),
                len(rows),
                ", ".join(empty[:_LISTED_EMPTY]),
                rows.sum(),
            )


def check_copies(catalogue: Catalogue) -> None:
    """Names shards that hold the same rows as another one."""
    count, some = catalogue.copies(_LISTED_COPIES)
    if not count:
        return
    ends = [end for _, end in catalogue.spans]
    pairs = [
        " and ".join(
            f"{display_url(catalogue.url(shard))} of {catalogue.domains[bisect_right(ends, shard)]!r}" for shard in pair
        )
        for pair in some
    ]
    logger.warning(
        "%d shard(s) hold the same rows as another one, which are so trained on more than once a pass, or in two "
        "domains: %s%s; list each shard once, in one domain; %s",
        count,
        "; ".join(pairs),
        f", and {count - len(pairs)} more" if count > len(pairs) else "",
        HOW_TO_RESUME,
    )
