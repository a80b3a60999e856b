"""Refuses a job that would replace files of others, or mix its rows with rows of another kind."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.shards.inputs.kinds import Input, Kind
from dmagent_loader.shards.manifest import MANIFEST_NAME
from dmagent_loader.shards.sources.urls import display_url, is_local, local_path


def refuse_own_shards(root: Path, inputs: Mapping[str, Sequence[Input]]) -> None:
    """Raises ConfigurationError if an input lies where the shards of a domain are written."""
    folders = {os.path.realpath(root / domain): domain for domain in inputs}
    for domain, items in inputs.items():
        for item in items:
            if item.kind is Kind.DATASET or not is_local(item.url):
                continue
            path = os.path.realpath(local_path(item.url))
            for folder, target in folders.items():
                if path == folder or path.startswith(folder + os.sep):
                    raise ConfigurationError(
                        f"domain {domain!r}: {display_url(item.url)} lies in {folder!r}, where the shards of "
                        f"{target!r} would be written: choose another folder (--output, output=)"
                    )


def refuse_other_files(root: Path, domains: Sequence[str], published: Set[str]) -> None:
    """Raises ConfigurationError if the folder of a new domain holds what this job did not put there."""
    for domain in domains:
        folder = root / domain
        found = sorted(folder.iterdir()) if folder.is_dir() else [folder] if folder.exists() else []
        others = [path for path in found if path.relative_to(root).as_posix() not in published]
        if others:
            raise ConfigurationError(
                f"{str(folder)!r} holds files that {str(root / MANIFEST_NAME)!r} does not name, such as "
                f"{others[0].name!r}: move them away, or choose another folder (--output, output=)"
            )


def refuse_other_rows(
    root: Path, kept: Mapping[str, Any], settings: Mapping[str, Any], appended: Container[str]
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
                f"{str(root)!r} holds domain {domain!r} with {name} {had}, but these rows would have {has}: write "
                f"{'all rows of a domain' if name not in same[:4] else 'all domains'} alike, or into another folder"
            )
