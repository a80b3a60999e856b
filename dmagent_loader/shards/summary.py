"""Facts about each shard, for people."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import groupby

from dmagent_loader.shards.index.catalogue import Catalogue
from dmagent_loader.shards.index.threads import INDEX_THREADS, in_threads
from dmagent_loader.shards.sources.listing import REQUESTS_IN_FLIGHT
from dmagent_loader.shards.sources.urls import base_name
from dmagent_loader.shards.tar import ShardDamage


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """Facts about one shard, from `ShardCollection.summaries`.

    Attributes:
        domain: Name of the domain.
        shard: URL of the shard.
        rows, members: Number of rows, and of members.
        payload_bytes, file_bytes: Size of all payloads, and of the file with its headers.
        extensions: Distinct extensions.
        damage: Places that could not be read.
    """

    domain: str
    shard: str
    rows: int
    members: int
    payload_bytes: int
    file_bytes: int
    extensions: tuple[str, ...]
    damage: tuple[ShardDamage, ...]


def summaries(catalogue: Catalogue) -> tuple[ShardSummary, ...]:
    """Facts about every shard, in the order of domains and shards. An index may take a request, so many are read at a
    time."""

    domains = [name for name, span in zip(catalogue.domains, catalogue.spans, strict=True) for _ in range(*span)]

    def summary(number: int) -> ShardSummary:
        index = catalogue.index(number)
        return ShardSummary(
            domain=domains[number],
            shard=catalogue.url(number),
            rows=index.num_rows,
            members=index.num_members,
            payload_bytes=index.payload_bytes,
            file_bytes=index.file_size,
            extensions=index.extensions,
            damage=catalogue.damage.get(number, ()),
        )

    threads = REQUESTS_IN_FLIGHT if catalogue.remote else INDEX_THREADS
    found = dict(in_threads(summary, range(len(catalogue)), threading.Event(), threads))
    return tuple(found[number] for number in range(len(catalogue)))


def table_of_shards(found: tuple[ShardSummary, ...]) -> str:
    """A table of shards, one domain after the other, as text."""
    lines = [("domain / shard", "rows", "members", "bytes", "extensions", "damage")]
    for domain, of_domain in groupby(found, key=lambda shard: shard.domain):
        shards = list(of_domain)
        lines.append(_line(domain, shards, "", ""))
        for shard in shards:
            damage = "; ".join(f"{item.kind} at byte {item.offset}" for item in shard.damage) or "-"
            lines.append(_line(f"  {base_name(shard.shard)}", [shard], " ".join(shard.extensions), damage))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    aligned = ("<", ">", ">", ">", "<", "<")
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, aligned, widths, strict=True)).rstrip()
        for line in lines
    )


def _line(name: str, shards: list[ShardSummary], extensions: str, damage: str) -> tuple[str, str, str, str, str, str]:
    counts = (sum(getattr(shard, count) for shard in shards) for count in ("rows", "members", "payload_bytes"))
    rows, members, payload = (f"{count:,}" for count in counts)
    return name, rows, members, payload, extensions, damage
