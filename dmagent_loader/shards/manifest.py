"""``manifest.json``: which shards belong to which domain, and what is in them.

``{"schema": 1, "domains": {"source/web": {"rows": ..., "tokens": ..., "bytes": ..., "shards": [{"path": ...}, ...]}},
...}``; paths are relative to the manifest, so the folder can be moved or uploaded as it is.
"""

from __future__ import annotations

import json
import os
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
        tokens: Tokens, for packed rows; else None.
        bytes: Size of the file.
        sha256: Of the whole file.
    """

    path: str
    rows: int
    tokens: int | None
    bytes: int
    sha256: str


def manifest_json(domains: dict[str, list[ShardRecord]], settings: dict[str, Any]) -> str:
    """The text of a manifest.

    Args:
        domains: Shards of each domain, in order.
        settings: How they were written; kept for the reader's information.
    """
    listing = {
        domain: {
            "rows": sum(record.rows for record in records),
            "tokens": None if any(r.tokens is None for r in records) else sum(r.tokens or 0 for r in records),
            "bytes": sum(record.bytes for record in records),
            "shards": [asdict(record) for record in records],
        }
        for domain, records in domains.items()
    }
    return json.dumps({"schema": SCHEMA, "settings": settings, "domains": listing}, indent=1, ensure_ascii=False) + "\n"


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
