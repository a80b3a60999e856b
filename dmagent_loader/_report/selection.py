"""Groups of domains, each of which is one area of a chart: the fields, or the largest domains and the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dmagent_loader.mixture.domains import Domain, DomainSpace
from dmagent_loader.mixture.simplex import FloatArray

Groups = Sequence[tuple[Domain, Sequence[int]]]
"""An area of a chart, and the positions of its domains."""


def by_field(space: DomainSpace) -> Groups:
    """One group for each field."""
    return [(Domain(name=field, field=field), space.members(field)) for field in space.fields]


def largest(space: DomainSpace, sizes: FloatArray, most: int) -> Groups:
    """The largest domains, and one group for the rest of each field; every domain alone if there are at most `most`.

    Args:
        space: D domains.
        sizes: (D,) sizes of the domains.
        most: Maximum number of domains that stand alone.
    """
    order = np.argsort(-sizes, kind="stable")
    alone = set(order[:most].tolist()) if len(space) > most else set(range(len(space)))
    groups: list[tuple[Domain, Sequence[int]]] = []
    for field in space.fields:
        members = space.members(field)
        groups += [(space.domains[i], (i,)) for i in members if i in alone]
        rest = [i for i in members if i not in alone]
        if len(rest) == 1:
            groups.append((space.domains[rest[0]], rest))
        elif rest:
            groups.append((Domain(name=f"{field}: {len(rest):,} other domains", field=field), rest))
    return groups
