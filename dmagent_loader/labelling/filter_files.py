"""Filters whole domains: the kept documents, ``OUTPUT/<domain>.jsonl.gz``, and the reason for each of the others.

Documents are examined, and later written, in pieces, by any number of workers. In between, this process goes through
what was found of them in their order: whether a document repeats another depends on all earlier ones. What is found of
`PART_DOCUMENTS` documents is a file of ``OUTPUT/.filtering``, so a job that is killed examines the others only.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.numpy
from tqdm.auto import tqdm

from dmagent_loader._files import is_full, only_writer, write_atomically
from dmagent_loader._tasks import Advance, Workers, check_workers, run_tasks
from dmagent_loader.errors import ConfigurationError, DMAgentError, ShardError
from dmagent_loader.labelling.documents import DocumentPiece, FileDocuments, first_documents
from dmagent_loader.labelling.files import PART_DOCUMENTS, SETTINGS_FILE, check_output
from dmagent_loader.labelling.filtering import BAD_RECORD, DocumentChecks, DocumentFilter, Examined
from dmagent_loader.labelling.labels import batches
from dmagent_loader.labelling.row_files import check_columns, join_members, row_files
from dmagent_loader.labelling.settings_file import differing_settings
from dmagent_loader.shards.inputs.finding import check_names
from dmagent_loader.shards.inputs.records import Rejected
from dmagent_loader.shards.writing.collecting import check_bad
from dmagent_loader.shards.writing.place import Place, place_of

_DROPPED = "dropped"
_PARTIAL = ".filtering"
"""Not `.partial`, in which `dmagent shard` keeps its unfinished work."""
_FOUND = "found"
"""Folder of the unfinished work with what was found, in parts that are whole."""

logger = logging.getLogger(__name__)


def filter_domains(
    domains: Mapping[str, FileDocuments],
    output: str | os.PathLike[str],
    checked: DocumentFilter,
    *,
    max_bad: int = 0,
    work_dir: str | os.PathLike[str] | None = None,
    workers: Workers = 0,
    progress: bool = True,
) -> dict[str, Counter[str | None]]:
    """Writes the kept and the dropped documents of all domains, at the end. Of repeated ones, the first is kept.

    The files are the same bytes with any number and kind of workers. Run again after a kill, it goes on where it stood.

    Args:
        domains: Domain, such as ``"source/web"`` -> its documents, in the order in which repeats are found.
        output: Folder of the documents; created if missing. Or a URL of an object store, such as
            ``"s3://bucket/filtered"``.
        checked: The filter. Workers get a pickled copy of its `DocumentChecks`.
        max_bad: Largest number of records of a domain that are no documents and are left out; they are listed with the
            dropped documents.
        work_dir: See `place_of`.
        workers: Number of processes, 0: this one; or `RayWorkers`.
        progress: Show progress bars.

    Returns:
        Domain -> reason to drop a document, or None -> number of documents.

    Raises:
        DomainError: A name is not ``field/domain``, or cannot be a folder.
        ConfigurationError: The output holds inputs, a domain already or other unfinished work, or cannot be written
            to; or another process writes to it.
        ShardError: A document cannot be read, more records are bad than allowed, an input changes meanwhile, a worker
            died, or the store refuses access or cannot be reached.
    """
    check_workers(workers)
    check_names(domains)
    place = place_of(output, work_dir)
    check_output(place, (url for documents in domains.values() for url in documents.urls))
    partial = place.work / _PARTIAL
    with only_writer(place.work, "documents"):
        try:
            place.check_access()
            _continue_in(place, domains, checked.checks)
            quality_key = checked.checks.config.quality_key
            for name, documents in domains.items():
                first = first_documents(documents.pieces(), 1 if quality_key is None else PART_DOCUMENTS)
                check_columns(first[:1])
                if quality_key is not None:
                    checked.checks.check_quality_key(name, first)
            counts = _Job(domains, partial, checked, max_bad, workers, progress).run()
            files = [file for name in domains for file in _files(name)]
            place.move_in({file: partial / file for file in files}, progress=progress)
            shutil.rmtree(partial)
        except DMAgentError:
            raise  # a ShardNotFoundError of an input is an OSError, too
        except OSError as error:
            if is_full(error):
                raise
            raise ConfigurationError(f"{str(place)!r} cannot be written: {error}; pass another --output") from error
        finally:
            if not any(partial.glob(f"{_FOUND}/part-*")):
                shutil.rmtree(partial, ignore_errors=True)
    return counts


def _continue_in(place: Place, domains: Mapping[str, FileDocuments], checks: DocumentChecks) -> None:
    """Begins a job, or checks that the unfinished one in the folder is the same.

    Raises:
        ConfigurationError: It is another one; the folder holds a domain already, or cannot be written to.
    """
    path = place.work / _PARTIAL / SETTINGS_FILE
    is_begun = path.exists()
    stored = {file for field in {name.split("/")[0] for name in domains} for file in place.names(field)}
    present = [name for name in domains if f"{name}.jsonl.gz" in stored]
    if present and not is_begun:
        raise ConfigurationError(f"{str(place)!r} holds the domain(s) {present} already: choose another --output")
    inputs = {name: documents.identity for name, documents in domains.items()}
    settings = {"inputs": inputs, "documents of a part": PART_DOCUMENTS, **checks.identity}
    differing = differing_settings(path, settings)
    if differing:
        raise ConfigurationError(
            f"{str(place)!r} holds unfinished work with other {', '.join(differing)}: run that command again, "
            f"remove {str(path.parent)!r}, or choose another --output"
        )
    if is_begun:
        logger.warning("%s: an earlier call did not finish this job, which goes on where it stood", place)


class _Job:
    def __init__(
        self,
        domains: Mapping[str, FileDocuments],
        folder: Path,
        checked: DocumentFilter,
        max_bad: int,
        workers: Workers,
        progress: bool,
    ) -> None:
        self._pieces = [(name, piece) for name, documents in domains.items() for piece in documents.pieces()]
        self._size = sum(documents.size for documents in domains.values())
        self._domains, self._folder, self._checked = list(domains), folder, checked
        self._max_bad, self._workers, self._progress = max_bad, workers, progress

    def run(self) -> dict[str, Counter[str | None]]:
        found = self._folder / _FOUND
        found.mkdir(exist_ok=True)
        counts: dict[str, Counter[str | None]] = {name: Counter() for name in self._domains}
        examining = [
            _Examining(found, n, name, piece, PART_DOCUMENTS, self._max_bad)
            for n, (name, piece) in enumerate(self._pieces)
        ]
        parts: dict[int, int] = {}
        for task, (count, bad, reason) in self._run("examining", _examine, examining, self._checked.checks):
            parts[task.number] = count
            if bad:
                counts[task.domain][BAD_RECORD] += bad
                check_bad(task.domain, counts[task.domain][BAD_RECORD], reason, self._max_bad)
        members = self._folder / uuid.uuid4().hex  # a task of a killed job may still write to its own
        writing = []
        for task, (name, piece) in zip(examining, self._pieces, strict=True):
            reasons: list[str | None] = []
            for number in range(parts[task.number]):
                reasons += self._checked.decide(_read(task.part(number)))
            counts[name].update(reasons)
            writing.append(_Writing(members, task.number, name, piece, tuple(reasons)))
        for _ in self._run("writing", _write, writing, None):
            pass
        for file in (file for name in self._domains for file in _files(name)):
            join_members(members, file, self._folder / file)
        return counts

    def _run(self, title: str, function: Any, tasks: Sequence[Any], context: Any) -> Iterator[tuple[Any, Any]]:
        title = f"{title} {len(self._domains)} domains"
        with tqdm(total=self._size, unit="B", unit_scale=True, desc=title, disable=not self._progress) as bar:
            yield from run_tasks(function, tasks, context, self._workers, bar.update)


def _files(domain: str) -> tuple[str, str]:
    """The files of the kept and of the dropped documents."""
    return f"{domain}.jsonl.gz", f"{_DROPPED}/{domain}.jsonl.gz"


@dataclass(frozen=True)
class _Examining:
    folder: Path
    number: int
    domain: str
    documents: DocumentPiece
    part_documents: int
    max_bad: int

    def part(self, number: int) -> Path:
        return self.folder / f"part-{self.number:06d}-{number:06d}.safetensors"


def _examine(task: _Examining, checks: DocumentChecks, advance: Advance) -> tuple[int, int, str]:
    """Writes what is found of the documents of a piece; the number of parts, that of bad records, and why one is."""
    seen: set[bytes] = set()
    number, reasons = 0, list[str]()

    def reject(bad: Rejected) -> None:
        reasons.append(bad.reason)
        check_bad(task.domain, len(reasons), bad.reason, task.max_bad)

    for number, batch in enumerate(batches(task.documents.read(advance, reject), task.part_documents), start=1):
        path = task.part(number - 1)
        if path.exists():
            found = _read(path)
        else:
            found = checks.examine(batch, seen)
            write_atomically(path, safetensors.numpy.save(vars(found)))
        seen.update(map(bytes, found.digests))
    return number, len(reasons), reasons[-1] if reasons else ""


def _read(path: Path) -> Examined:
    try:
        return Examined(**safetensors.numpy.load(path.read_bytes()))
    except (ValueError, TypeError, safetensors.SafetensorError) as error:
        raise ShardError(
            f"the unfinished work {path} cannot be read ({error}): remove the file, and run the command again"
        ) from error


@dataclass(frozen=True)
class _Writing:
    folder: Path
    number: int
    domain: str
    documents: DocumentPiece
    reasons: tuple[str | None, ...]


def _write(task: _Writing, context: None, advance: Advance) -> None:
    """Writes the kept and the dropped documents of a piece."""
    kept, dropped = _files(task.domain)
    with row_files(task.folder, task.number) as add:

        def reject(bad: Rejected) -> None:
            add(dropped, {"origin": bad.origin, "reason": BAD_RECORD, "fault": bad.reason})

        number = 0
        for number, document in enumerate(task.documents.read(advance, reject), start=1):
            if number > len(task.reasons):
                break
            reason = task.reasons[number - 1]
            if reason is None:
                add(kept, {**document.columns, "text": document.text})
            else:
                add(dropped, {"origin": document.origin, "reason": reason})
        if number != len(task.reasons):
            raise ShardError(
                f"the inputs of domain {task.domain!r} have changed while they were filtered: run the command again"
            )
