"""The corpus that the running Python installation gives."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

from dmagent_loader._demo.config import DemoConfig
from dmagent_loader._demo.corpus import Corpus, normalized
from dmagent_loader._demo.python_corpus import build_python_corpus, is_held_out
from dmagent_loader._demo.python_source import PythonFile
from dmagent_loader.mixture.domains import SOURCE, TARGET

SMALL = DemoConfig(source_chars=600_000, target_chars=300_000, questions=60)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build_python_corpus(SMALL)


@pytest.fixture(scope="module")
def training(corpus: Corpus) -> str:
    return "\n".join(normalized(text) for texts in corpus.documents.values() for text in texts)


def test_both_fields_have_several_domains(corpus: Corpus) -> None:
    assert len(corpus.domains_of(SOURCE)) >= 4
    assert len(corpus.domains_of(TARGET)) >= 4
    assert list(corpus.questions) == ["general", "code"]
    assert all(len(asked) == 60 for asked in corpus.questions.values())


def test_questions_come_from_modules_that_are_held_out(corpus: Corpus) -> None:
    for question in corpus.questions["code"]:
        assert is_held_out(question.origin.split(":")[0]), question.origin
    for question in corpus.questions["general"]:
        parts = question.origin.split(".")
        assert any(is_held_out(".".join(parts[:n])) for n in range(1, len(parts) + 1)), question.origin


def test_no_answer_occurs_in_the_training_text(corpus: Corpus, training: str) -> None:
    """Catches holding out modules alone: many functions share their first line with one of another module."""
    found = [q.origin for asked in corpus.questions.values() for q in asked if normalized(q.answer) in training]
    assert found == []


def test_no_held_out_document_occurs_in_the_training_text(corpus: Corpus, training: str) -> None:
    for field, documents in corpus.held_out.items():
        assert documents, field
        assert all(normalized(document) not in training for document in documents)


@pytest.mark.parametrize("module", ["shlex", "textwrap", "bisect", "queue", "socketserver", "difflib", "cmd"])
def test_code_of_a_module_is_trained_on_only_if_it_is_not_held_out(module: str, training: str) -> None:
    file = PythonFile.read(Path(sysconfig.get_path("stdlib")) / f"{module}.py", module)
    assert file is not None
    if is_held_out(module):
        assert normalized(file.code()) not in training
        assert normalized(file.page()) not in training


def test_the_same_installation_gives_the_same_corpus(corpus: Corpus) -> None:
    assert build_python_corpus(SMALL) == corpus


def test_domains_keep_to_their_limit(corpus: Corpus) -> None:
    """A domain closes with the document that reaches its share; the next document is not taken."""
    for field, limit in ((SOURCE, SMALL.source_chars), (TARGET, SMALL.target_chars)):
        names = corpus.domains_of(field)
        for name in names:
            assert sum(map(len, corpus.documents[name][:-1])) < limit // len(names) + 1


def test_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches collecting by import or by `inspect`: many modules have effects when they are imported."""
    before = set(sys.modules)
    build_python_corpus(SMALL)
    collected = {"turtle", "idlelib", "antigravity", "sympy", "lib2to3", "imaplib"} - before
    assert not collected & set(sys.modules)
