"""Labelling of whole domains: labels beside the documents, resumable, and the documents sorted by topic.

``OUTPUT/labels/<domain>`` holds the labels (`parts`), and ``OUTPUT/<field>/<topic>.jsonl.gz`` the documents of one
topic (`sorting`), for `dmagent shard --input OUTPUT/<field> --field <field>`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from dmagent_loader._files import only_writer, write_atomically
from dmagent_loader._tasks import Advance, Workers, check_workers, run_tasks
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.labelling.documents import DomainDocuments, first_documents
from dmagent_loader.labelling.labels import STATED, Labeller, Labels
from dmagent_loader.labelling.parts import LabelPiece, labels_of, part_files, part_names, write_part
from dmagent_loader.labelling.row_files import check_columns
from dmagent_loader.labelling.settings_file import differing_settings
from dmagent_loader.labelling.sorting import LABELS, check_replaced, sort_documents
from dmagent_loader.mixture.domains import CANONICAL_TOPICS, NUM_TOPICS
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.shards.inputs.documents import Document
from dmagent_loader.shards.inputs.records import Rejected
from dmagent_loader.shards.sources.urls import display_url
from dmagent_loader.shards.writing.collecting import check_bad, rejects_line
from dmagent_loader.shards.writing.output import REJECTS_NAME
from dmagent_loader.shards.writing.place import Place, place_of

PART_DOCUMENTS = 4096
"""Documents of one part: what a killed job may lose, and what is sorted by length."""
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True, kw_only=True)
class LabelledDomain:
    """Labels of a domain, counted.

    Attributes:
        counts: (T,) documents of each topic; fractions where a label stands for several topics.
        documents: Number of documents.
        unsure: Number of these without a topic.
        stated: Number of these whose label came with the data.
        bad_records: Number of records that are no documents, which were left out.
    """

    counts: FloatArray
    documents: int
    unsure: int
    stated: int
    bad_records: int = 0

    def __add__(self, other: LabelledDomain) -> LabelledDomain:
        return LabelledDomain(
            counts=self.counts + other.counts,
            documents=self.documents + other.documents,
            unsure=self.unsure + other.unsure,
            stated=self.stated + other.stated,
            bad_records=self.bad_records + other.bad_records,
        )


def label_domains(
    domains: Mapping[str, DomainDocuments],
    output: str | os.PathLike[str],
    labeller: Labeller,
    *,
    split: bool = False,
    max_bad: int = 0,
    work_dir: str | os.PathLike[str] | None = None,
    workers: Workers = 0,
    progress: bool = True,
) -> dict[str, LabelledDomain]:
    """Labels every document of every domain. Run again after a kill, it labels what is not labelled yet.

    The files are the same bytes with any number and kind of workers.

    Args:
        domains: Domain, such as ``"source/web"`` -> its documents.
        output: Folder of the labels; created if missing. Or a URL of an object store, such as
            ``"s3://bucket/labelled"``, which gets the files at the end.
        labeller: Classifier and settings. Workers get a pickled copy.
        split: Whether to write the documents sorted by topic, too.
        max_bad: Largest number of records of a domain that are no documents and are left out; `REJECTS_NAME` beside its
            labels lists them.
        work_dir: See `place_of`.
        workers: Number of processes, 0: this one; or `RayWorkers`.
        progress: Show progress bars.

    Returns:
        Domain -> its labels, counted.

    Raises:
        DomainError: Documents are sorted, and their field has the name of a folder of other files.
        ConfigurationError: The folder holds labels of other documents, of another classifier or with other settings;
            it holds inputs, or files that sorting would replace and an earlier call did not write; another process
            writes to it; or it cannot be written to.
        ShardError: A document cannot be read, more records are bad than allowed, a part is damaged, a worker died,
            or the store refuses access or cannot be reached.
    """
    check_workers(workers)
    place = place_of(output, work_dir)
    check_output(place, (url for documents in domains.values() for url in documents.urls))
    with only_writer(place.work, "labels"):
        if split:
            check_replaced(domains, place)
        place.check_access()
        pieces: list[LabelPiece] = []
        for domain, documents in domains.items():
            folder = place.work / LABELS / domain
            _continue_in(place, domain, documents, labeller)
            pieces += [
                LabelPiece(domain=domain, number=number, documents=piece, folder=folder, part_documents=PART_DOCUMENTS)
                for number, piece in enumerate(documents.pieces())
            ]
        if labeller.config.label_key is not None:
            _check_label_key(pieces, labeller)
        if split:
            for documents in domains.values():
                check_columns(first_documents(documents.pieces(), 1))
        found: dict[int, LabelledDomain] = {}
        rejects: dict[int, list[str]] = {}
        with _bar("labelling", domains, progress) as advance:
            job = _Labelling(tuple(pieces), labeller, max_bad)
            for number, (result, lines) in run_tasks(_label, range(len(pieces)), job, workers, advance):
                found[number], rejects[number] = result, lines
                if lines:
                    domain = pieces[number].domain
                    bad = sum(len(rejects[n]) for n in rejects if pieces[n].domain == domain)
                    check_bad(domain, bad, json.loads(lines[-1])["reason"], max_bad)
        for domain in domains:
            lines = [line for n, piece in enumerate(pieces) if piece.domain == domain for line in rejects[n]]
            if lines:
                write_atomically(place.work / LABELS / domain / REJECTS_NAME, "".join(lines).encode())
        if split:
            with _bar("sorting", domains, progress) as advance:
                sort_documents(list(domains), pieces, place, workers, advance)
        if place.work_is_apart:
            _publish(place, domains, progress=progress)
    counted = {
        domain: LabelledDomain(counts=np.zeros(NUM_TOPICS), documents=0, unsure=0, stated=0) for domain in domains
    }
    for number, piece in enumerate(pieces):
        counted[piece.domain] += found[number]
    return counted


@dataclass(frozen=True)
class _Labelling:
    pieces: tuple[LabelPiece, ...]
    labeller: Labeller
    max_bad: int


def _label(number: int, job: _Labelling, advance: Advance) -> tuple[LabelledDomain, list[str]]:
    """Labels a piece; its labels, counted, and the lines of the rejects file."""
    counts, total, unsure, stated = np.zeros(NUM_TOPICS), 0, 0, 0
    piece, rejects = job.pieces[number], list[str]()

    def reject(bad: Rejected) -> None:
        rejects.append(rejects_line(bad))
        check_bad(piece.domain, len(rejects), bad.reason, job.max_bad)

    for path, batch in piece.parts(advance, reject):
        if path.exists():
            lines = labels_of(batch, path)
        else:
            lines = _lines(batch, job.labeller.label(batch), job.labeller.classifier.name)
            write_part(path, lines)
        for line in lines:
            for topic, share in line["topics"].items():
                counts[CANONICAL_TOPICS.index(topic)] += share
        total += len(lines)
        unsure += sum(line["topic"] is None for line in lines)
        stated += sum(line["by"] == STATED for line in lines)
    labelled = LabelledDomain(counts=counts, documents=total, unsure=unsure, stated=stated, bad_records=len(rejects))
    return labelled, rejects


def _check_label_key(pieces: Sequence[LabelPiece], labeller: Labeller) -> None:
    """Checks the column on the first documents, wherever the others are labelled."""
    labeller.check_label_key(first_documents([piece.documents for piece in pieces], PART_DOCUMENTS))


@contextlib.contextmanager
def _bar(title: str, domains: Mapping[str, DomainDocuments], progress: bool) -> Iterator[Callable[[int], object]]:
    unit = next((documents.unit for documents in domains.values()), "B")
    with tqdm(
        total=sum(documents.size for documents in domains.values()),
        unit=unit,
        unit_scale=unit == "B",
        desc=f"{title} {len(domains)} domains",
        disable=not progress,
    ) as bar:
        yield bar.update


def _publish(place: Place, domains: Iterable[str], *, progress: bool) -> None:
    """Uploads the labels of all domains, and removes the work."""
    for domain in domains:
        folder = place.work / LABELS / domain
        # The settings are the first file, so that another job does not add its labels to these.
        place.write(f"{LABELS}/{domain}/{SETTINGS_FILE}", (folder / SETTINGS_FILE).read_bytes())
        files = [*part_files(folder), *folder.glob(REJECTS_NAME)]
        place.move_in({f"{LABELS}/{domain}/{path.name}": path for path in files}, progress=progress)
    for domain in domains:
        shutil.rmtree(place.work / LABELS / domain)


def check_output(place: Place, inputs: Iterable[str]) -> None:
    """Refuses an output that holds inputs, which could be replaced.

    Args:
        place: What is written to.
        inputs: Paths and URLs.

    Raises:
        ConfigurationError: An input lies in it.
    """
    for url in inputs:
        if place.holds(url):
            raise ConfigurationError(
                f"the input {display_url(url)!r} lies in the output folder {str(place)!r}, where it could be replaced: "
                "choose another --output"
            )


def _lines(documents: list[Document], labels: Labels, classifier: str) -> list[dict[str, Any]]:
    return [
        {
            "origin": document.origin,
            "topic": labels.topic(number),
            "topics": {
                CANONICAL_TOPICS[i]: round(float(labels.shares[number, i]), 6)
                for i in np.flatnonzero(labels.shares[number])
            },
            "confidence": round(float(labels.confidence[number]), 4),
            "by": STATED if labels.stated[number] else classifier,
        }
        for number, document in enumerate(documents)
    ]


def _continue_in(place: Place, domain: str, documents: DomainDocuments, labeller: Labeller) -> None:
    """Makes the folder of a domain's labels, or checks that its labels are of the same documents and settings.

    Of a store, it fetches the labels that are there.

    Raises:
        ConfigurationError: They are not, or the folder cannot be written to.
    """
    name = f"{LABELS}/{domain}"
    folder = place.work / name
    settings = {
        "documents": documents.identity,
        "classifier": labeller.classifier.name,
        "part_documents": PART_DOCUMENTS,
        **asdict(labeller.config),
    }
    stored = place.read(f"{name}/{SETTINGS_FILE}") if place.work_is_apart else None
    if folder.is_dir() and not part_names(path.name for path in folder.iterdir()):
        (folder / SETTINGS_FILE).unlink(missing_ok=True)  # of a call that ended at a document that is repaired by now
    differing = differing_settings(folder / SETTINGS_FILE, settings, stored)
    if stored is not None and not differing:
        for part in part_names(place.names(name)):
            data = None if (folder / part).exists() else place.read(f"{name}/{part}")
            if data is not None:
                write_atomically(folder / part, data)
    if differing:
        raise ConfigurationError(
            f"{display_url(place.url(name))!r} holds labels with other {', '.join(differing)}: choose another "
            "--output, or remove the folder to label again"
        )
