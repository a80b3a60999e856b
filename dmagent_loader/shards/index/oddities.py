"""What is odd about the rows of a domain, as sentences: said when shards are opened, before a run trips over it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dmagent_loader.shards.index.catalogue import Catalogue
from dmagent_loader.shards.index.row_kinds import COLLAPSED, RowKind, parse_kinds
from dmagent_loader.shards.sources.urls import display_url

_NEARLY_ALL = 0.8
"""Share of the rows of a domain with an extension from which on the others are odd."""


def oddities(catalogue: Catalogue) -> Iterator[str]:
    """Sentences about rows unlike nearly all rows of their domain, rows made of many files, and hidden files."""
    kinds_of_text = [parse_kinds(text) for text in catalogue.kinds]
    are_odd = np.array([len(kinds) > 1 or _is_collapsed(kinds[0]) for kinds in kinds_of_text], bool)
    for domain, (first, end) in zip(catalogue.domains, catalogue.spans, strict=True):
        texts, rows = catalogue.kind[first:end], catalogue.rows[first:end]
        if not are_odd[texts].any() and (texts == texts[0]).all():
            continue
        found, total = [], np.bincount(texts, weights=rows)
        for text, shard, shards in zip(*np.unique(texts, return_index=True, return_counts=True), strict=True):
            for kind in kinds_of_text[text]:
                count = int(total[text]) if kind.rows is None else kind.rows * int(shards)
                found.append(_Rows(kind, count, _place(catalogue, kind, first + int(shard))))
        yield from _odd_rows(domain, int(rows.sum()), [rows for rows in found if rows.count])
    for domain, (first, end) in zip(catalogue.domains, catalogue.spans, strict=True):
        hidden = {number: count for number, count in catalogue.hidden.items() if first <= number < end}
        if hidden:
            yield (
                f"domain {domain!r}: {sum(hidden.values())} hidden files, whose names begin with a dot (.DS_Store, "
                f"._name, .gitkeep), are left out of {len(hidden)} of its shards (first: "
                f"{display_url(catalogue.url(min(hidden)))})"
            )


@dataclass(frozen=True)
class _Rows:
    """Rows of one kind in a domain, and where the first of them is."""

    kind: RowKind
    count: int
    place: str


def _odd_rows(domain: str, total: int, found: Sequence[_Rows]) -> Iterator[str]:
    """Sentences about the rows of one domain, which has `total` of them."""
    collapsed = [rows for rows in found if _is_collapsed(rows.kind)]
    if collapsed:
        count = sum(rows.count for rows in collapsed)
        yield (
            f"domain {domain!r}: {count} of {total} rows {'is' if count == 1 else 'are'} made of a dozen files or more "
            f"of one kind, {', '.join(collapsed[0].kind.extensions)} (first: {collapsed[0].place}), because the key of "
            "a row ends at the first dot of a file name; if each file is a row, and the names have dots in them, pass "
            "reading=ReadingConfig(key_ends_at='last-dot')"
        )
    having: Counter[str] = Counter()
    for rows in found:
        having.update(dict.fromkeys(rows.kind.extensions, rows.count))
    for extension, count in having.items():
        lacking = [rows for rows in found if extension not in rows.kind.extensions]
        if count >= _NEARLY_ALL * total and lacking:
            missing = sum(rows.count for rows in lacking)
            yield (
                f"domain {domain!r}: {missing} of {total} rows {'has' if missing == 1 else 'have'} no {extension!r}, "
                f"which nearly all have (first: {lacking[0].place}, with {', '.join(lacking[0].kind.extensions)}): "
                "whatever needs it fails there; leave such files out when the shards are written"
            )


def _place(catalogue: Catalogue, kind: RowKind, shard: int) -> str:
    key = "every row" if kind.key is None else f"row {kind.key!r}"
    return f"{key} of {display_url(catalogue.url(shard))}"


def _is_collapsed(kind: RowKind) -> bool:
    return any(name.startswith(COLLAPSED) for name in kind.extensions)
