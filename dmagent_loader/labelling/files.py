"""Labelling of whole domains: labels beside the documents, resumable, and the documents sorted by topic.

``OUTPUT/labels/<domain>/part-000000.jsonl.gz`` holds the labels of `PART_DOCUMENTS` documents, in their order. A part
is written whole, so a killed job continues after its last part. ``OUTPUT/<field>/<topic>.jsonl.gz`` holds the documents
of one topic, for `dmagent shard --input OUTPUT/<field> --field <field>`, and ``OUTPUT/unsure/<field>.jsonl.gz`` those
without one.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from dmagent_loader._files import locked, write_atomically
from dmagent_loader._validation import read_regular
from dmagent_loader.errors import ConfigurationError, ShardError
from dmagent_loader.labelling.documents import DomainDocuments
from dmagent_loader.labelling.labels import STATED, Labeller, Labels, batches
from dmagent_loader.mixture.domains import CANONICAL_TOPICS, NUM_TOPICS
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.shards.inputs.documents import Document

PART_DOCUMENTS = 4096
"""Documents of one part: what a killed job may lose, and what is sorted by length."""
LABELS = "labels"
UNSURE_FOLDER = "unsure"
SETTINGS_FILE = "settings.json"

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
            another process writes to it; or it cannot be written to.
        ShardError: A document cannot be read, or a part is damaged.
    """
    root = Path(output)
    with _exclusive(root):
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
        ShardError: A part is damaged.
    """
    for path in sorted(folder.glob("part-*.jsonl.gz")):
        try:
            lines = gzip.decompress(read_regular(path, _MAX_PART_BYTES)).splitlines()
            yield from [json.loads(line) for line in lines]
        except (OSError, EOFError, ValueError) as error:
            raise ShardError(
                f"the labels {path} cannot be read ({error}): remove the file and those after it, and run `dmagent "
                "label` again"
            ) from error


def _label_domain(
    domain: str, documents: DomainDocuments, folder: Path, labeller: Labeller, progress: bool
) -> LabelledDomain:
    counts, total, unsure, stated = np.zeros(NUM_TOPICS), 0, 0, 0
    done = len(list(folder.glob("part-*.jsonl.gz")))
    earlier = read_labels(folder)
    with tqdm(
        total=documents.size,
        unit=documents.unit,
        unit_scale=documents.unit == "B",
        desc=f"labelling {domain}",
        disable=not progress,
    ) as bar:
        for number, batch in enumerate(batches(documents.read(bar.update), PART_DOCUMENTS)):
            if number < done:
                lines = [next(earlier) for _ in batch]
            else:
                lines = _lines(batch, labeller.label(batch), labeller.classifier.name)
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                write_atomically(
                    folder / f"part-{number:06d}.jsonl.gz", gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)
                )
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


def _split(domains: Mapping[str, DomainDocuments], root: Path, progress: bool) -> None:
    """Writes the documents of all domains by field and topic; what an earlier call wrote is replaced."""
    partial = root / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    fields = list(dict.fromkeys(domain.split("/", 1)[0] for domain in domains))
    with contextlib.ExitStack() as stack:
        files: dict[Path, Any] = {}
        for domain, documents in domains.items():
            field = domain.split("/", 1)[0]
            labels = read_labels(root / LABELS / domain)
            with tqdm(total=documents.size, unit=documents.unit, desc=f"sorting {domain}", disable=not progress) as bar:
                for document, label in zip(documents.read(bar.update), labels, strict=True):
                    topic = label["topic"]
                    path = partial / (f"{field}/{topic}.jsonl.gz" if topic else f"{UNSURE_FOLDER}/{field}.jsonl.gz")
                    if path not in files:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        raw = stack.enter_context(open(path, "wb"))
                        files[path] = stack.enter_context(gzip.GzipFile("", "wb", 6, raw, mtime=0))
                    row = {**document.columns, "text": document.text}
                    row |= {"topic": topic, "topic_confidence": label["confidence"], "topic_by": label["by"]}
                    files[path].write(json.dumps(row, default=str).encode() + b"\n")
    for name in (*fields, UNSURE_FOLDER):
        if (partial / name).exists():
            shutil.rmtree(root / name, ignore_errors=True)
            os.replace(partial / name, root / name)
    shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _exclusive(root: Path) -> Iterator[None]:
    """Admits one writer per folder at a time."""
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(root / ".lock"))
        except TimeoutError as error:
            raise ConfigurationError(f"another process is writing labels to {str(root)!r}: wait for it") from error
        except OSError as error:
            raise ConfigurationError(
                f"labels cannot be written to {str(root)!r}: {error}; choose a folder that can be written to, on a "
                "file system with locks"
            ) from error
        yield
