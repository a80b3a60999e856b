"""The folder of the shards: the domains that it holds, and the shards that a job adds to them."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dmagent_loader.errors import ConfigurationError, ShardNotFoundError
from dmagent_loader.shards.collection import ShardCollection
from dmagent_loader.shards.index.stored import TABLE_NAME, StoredIndexes, table_entry
from dmagent_loader.shards.manifest import MANIFEST_NAME, DomainRecord, ShardRecord, parse_manifest
from dmagent_loader.shards.sources.local import ShardVersion
from dmagent_loader.shards.sources.urls import INDEX_SUFFIX
from dmagent_loader.shards.writing.chunks import Counts
from dmagent_loader.shards.writing.job import Job
from dmagent_loader.shards.writing.place import Place

REJECTS_NAME = "rejects.jsonl"
"""File beside the shards of a domain with the records that were left out: origin, reason and beginning of each."""
_OF_A_DOMAIN = (REJECTS_NAME, TABLE_NAME)
"""Files beside the shards of a domain that all jobs share."""

_SUMMED = (
    "rows",
    "documents",
    "empty_documents",
    "bad_records",
    "tokens",
    "dropped_tokens",
    "special_token_documents",
)


@dataclass
class Part:
    """What a job has written of a domain."""

    folder: Path
    counts: Counts
    shards: list[ShardRecord]
    rejects: bytes


def earlier_entries(place: Place) -> dict[str, Any]:
    """The domains of the folder's manifest, as they stand in the file."""
    data = place.read(MANIFEST_NAME)
    if data is None:
        return {}
    parse_manifest(place.url(MANIFEST_NAME), data)  # checks it
    entries: dict[str, Any] = json.loads(data.decode("utf-8"))["domains"]
    return entries


def earlier_record(entry: Mapping[str, Any]) -> DomainRecord:
    """The record of a domain that `shard_files` wrote, as it stands in the manifest."""
    shards = tuple(ShardRecord(**shard) for shard in entry["shards"])
    return DomainRecord(**{**entry, "shards": shards})


def next_shard(job: Job, domain: str, entry: Mapping[str, Any]) -> int:
    """One more than the largest number of a shard in the manifest and in the folder."""
    published = job.published()
    names = {posixpath.basename(shard["path"]) for shard in entry["shards"]}
    names |= {posixpath.basename(name) for name in job.place.names(domain) if name not in published}
    pattern = re.compile(rf"{re.escape(posixpath.basename(domain))}-(\d+)\.tar")
    return max((int(found[1]) + 1 for found in map(pattern.fullmatch, names) if found), default=0)


def next_row(place: Place, entry: Mapping[str, Any]) -> int:
    """A number above the keys of all rows; a manifest that was edited may count fewer rows than their last key."""
    last = max((shard["path"] for shard in entry["shards"]), default="")
    try:
        collection = ShardCollection.open({"source/shard": [place.url(last)]}, progress=False)
    except ShardNotFoundError:
        return int(entry["rows"])
    (rows,) = collection.shard_rows(0)
    key = collection.read(0, 0, rows - 1).key
    return max(int(entry["rows"]), int(key) + 1 if key.isdecimal() else 0)


def publish(job: Job, parts: Mapping[str, Part], kept: Mapping[str, Any], *, progress: bool) -> None:
    """Moves shards and their indexes to the output, where the manifest does not name them yet."""
    place, stored = job.place, StoredIndexes("first-dot")
    moves = {
        f"{domain}/{shard.path}{suffix}": part.folder / f"{shard.path}{suffix}"
        for domain, part in parts.items()
        for shard in part.shards
        for suffix in ("", INDEX_SUFFIX)
    }
    listed = {shard["path"] for entry in kept.values() for shard in entry["shards"]}
    listed |= {f"{domain}/{name}" for domain in kept for name in _OF_A_DOMAIN}
    # Of a call that was killed before it wrote the manifest:
    earlier = {name for name in job.published() if not {name, name.removesuffix(INDEX_SUFFIX)} & listed}
    for name in earlier - moves.keys():
        place.remove(name)
    present = {name for domain in parts for name in place.names(domain)}
    existing = sorted(moves.keys() & present - earlier)
    if existing:
        raise ConfigurationError(
            f"{place.url(existing[0])!r} has appeared since this job began, and would be replaced: move it away, and "
            "run the same command again"
        )
    new = {f"{domain}/{name}" for domain in parts if domain not in kept for name in _OF_A_DOMAIN}
    job.publish({*moves, *new})
    indexes = {
        f"{domain}/{shard.path}": stored.read(str(part.folder / shard.path))
        for domain, part in parts.items()
        for shard in part.shards
    }
    place.move_in(moves, progress=progress)
    for domain, part in parts.items():
        folder = place.url(domain)
        table = {
            name: known
            for name, known in stored.table(folder).items()
            if f"{domain}/{name}" in listed and f"{domain}/{name}" not in moves
        }
        for shard in part.shards:
            index = indexes[f"{domain}/{shard.path}"]
            if index is not None:  # else another version of this package has begun the job
                table[shard.path] = table_entry(ShardVersion(size=shard.bytes, tag="", is_sure=False), index)
        stored.save_table(folder, table)
        if part.rejects:
            name = f"{domain}/{REJECTS_NAME}"
            before = place.read(name) or b""
            place.write(name, before.removesuffix(part.rejects) + part.rejects)


def joined_record(
    earlier: Mapping[str, Any] | None, job: Job, domain: str, part: Part, settings: Mapping[str, Any]
) -> DomainRecord:
    """The record of a domain, with the shards that it had before."""
    counts, length = part.counts, settings.get("sequence_length")
    rows = sum(shard.rows for shard in part.shards)
    record = DomainRecord(
        rows=rows,
        documents=counts.documents,
        empty_documents=counts.empty,
        bad_records=counts.bad,
        tokens=rows * length if length else None,
        dropped_tokens=counts.elements - rows * length if length else None,
        special_token_documents=counts.special if length else None,
        settings=dict(settings),
        inputs=job.digests[domain],
        shards=tuple(replace(shard, path=f"{domain}/{shard.path}") for shard in part.shards),
    )
    if earlier is None:
        return record
    sums: dict[str, Any] = {
        name: None if getattr(record, name) is None else getattr(record, name) + (earlier.get(name) or 0)
        for name in _SUMMED
    }
    shards = tuple(ShardRecord(**shard) for shard in earlier["shards"])
    return replace(record, **sums, inputs={**earlier.get("inputs", {}), **record.inputs}, shards=shards + record.shards)
