"""Labelling of whole domains: labels beside the documents, resumable, and the documents sorted by topic.

``OUTPUT/labels/<domain>/part-000000.jsonl.gz`` holds the labels of `PART_DOCUMENTS` documents, in their order. A part
is written whole, so a killed job labels the missing parts only. ``OUTPUT/<field>/<topic>.jsonl.gz`` holds the documents
of one topic, for `dmagent shard --input OUTPUT/<field> --field <field>`, and ``OUTPUT/unsure/<field>.jsonl.gz`` those
without one.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from dmagent_loader._files import only_writer, write_atomically
from dmagent_loader._validation import read_regular
from dmagent_loader.errors import ConfigurationError, ShardError
from dmagent_loader.labelling.documents import DomainDocuments
from dmagent_loader.labelling.labels import STATED, Labeller, Labels, batches
from dmagent_loader.mixture.domains import CANONICAL_TOPICS, NUM_TOPICS
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.shards.inputs.documents import Document
from dmagent_loader.shards.sources.urls import display_url, is_local, local_path

PART_DOCUMENTS = 4096
"""Documents of one part: what a killed job may lose, and what is sorted by length."""
LABELS = "labels"
UNSURE_FOLDER = "unsure"
SETTINGS_FILE = "settings.json"
SPLIT_FILE = ".split.json"
"""Marks a folder of sorted documents, and lists its domains."""

_MAX_PART_BYTES = 1 << 30
_PARTIAL = ".partial"


@dataclass(frozen=True, kw_only=True)
class LabelledDomain:
    """Labels of a domain, counted.

    Attributes:
        counts: (T,) documents of each topic; fractions where a label stands for several topics.
        documents: Number of documents.
        unsure: Number of these without a topic.
        stated: Number of these whose label came with the data.
    """

    counts: FloatArray
    documents: int
    unsure: int
    stated: int


def label_domains(
    domains: Mapping[str, DomainDocuments],
    output: str | os.PathLike[str],
    labeller: Labeller,
    *,
    split: bool = False,
    progress: bool = True,
) -> dict[str, LabelledDomain]:
    """Labels every document of every domain. Run again after a kill, it continues after the last complete part.

    Args:
        domains: Domain, such as ``"source/web"`` -> its documents.
        output: Folder of the labels; created if missing.
        labeller: Classifier and settings.
        split: Whether to write the documents sorted by topic, too.
        progress: Show a progress bar.

    Returns:
        Domain -> its labels, counted.

    Raises:
        ConfigurationError: The folder holds labels of other documents, of another classifier or with other settings;
            it holds inputs, or files that sorting would replace and an earlier call did not write; another process
            writes to it; or it cannot be written to.
        ShardError: A document cannot be read, or a part is damaged.
    """
    check_output(output, (url for documents in domains.values() for url in documents.urls))
    root = Path(output)
    with only_writer(root, "labels"):
        if split:
            _check_replaced(domains, root)
        counted = {}
        for domain, documents in domains.items():
            folder = root / LABELS / domain
            _continue_in(folder, documents, labeller)
            counted[domain] = _label_domain(domain, documents, folder, labeller, progress)
        if split:
            _split(domains, root, progress)
    return counted


def read_labels(folder: Path) -> Iterator[dict[str, Any]]:
    """The labels of a domain, in the order of its documents.

    Raises:
        ShardError: A part is damaged or missing.
    """
    for number in range(len(list(folder.glob("part-*.jsonl.gz")))):
        yield from _read_part(_part(folder, number))


def check_output(output: str | os.PathLike[str], inputs: Iterable[str]) -> None:
    """Refuses an output that is no local folder, or that holds inputs, which could be replaced.

    Args:
        output: Folder that is written to.
        inputs: Paths and URLs.

    Raises:
        ConfigurationError: It is a URL, or a local path lies in the folder.
    """
    if not is_local(os.fspath(output)):
        raise ConfigurationError(
            f"{display_url(os.fspath(output))} is a URL, but documents and labels are written to local folders only: "
            "pass a local --output, and `dmagent shard --output URL` writes shards of it"
        )
    root = os.path.realpath(output)
    for url in inputs:
        if is_local(url) and os.path.realpath(local_path(url)).startswith(os.path.join(root, "")):
            raise ConfigurationError(
                f"the input {url!r} lies in the output folder {str(output)!r}, where it could be replaced: choose "
                "another --output"
            )


@contextlib.contextmanager
def rows_file(path: Path) -> Iterator[Callable[[dict[str, Any]], object]]:
    """Yields a function that writes a row to a new ``.jsonl.gz``; equal rows give equal bytes."""
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        yield lambda row: file.write(json.dumps(row, default=str).encode() + b"\n")


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.jsonl.gz"


def _read_part(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in gzip.decompress(read_regular(path, _MAX_PART_BYTES)).splitlines()]
    except (OSError, EOFError, ValueError) as error:
        raise ShardError(
            f"the labels {path} cannot be read ({error}): remove the file, and run `dmagent label` again"
        ) from error


def _labels_of(batch: list[Document], path: Path) -> list[dict[str, Any]]:
    """The labels of a part.

    Raises:
        ShardError: The part is damaged, or holds the labels of other documents.
    """
    lines = _read_part(path)
    # Only the file names: the same folder may be named in another way.
    files = [
        [str(origin).rpartition("/")[2] for origin in origins]
        for origins in (
            (line.get("origin") for line in lines),
            (document.origin for document in batch),
        )
    ]
    if files[0] != files[1]:
        raise ShardError(
            f"the labels {path} are not those of the {len(batch)} documents from {batch[0].origin}: remove the file, "
            "and run `dmagent label` again"
        )
    return lines


def _label_domain(
    domain: str, documents: DomainDocuments, folder: Path, labeller: Labeller, progress: bool
) -> LabelledDomain:
    counts, total, unsure, stated = np.zeros(NUM_TOPICS), 0, 0, 0
    with tqdm(
        total=documents.size,
        unit=documents.unit,
        unit_scale=documents.unit == "B",
        desc=f"labelling {domain}",
        disable=not progress,
    ) as bar:
        for number, batch in enumerate(batches(documents.read(bar.update), PART_DOCUMENTS)):
            path = _part(folder, number)
            if path.exists():
                lines = _labels_of(batch, path)
            else:
                lines = _lines(batch, labeller.label(batch), labeller.classifier.name)
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                write_atomically(path, gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0))
            for line in lines:
                for topic, share in line["topics"].items():
                    counts[CANONICAL_TOPICS.index(topic)] += share
            total += len(lines)
            unsure += sum(line["topic"] is None for line in lines)
            stated += sum(line["by"] == STATED for line in lines)
    return LabelledDomain(counts=counts, documents=total, unsure=unsure, stated=stated)


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


def _continue_in(folder: Path, documents: DomainDocuments, labeller: Labeller) -> None:
    """Makes the folder of a domain's labels, or checks that its labels are of the same documents and settings.

    Raises:
        ConfigurationError: They are not, or the folder cannot be written to.
    """
    text = json.dumps(
        {
            "documents": documents.identity,
            "classifier": labeller.classifier.name,
            "part_documents": PART_DOCUMENTS,
            **asdict(labeller.config),
        },
        indent=1,
    )
    path, settings = folder / SETTINGS_FILE, json.loads(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_atomically(path, text.encode())
        earlier = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"labels cannot be written to {str(folder)!r}: {error}") from error
    differing = sorted(name for name in settings if earlier.get(name) != settings[name])
    if differing:
        raise ConfigurationError(
            f"{str(folder)!r} holds labels with other {', '.join(differing)}: choose another --output, or remove the "
            "folder to label again"
        )


def _fields(domains: Iterable[str]) -> dict[str, list[str]]:
    """Field -> its domains."""
    found: dict[str, list[str]] = {}
    for domain in domains:
        found.setdefault(domain.split("/", 1)[0], []).append(domain)
    return found


def _check_replaced(domains: Iterable[str], root: Path) -> None:
    """Checks that sorting replaces only what an earlier call wrote, and of these domains.

    Raises:
        ConfigurationError: It would replace other files, or drop the documents of other domains.
    """
    for field, names in _fields(domains).items():
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


def _unsure(root: Path, field: str) -> Path:
    return root / UNSURE_FOLDER / f"{field}.jsonl.gz"


def _split(domains: Mapping[str, DomainDocuments], root: Path, progress: bool) -> None:
    """Writes the documents of all domains by field and topic; what an earlier call wrote of a field is replaced."""
    partial = root / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    (partial / UNSURE_FOLDER).mkdir(parents=True)
    for field, names in _fields(domains).items():
        (partial / field).mkdir()
        (partial / field / SPLIT_FILE).write_text(json.dumps({"domains": names}), encoding="utf-8")
    with contextlib.ExitStack() as stack:
        files: dict[Path, Callable[[dict[str, Any]], object]] = {}
        for domain, documents in domains.items():
            field, folder = domain.split("/", 1)[0], root / LABELS / domain
            with tqdm(total=documents.size, unit=documents.unit, desc=f"sorting {domain}", disable=not progress) as bar:
                for number, batch in enumerate(batches(documents.read(bar.update), PART_DOCUMENTS)):
                    for document, label in zip(batch, _labels_of(batch, _part(folder, number)), strict=True):
                        topic = label["topic"]
                        path = partial / field / f"{topic}.jsonl.gz" if topic else _unsure(partial, field)
                        if path not in files:
                            files[path] = stack.enter_context(rows_file(path))
                        row = {**document.columns, "text": document.text}
                        row |= {"topic": topic, "topic_confidence": label["confidence"], "topic_by": label["by"]}
                        files[path](row)
    (root / UNSURE_FOLDER).mkdir(exist_ok=True)
    for field in _fields(domains):
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
