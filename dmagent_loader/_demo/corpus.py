"""The text of the demo: documents per domain, held-out documents per field, and question sets."""

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
"""Name of the environment's field to keep; it measures the source field."""

_START_CHARS = 24
"""Answers are indexed by their first characters, so each position of the text costs one table lookup."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training text, held-out text and question sets.

    Args:
        title: Short description of the text, for headings.
        documents: Training documents by domain name; the names start with their field.
        held_out: Documents of each field that are not trained on, by field name.
        questions: Question sets by name of the environment's field: first the field to keep, then that to acquire.
        notes: Choices made while collecting, for readers of the results.
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
    """Text with each run of white space replaced by one blank: a copy is recognised in any layout."""
    return re.sub(r"\s+", " ", text).strip()


def unseen(questions: Iterable[Question], documents: Iterable[str]) -> list[Question]:
    """The questions whose answer is not in the training documents, without repeated questions or answers.

    Holding out modules is not enough: the same sentence or function body often appears in several modules. A copy is
    found if it starts at the beginning of a word.
    """
    candidates: dict[str, Question] = {}
    chosen: set[str] = set()
    for question in questions:
        answer = normalized(question.answer)
        if answer not in candidates and question.question not in chosen:
            candidates[answer] = question
            chosen.add(question.question)
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
    """Evenly spaced questions, as many as the limits on their number and their text allow."""
    chars = sum(len(q.question) + len(q.answer) for q in questions)
    limit = config.questions if not chars else min(config.questions, config.question_chars * len(questions) // chars)
    return evenly_spaced(questions, max(1, limit))


def write_corpus(corpus: Corpus, folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Writes the corpus as JSON lines, like a user's text: ``<field>/<domain>.jsonl`` and ``env/<field>.jsonl``.

    Returns:
        Domain -> file, and field of the environment -> file.
    """
    domains, questions = {}, {}
    for name, documents in corpus.documents.items():
        domains[name] = _write_lines(folder / f"{name}.jsonl", ({"text": text} for text in documents))
    for name, selected in corpus.questions.items():
        rows = ({"question": q.question, "answer": q.answer, "origin": q.origin} for q in selected)
        questions[name] = _write_lines(folder / "env" / f"{name}.jsonl", rows)
    return domains, questions


def _write_lines(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path
