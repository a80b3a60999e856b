"""Files of labels: ``part-<piece>-<number>.jsonl.gz``, the labels of successive documents of a piece, in their order.

A part is written whole, so a job that is killed or repeated labels the missing parts only.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dmagent_loader._files import write_atomically
from dmagent_loader._tasks import Advance
from dmagent_loader._validation import read_regular
from dmagent_loader.errors import ShardError
from dmagent_loader.labelling.documents import DocumentPiece
from dmagent_loader.labelling.labels import batches
from dmagent_loader.shards.inputs.documents import Document
from dmagent_loader.shards.inputs.records import Reject

_MAX_PART_BYTES = 1 << 30
_NAME = re.compile(r"part-(\d+)-(\d+)\.jsonl\.gz")


@dataclass(frozen=True, kw_only=True)
class LabelPiece:
    """A piece of a domain, with the place of its labels.

    Attributes:
        domain: Name of the domain.
        number: Number of the piece in the domain.
        documents: The documents.
        folder: Folder of the labels of the domain.
        part_documents: Documents of a part.
    """

    domain: str
    number: int
    documents: DocumentPiece
    folder: Path
    part_documents: int

    def parts(self, advance: Advance, reject: Reject) -> Iterator[tuple[Path, list[Document]]]:
        """Yields the documents of each part, and the path of their labels."""
        for number, batch in enumerate(batches(self.documents.read(advance, reject), self.part_documents)):
            yield self.folder / f"part-{self.number:06d}-{number:06d}.jsonl.gz", batch


def part_names(names: Iterable[str]) -> list[str]:
    """The names of parts among those of files, without their folders."""
    found = (name.rpartition("/")[2] for name in names)
    return sorted(name for name in found if _NAME.fullmatch(name))


def part_files(folder: Path) -> list[Path]:
    """The parts in a folder."""
    return [folder / name for name in part_names(path.name for path in folder.iterdir())]


def write_part(path: Path, lines: list[dict[str, Any]]) -> None:
    """Writes the labels of a part."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(path, gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0))


def read_labels(folder: Path) -> Iterator[dict[str, Any]]:
    """The labels of a domain, in the order of its documents.

    Raises:
        ShardError: A part is damaged or missing.
    """
    names = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    numbers = sorted((int(name[1]), int(name[2])) for name in names if name is not None)
    for (piece, number), (next_piece, next_number) in pairwise([(-1, 0), *numbers]):
        if (next_piece, next_number) not in {(piece, number + 1), (piece + 1, 0)}:
            raise ShardError(
                f"the labels before part-{next_piece:06d}-{next_number:06d} in {str(folder)!r} are missing: run "
                "`dmagent label` again"
            )
    for piece, number in numbers:
        yield from read_part(folder / f"part-{piece:06d}-{number:06d}.jsonl.gz")


def read_part(path: Path) -> list[dict[str, Any]]:
    """The labels of a part.

    Raises:
        ShardError: It is damaged.
    """
    try:
        return [json.loads(line) for line in gzip.decompress(read_regular(path, _MAX_PART_BYTES)).splitlines()]
    except (OSError, EOFError, ValueError) as error:
        raise ShardError(
            f"the labels {path} cannot be read ({error}): remove the file, and run `dmagent label` again"
        ) from error


def labels_of(batch: list[Document], path: Path) -> list[dict[str, Any]]:
    """The labels of the documents of a part.

    Raises:
        ShardError: The part is damaged, or holds the labels of other documents.
    """
    lines = read_part(path)
    # Only the file names: the same folder may be named in another way. As in a part, those that are not UTF-8 have
    # question marks.
    files = [
        [str(origin).rpartition("/")[2].encode("utf-8", "replace") for origin in origins]
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
