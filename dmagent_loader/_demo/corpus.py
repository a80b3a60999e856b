"""What the demo trains and measures on: documents per domain, held-out documents per field, question sets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dmagent_loader._demo.config import DemoConfig
from dmagent_loader.environment import Question
from dmagent_loader.environment.questions import evenly_spaced
from dmagent_loader.mixture.domains import DomainSpace

GENERAL = "general"
"""The environment's field that is to be kept; it measures the source field."""

_START_CHARS = 24
"""Answers are looked up by their first characters, so that each position of the text costs one look at a table."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training text, held-out text and question sets.

    Args:
        title: What the text is, for headings.
        documents: Training documents by domain name; the names start with their field.
        held_out: Documents of each field that are not trained on, by field name.
        questions: Question sets by name of the environment's field: first the one to keep, then the one to acquire.
        notes: Choices that were made while collecting and that a reader of the results should know.
    """

    title: str
    documents: dict[str, list[str]]
    held_out: dict[str, list[str]]
    questions: dict[str, list[Question]]
    notes: tuple[str, ...] = ()

    @property
    def space(self) -> DomainSpace:
        """The domains in order."""
        return DomainSpace.from_names(self.documents)

    def domains_of(self, field: str) -> list[str]:
        """Names of the domains of one field."""
        return [domain.name for domain in self.space.domains if domain.field == field]


def normalized(text: str) -> str:
    """Text with runs of white space made one blank, so that a change of layout does not hide a copy."""
    return re.sub(r"\s+", " ", text).strip()


def unseen(questions: Iterable[Question], documents: Iterable[str]) -> list[Question]:
    """The questions whose answer occurs nowhere in the training documents, each question and each answer once.

    Holding out modules is not enough: the same sentence or the same body is often written in several modules. A copy is
    found wherever it starts at the beginning of a word.
    """
    candidates: dict[str, Question] = {}
    asked: set[str] = set()
    for question in questions:
        answer = normalized(question.answer)
        if answer not in candidates and question.question not in asked:
            candidates[answer] = question
            asked.add(question.question)
    by_start: dict[str, list[str]] = {}
    for answer in candidates:
        by_start.setdefault(answer[:_START_CHARS], []).append(answer)
    for document in documents:
        text = normalized(document)
        position = 0
        while position >= 0 and position < len(text):
            for answer in by_start.get(text[position : position + _START_CHARS], ()):
                if text.startswith(answer, position):
                    candidates.pop(answer, None)
            blank = text.find(" ", position)
            position = blank + 1 if blank >= 0 else -1
    return list(candidates.values())


def affordable(questions: list[Question], config: DemoConfig) -> list[Question]:
    """As many questions, evenly spaced, as the limits on their number and on their text allow."""
    chars = sum(len(q.question) + len(q.answer) for q in questions)
    limit = config.questions if not chars else min(config.questions, config.question_chars * len(questions) // chars)
    return evenly_spaced(questions, max(1, limit))


def write_corpus(corpus: Corpus, folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Writes the corpus as the JSON lines that users have: ``<field>/<domain>.jsonl`` and ``env/<field>.jsonl``.

    Returns:
        Domain -> file, and field of the environment -> file.
    """
    domains, questions = {}, {}
    for name, documents in corpus.documents.items():
        domains[name] = _write_lines(folder / f"{name}.jsonl", ({"text": text} for text in documents))
    for name, asked in corpus.questions.items():
        rows = ({"question": q.question, "answer": q.answer, "origin": q.origin} for q in asked)
        questions[name] = _write_lines(folder / "env" / f"{name}.jsonl", rows)
    return domains, questions


def _write_lines(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path
