"""Documents sorted by their labels: ``OUTPUT/<field>/<topic>.jsonl.gz``, and ``OUTPUT/unsure/<field>.jsonl.gz``."""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dmagent_loader._tasks import Advance, Workers, run_tasks
from dmagent_loader.errors import ConfigurationError, DomainError
from dmagent_loader.labelling.parts import LabelPiece, labels_of
from dmagent_loader.labelling.row_files import join_members, row_files
from dmagent_loader.shards.sources.urls import display_url
from dmagent_loader.shards.writing.place import Place

LABELS = "labels"
UNSURE_FOLDER = "unsure"
SPLIT_FILE = ".split.json"
"""Marks a folder of sorted documents, and lists its domains."""
_PARTIAL = ".sorting"
"""Not `.partial`, in which `dmagent shard` keeps its unfinished work."""


def check_replaced(domains: Iterable[str], place: Place) -> None:
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
        present = [*place.names(field), *(name for name in place.names(UNSURE_FOLDER) if name == _unsure(field))]
        if not present:
            continue
        try:
            earlier = json.loads(place.read(f"{field}/{SPLIT_FILE}") or b"")["domains"]
        except (OSError, ValueError, LookupError, TypeError):
            raise ConfigurationError(
                f"{display_url(place.url(present[0]))!r} was not written by `dmagent label --split`, so it is not "
                "replaced: choose another --output"
            ) from None
        dropped = sorted(set(earlier) - set(names))
        if dropped:
            raise ConfigurationError(
                f"{display_url(place.url(field))!r} holds the documents of {dropped}, too, which would be dropped: "
                f"give all domains of {field!r} in one call, or choose another --output"
            )


def sort_documents(
    domains: Sequence[str], pieces: Sequence[LabelPiece], place: Place, workers: Workers, advance: Advance
) -> None:
    """Writes the documents of all domains by field and topic; what an earlier call wrote of a field is replaced.

    Args:
        domains: Names of the domains.
        pieces: Their documents, in order, with the labels.
        place: Where the documents are written.
        workers: See `run_tasks`.
        advance: See `run_tasks`.
    """
    partial = place.work / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    (partial / UNSURE_FOLDER).mkdir(parents=True)
    members = partial / uuid.uuid4().hex  # a task of a killed job may still write to its own
    for _ in run_tasks(_sort, range(len(pieces)), _Sorting(tuple(pieces), members), workers, advance):
        pass
    for folder in sorted(members.glob("*/*.jsonl.gz")):
        name = folder.relative_to(members).as_posix()
        join_members(members, name, partial / name)
    for field, names in _fields(domains).items():
        (partial / field).mkdir(exist_ok=True)
        (partial / field / SPLIT_FILE).write_text(json.dumps({"domains": names}), encoding="utf-8")
        # The mark in the folder lets the other file be replaced, so that file goes before it and comes after it.
        place.remove(_unsure(field))
        place.replace_folder(field, partial / field, SPLIT_FILE)
        if (partial / _unsure(field)).exists():
            place.move_in({_unsure(field): partial / _unsure(field)}, progress=False)
    with contextlib.suppress(OSError):
        (place.work / UNSURE_FOLDER).rmdir()  # if it is empty
    shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class _Sorting:
    pieces: tuple[LabelPiece, ...]
    folder: Path


def _sort(number: int, job: _Sorting, advance: Advance) -> None:
    piece = job.pieces[number]
    field = piece.domain.split("/", 1)[0]
    with row_files(job.folder, number) as add:
        for path, batch in piece.parts(advance, lambda found: None):
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


def _unsure(field: str) -> str:
    return f"{UNSURE_FOLDER}/{field}.jsonl.gz"
