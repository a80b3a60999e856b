"""Refuses a job that would replace files of others, or mix its rows with rows of another kind."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Container, Mapping, Sequence, Set
from typing import Any

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.shards.inputs.kinds import Input, Kind
from dmagent_loader.shards.manifest import MANIFEST_NAME
from dmagent_loader.shards.sources.urls import display_url, is_local, local_path, without_signature
from dmagent_loader.shards.writing.place import Place


def refuse_own_shards(place: Place, inputs: Mapping[str, Sequence[Input]]) -> None:
    """Raises ConfigurationError if an input lies where the shards of a domain are written."""
    folders = {_real(place.url(domain)): domain for domain in inputs}
    for domain, items in inputs.items():
        for item in items:
            if item.kind is Kind.DATASET:
                continue
            path = _real(item.url)
            for folder, target in folders.items():
                if path == folder or path.startswith(f"{folder}/"):
                    raise ConfigurationError(
                        f"domain {domain!r}: {display_url(item.url)} lies in {folder!r}, where the shards of "
                        f"{target!r} would be written: choose another folder (--output, output=)"
                    )


def _real(url: str) -> str:
    return os.path.realpath(local_path(url)) if is_local(url) else without_signature(url)


def refuse_other_files(place: Place, domains: Sequence[str], published: Set[str]) -> None:
    """Raises ConfigurationError if the folder of a new domain holds what this job did not put there."""
    for domain in domains:
        others = [name for name in place.names(domain) if name not in published]
        if others:
            raise ConfigurationError(
                f"{place.url(domain)!r} holds files that {place.url(MANIFEST_NAME)!r} does not name, such as "
                f"{posixpath.basename(others[0])!r}: move them away, or choose another folder (--output, output=)"
            )


def refuse_other_rows(
    place: Place, kept: Mapping[str, Any], settings: Mapping[str, Any], appended: Container[str]
) -> None:
    """Raises ConfigurationError if the folder holds rows of another kind: a batch of both fails only in training.

    Inside a domain, rows are also made in the same way.
    """
    for domain, entry in kept.items():
        earlier = entry.get("settings") or {}
        identity = "tokenizer_sha256" if "tokenizer_sha256" in earlier else "tokenizer"
        same: tuple[str, ...] = ("format", "sequence_length", identity, "eos_id")
        if domain in appended:
            same += ("parse_special_tokens", "keep_columns", "chat_template")
        for name in same:
            if name not in earlier or earlier[name] == settings.get(name):
                continue
            had, has = repr(earlier[name]), repr(settings.get(name))
            if name == "tokenizer_sha256":
                had, has = (f"{of.get('tokenizer')!r} ({str(of[name])[:12]})" for of in (earlier, settings))
            raise ConfigurationError(
                f"{str(place)!r} holds domain {domain!r} with {name} {had}, but these rows would have {has}: write "
                f"{'all rows of a domain' if name not in same[:4] else 'all domains'} alike, or into another folder"
            )
