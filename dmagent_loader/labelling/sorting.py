"""Documents sorted by their labels: ``OUTPUT/<field>/<topic>.jsonl.gz``, and ``OUTPUT/unsure/<field>.jsonl.gz``."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dmagent_loader._tasks import Advance, Workers, run_tasks
from dmagent_loader.errors import ConfigurationError, DomainError
from dmagent_loader.labelling.parts import LabelPiece, labels_of
from dmagent_loader.labelling.row_files import join_members, row_files

LABELS = "labels"
UNSURE_FOLDER = "unsure"
SPLIT_FILE = ".split.json"
"""Marks a folder of sorted documents, and lists its domains."""
_PARTIAL = ".sorting"
"""Not `.partial`, in which `dmagent shard` keeps its unfinished work."""


def check_replaced(domains: Iterable[str], root: Path) -> None:
    """Checks that sorting replaces only what an earlier call wrote, and of these domains.

    Raises:
        DomainError: A field has the name of a folder that is not of a field.
        ConfigurationError: It would replace other files, or drop the documents of other domains.
    """
    for field, names in _fields(domains).items():
        if field in (LABELS, UNSURE_FOLDER):
            raise DomainError(
                f"the documents of {names} would be sorted into the folder {field!r}, which is for other files: name "
                "their field source or target, or leave out --split"
            )
        present = [path for path in (root / field, _unsure(root, field)) if path.exists()]
        if not present:
            continue
        try:
            earlier = json.loads((root / field / SPLIT_FILE).read_bytes())["domains"]
        except (OSError, ValueError, LookupError, TypeError):
            raise ConfigurationError(
                f"{str(present[0])!r} was not written by `dmagent label --split`, so it is not replaced: "
                "choose another --output"
            ) from None
        dropped = sorted(set(earlier) - set(names))
        if dropped:
            raise ConfigurationError(
                f"{str(root / field)!r} holds the documents of {dropped}, too, which would be dropped: give all "
                f"domains of {field!r} in one call, or choose another --output"
            )


def sort_documents(
    domains: Sequence[str], pieces: Sequence[LabelPiece], root: Path, workers: Workers, advance: Advance
) -> None:
    """Writes the documents of all domains by field and topic; what an earlier call wrote of a field is replaced.

    Args:
        domains: Names of the domains.
        pieces: Their documents, in order, with the labels.
        root: Folder of the output.
        workers: See `run_tasks`.
        advance: See `run_tasks`.
    """
    partial = root / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    (partial / UNSURE_FOLDER).mkdir(parents=True)
    members = partial / uuid.uuid4().hex  # a task of a killed job may still write to its own
    for _ in run_tasks(_sort, range(len(pieces)), _Sorting(tuple(pieces), members), workers, advance):
        pass
    for folder in sorted(members.glob("*/*.jsonl.gz")):
        name = folder.relative_to(members).as_posix()
        join_members(members, name, partial / name)
    (root / UNSURE_FOLDER).mkdir(exist_ok=True)
    for field, names in _fields(domains).items():
        (partial / field).mkdir(exist_ok=True)
        (partial / field / SPLIT_FILE).write_text(json.dumps({"domains": names}), encoding="utf-8")
        # The mark in the folder lets the other file be replaced, so that file goes before it and comes after it.
        _unsure(root, field).unlink(missing_ok=True)
        if (root / field).exists():
            os.replace(root / field, partial / f"{field}.replaced")
        os.replace(partial / field, root / field)
        if _unsure(partial, field).exists():
            os.replace(_unsure(partial, field), _unsure(root, field))
    with contextlib.suppress(OSError):
        (root / UNSURE_FOLDER).rmdir()  # if it is empty
    shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class _Sorting:
    pieces: tuple[LabelPiece, ...]
    folder: Path


def _sort(number: int, job: _Sorting, advance: Advance) -> None:
    piece = job.pieces[number]
    field = piece.domain.split("/", 1)[0]
    with row_files(job.folder, number) as add:
        for path, batch in piece.parts(advance):
            for document, label in zip(batch, labels_of(batch, path), strict=True):
                topic = label["topic"]
                row = {**document.columns, "text": document.text}
                row |= {"topic": topic, "topic_confidence": label["confidence"], "topic_by": label["by"]}
                add(f"{field}/{topic}.jsonl.gz" if topic else f"{UNSURE_FOLDER}/{field}.jsonl.gz", row)


def _fields(domains: Iterable[str]) -> dict[str, list[str]]:
    """Field -> its domains."""
    found: dict[str, list[str]] = {}
    for domain in domains:
        found.setdefault(domain.split("/", 1)[0], []).append(domain)
    return found


def _unsure(root: Path, field: str) -> Path:
    return root / UNSURE_FOLDER / f"{field}.jsonl.gz"
