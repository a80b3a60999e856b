"""What may be asked, and how a corpus is written."""

from __future__ import annotations

import json
from pathlib import Path

from dmagent_loader._demo.config import DemoConfig
from dmagent_loader._demo.corpus import Corpus, affordable, normalized, unseen, write_corpus
from dmagent_loader.environment import Question
from dmagent_loader.environment.questions import read_questions


def _question(answer: str, question: str = "") -> Question:
    return Question(question=question or f"What is {answer}?", answer=answer, origin="here")


def test_a_question_whose_answer_was_trained_on_is_not_asked() -> None:
    seen, fresh = _question("Return the sum of all numbers."), _question("Return the product of all numbers.")
    assert unseen([seen, fresh], ["x = 1", "Docs. Return the sum of all numbers. More."]) == [fresh]


def test_a_copy_in_another_layout_is_still_a_copy() -> None:
    """Catches a search for the exact characters: docstrings are wrapped and indented differently in every file."""
    question = _question("Return the sum of all numbers\nin the list.")
    assert unseen([question], ["def f():\n    Return the sum of\n        all   numbers in the list.\n"]) == []


def test_a_long_beginning_in_common_is_no_copy() -> None:
    """Answers are looked up by their first characters; only the whole answer counts."""
    question = _question("Return the sum of all numbers that are even.")
    assert unseen([question], ["Return the sum of all numbers that are odd."]) == [question]


def test_two_answers_with_the_same_beginning_are_both_found() -> None:
    both = [_question("Return the sum of all numbers."), _question("Return the sum of all squares.")]
    assert unseen(both, ["a Return the sum of all squares. b Return the sum of all numbers. c"]) == []


def test_each_question_and_each_answer_is_asked_once() -> None:
    first = _question("An answer that is long enough.", "Q1")
    again = _question("An  answer that is long enough.", "Q2")
    same = _question("Another answer, also long enough.", "Q1")
    assert unseen([first, again, same], []) == [first]


def test_the_number_of_questions_follows_their_length() -> None:
    config = DemoConfig(questions=50, question_chars=1_000)
    short = [_question("a", f"{i:04d}") for i in range(200)]
    long = [_question("a" * 96, f"{i:04d}") for i in range(200)]
    assert len(affordable(short, config)) == 50
    assert len(affordable(long, config)) == 10
    assert affordable(long, config)[-1] == long[180], "evenly spaced, not the first ones"
    assert affordable([], config) == []


def test_a_written_corpus_is_what_a_user_could_have_written(tmp_path: Path) -> None:
    corpus = Corpus(
        title="x",
        documents={"source/web": ["one\ntwo", "drei ß"], "target/code": ["x = '\\n'"]},
        held_out={},
        questions={"general": [_question("yes")]},
    )
    domains, questions = write_corpus(corpus, tmp_path)
    assert domains["source/web"] == tmp_path / "source" / "web.jsonl"
    lines = domains["source/web"].read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == corpus.documents["source/web"]
    assert [(q.question, q.answer) for q in read_questions(questions["general"])] == [("What is yes?", "yes")]


def test_normalized_text_has_single_blanks() -> None:
    assert normalized("  a\n\tb  c\n") == "a b c"
