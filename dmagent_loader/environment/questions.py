"""Question files: JSON lines with the columns ``question`` and ``answer``, plain or gzipped."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

from dmagent_loader._validation import without_repeats
from dmagent_loader.errors import EnvironmentDataError

COLUMNS = ("question", "answer")

T = TypeVar("T")
Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with its answer.

    Args:
        question: Prompt given to the model; may be empty.
        answer: Text to score.
        origin: Source for error messages: file and line, or position in a list.
    """

    question: str
    answer: str
    origin: str


def read_questions(paths: Paths, *, cloze: bool = False) -> list[Question]:
    """Reads question files in the given order, ignoring blank lines and other columns.

    Args:
        paths: One path or several, ``.jsonl`` or ``.jsonl.gz``.
        cloze: Reduce multiple-choice rows (columns ``stem``, ``choices`` and ``answer_index``) to the stem and the
            correct choice, without the list of choices. Small models cannot use the list, and it makes their scores
            mostly noise.

    Raises:
        EnvironmentDataError: A file is missing, empty, or not valid gzip, UTF-8 or JSON, or a row lacks one of the two
            columns as text. The message names the file, the line and the column.
    """
    listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not listed:
        raise EnvironmentDataError("the list of question files is empty: give at least one path for each field")
    return [question for path in listed for question in _read_file(Path(path), cloze)]


def questions_from_pairs(field: str, pairs: Iterable[tuple[str, str]]) -> list[Question]:
    """Builds questions from (question, answer) pairs in memory.

    Raises:
        EnvironmentDataError: An entry is not a pair of strings.
    """
    questions = []
    for number, pair in enumerate(pairs):
        origin = f"pair {number} of field {field!r}"
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise EnvironmentDataError(f"{origin} is {_shown(pair)}: give (question, answer)")
        questions.append(_question(dict(zip(COLUMNS, pair, strict=True)), origin))
    return questions


def evenly_spaced(questions: list[T], limit: int | None) -> list[T]:
    """At most `limit` questions, evenly spaced: the first rows of a file sorted by subject would cover one subject."""
    if limit is None or len(questions) <= limit:
        return questions
    return [questions[i * len(questions) // limit] for i in range(limit)]


def _read_file(path: Path, cloze: bool) -> list[Question]:
    questions = [_parse(line, f"line {number} of {path}", cloze) for number, line in _lines(path) if line.strip()]
    if not questions:
        raise EnvironmentDataError(
            f"{path} holds no questions: write one JSON object per line with the columns {' and '.join(COLUMNS)}"
        )
    return questions


def _lines(path: Path) -> list[tuple[int, bytes]]:
    """Numbered lines, read to the end before any is used: the checksum of a gzip file comes last."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            return list(enumerate(file, start=1))
    except FileNotFoundError as error:
        raise EnvironmentDataError(f"there is no question file {path}: check the path") from error
    except (OSError, EOFError, zlib.error) as error:
        raise EnvironmentDataError(
            f"question file {path} cannot be read to its end ({error}): none of it is used; write it again"
        ) from error


def _parse(line: bytes, origin: str, cloze: bool) -> Question:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=without_repeats)
    except UnicodeDecodeError as error:
        raise EnvironmentDataError(f"{origin} is not UTF-8 ({error}): convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, brackets in brackets
        raise EnvironmentDataError(f"{origin} is not JSON ({error}): write one JSON object per line") from error
    if not isinstance(row, dict):
        raise EnvironmentDataError(
            f"{origin} is {_shown(row)}, not a JSON object with the columns {' and '.join(COLUMNS)}"
        )
    return _question(_as_cloze(row, origin) if cloze and "choices" in row else row, origin)


def _as_cloze(row: dict[str, object], origin: str) -> dict[str, object]:
    choices, index = row["choices"], row.get("answer_index")
    if not isinstance(choices, list) or not isinstance(index, int) or not 0 <= index < len(choices):
        raise EnvironmentDataError(
            f"{origin} has choices {_shown(choices)} and answer_index {_shown(index)}: answer_index must be the "
            "position of the correct choice in a list, counted from 0"
        )
    # HellaSwag and similar sets have no stem: their question does not contain the list.
    return {"question": row.get("stem", row.get("question")), "answer": choices[index]}


def _question(row: dict[str, object], origin: str) -> Question:
    texts = {}
    for column in COLUMNS:
        if column not in row:
            raise EnvironmentDataError(
                f"{origin} has no column {column!r} (its columns: {', '.join(map(repr, row)) or 'none'}): "
                f"rename or add it; every row needs {' and '.join(COLUMNS)}"
            )
        text = row[column]
        if not isinstance(text, str):
            raise EnvironmentDataError(f"column {column!r} in {origin} is {_shown(text)}: it must be text")
        if column == "answer" and not text:
            raise EnvironmentDataError(f"the answer in {origin} is empty: there is nothing to score; remove the row")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise EnvironmentDataError(
                f"column {column!r} in {origin} contains half of a surrogate pair ({error}), which tokenizers cannot "
                "encode: repair or remove the row"
            ) from error
        texts[column] = text
    return Question(question=texts["question"], answer=texts["answer"], origin=origin)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
