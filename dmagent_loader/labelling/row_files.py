"""Files of documents, ``.jsonl.gz``, that several tasks write together.

A task writes the rows of its piece as a gzip member of each file. In the end the members are joined in the order of the
pieces; gzip readers read them as one file. So the bytes depend on the pieces, not on who wrote them.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dmagent_loader.errors import ShardError
from dmagent_loader.shards.inputs.documents import Document
from dmagent_loader.shards.inputs.records import json_value

Add = Callable[[str, dict[str, Any]], None]
"""Adds a row to the file of a name, such as ``source/web.jsonl.gz``; equal rows give equal bytes."""


@contextlib.contextmanager
def row_files(folder: Path, number: int) -> Iterator[Add]:
    """Yields a function that adds rows to the members of a task.

    They appear at the end, whole, if there was no error, and replace those of another attempt.

    Args:
        folder: Folder of the members of all tasks.
        number: Number of the piece.
    """
    files: dict[str, gzip.GzipFile] = {}
    temporary: dict[str, Path] = {}
    with contextlib.ExitStack() as stack:

        def add(name: str, row: dict[str, Any]) -> None:
            if name not in files:
                (folder / name).mkdir(parents=True, exist_ok=True)
                temporary[name] = folder / name / f"{number:08d}.{uuid.uuid4().hex}"
                raw = stack.enter_context(open(temporary[name], "wb"))
                files[name] = stack.enter_context(gzip.GzipFile("", "wb", 6, raw, mtime=0))
            files[name].write(_line(row, name))

        yield add
    for name, path in temporary.items():
        os.replace(path, folder / name / f"{number:08d}")


def check_columns(documents: Iterable[Document]) -> None:
    """Checks before a long job that the columns of documents can be written.

    Raises:
        ShardError: A column holds a value that JSON has no type for, such as bytes.
    """
    for document in documents:
        _line(document.columns, document.origin)


def _line(row: dict[str, Any], place: str) -> bytes:
    try:
        return json.dumps(row, default=json_value).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise ShardError(
            f"a column of {place} cannot be written as JSON ({error}): write the data without this column first"
        ) from error


def join_members(folder: Path, name: str, target: Path) -> None:
    """Joins the members of a file, and waits until it is on disk; a file without rows is an empty one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    members = sorted(path for path in (folder / name).glob("*") if not path.suffix)
    with open(target, "wb") as file:
        for member in members:
            with open(member, "rb") as part:
                shutil.copyfileobj(part, file, 1 << 20)
        if not members:
            file.write(gzip.compress(b"", 6, mtime=0))
        file.flush()
        os.fsync(file.fileno())
