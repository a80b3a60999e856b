"""Facts about each shard, for people."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from dmagent_loader.shards.index.catalogue import Catalogue
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
    """Facts about every shard, in the order of domains and shards."""
    found = []
    for domain, span in zip(catalogue.domains, catalogue.spans, strict=True):
        for number in range(*span):
            index = catalogue.index(number)
            found.append(
                ShardSummary(
                    domain=domain,
                    shard=catalogue.url(number),
                    rows=index.num_rows,
                    members=index.num_members,
                    payload_bytes=index.payload_bytes,
                    file_bytes=index.file_size,
                    extensions=index.extensions,
                    damage=catalogue.damage.get(number, ()),
                )
            )
    return tuple(found)


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
