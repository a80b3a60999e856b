"""``manifest.json``: which shards belong to which domain, and what is in them.

``{"schema": 1, "domains": {"source/web": {"rows": ..., "shards": [{"path": ..., "sha256": ...}, ...]}}}``; paths are
relative to the manifest, so the folder can be moved or uploaded as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec

from dmagent_loader.errors import ShardError, ShardNotFoundError
from dmagent_loader.shards.urls import display_url, is_local, local_path

MANIFEST_NAME = "manifest.json"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One written shard.

    Attributes:
        path: Relative to the manifest, with forward slashes.
        rows: Samples.
        bytes: Size of the file.
        sha256: Of the whole file.
    """

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class DomainRecord:
    """What was written for one domain.

    Attributes:
        rows: Samples.
        documents: Documents that were read, empty ones not counted.
        empty_documents: Documents without text, left out.
        tokens: Tokens in all rows, end-of-document tokens included; None for raw text.
        dropped_tokens: Tokens at the end that did not fill a row, left out; None for raw text.
        settings: How the domain was written.
        shards: The files, in order.
    """

    rows: int
    documents: int
    empty_documents: int
    tokens: int | None
    dropped_tokens: int | None
    settings: dict[str, Any]
    shards: tuple[ShardRecord, ...]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(shard.bytes for shard in self.shards)


def manifest_text(domains: Mapping[str, DomainRecord], kept: Mapping[str, Any]) -> str:
    """The text of a manifest.

    Args:
        domains: The domains that were written.
        kept: Entries of an earlier manifest, as they stand there.
    """
    entries = {**kept, **{domain: asdict(record) for domain, record in domains.items()}}
    return json.dumps({"schema": SCHEMA, "domains": entries}, indent=1, ensure_ascii=False) + "\n"


def load_manifest(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Domain name -> shards, as a sampler takes them.

    Args:
        path: A manifest, or the folder that holds one; local or an fsspec URL.

    Raises:
        ShardNotFoundError: There is none.
        ShardError: It is not a manifest, or of another schema.
    """
    url = os.fspath(path)
    if is_local(url):
        url = local_path(url)
        if os.path.isdir(url):
            url = os.path.join(url, MANIFEST_NAME)
    elif not url.endswith(".json"):
        url = f"{url.rstrip('/')}/{MANIFEST_NAME}"
    try:
        with fsspec.open(url, "r", encoding="utf-8") as file:
            manifest = json.load(file)
        if manifest["schema"] != SCHEMA:
            raise ShardError(
                f"manifest {display_url(url)} has schema {manifest['schema']!r}, but this version reads schema "
                f"{SCHEMA}: write the shards again with this version, or list them yourself"
            )
        listing = {
            domain: [str(record["path"]) for record in entry["shards"]] for domain, entry in manifest["domains"].items()
        }
    except FileNotFoundError as error:
        raise ShardNotFoundError(
            f"there is no manifest {display_url(url)}: `dmagent shard` writes one beside the shards"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"{display_url(url)} is not a manifest of shards ({type(error).__name__}: {error}); `dmagent shard` "
            "writes one"
        ) from error
    return {domain: [_beside(url, name) for name in names] for domain, names in listing.items()}


def _beside(manifest: str, name: str) -> str:
    if is_local(manifest):
        return str(Path(manifest).parent / name)
    return f"{manifest.rsplit('/', 1)[0]}/{name}"
