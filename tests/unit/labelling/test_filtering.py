"""Each reason to drop a document, and `dmagent filter` with its counts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_fixtures import write_jsonl

from dmagent_loader._files import locked
from dmagent_loader.cli import main
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.labelling import filter_files
from dmagent_loader.labelling.filtering import (
    CONTAMINATED,
    EXACT,
    LENGTH,
    NEAR,
    QUALITY,
    DocumentChecks,
    DocumentFilter,
    Examined,
    FilterConfig,
)
from dmagent_loader.shards.inputs.documents import Document

QUESTION = (
    "A train leaves the old station at noon and travels north at forty miles an hour. How far is it at three? 120"
)
SHORT = "What is the name of the largest moon of Saturn? Titan"


def reasons(texts: Sequence[str], questions: Sequence[str] = (), **settings: Any) -> list[str | None]:
    checked = DocumentFilter(FilterConfig(**settings), questions)
    return checked.reasons([Document(text, {}, "") for text in texts])


def words(seed: int, count: int = 120) -> list[str]:
    return [f"w{n}" for n in np.random.default_rng(seed).integers(0, 10_000, count)]


def test_lengths() -> None:
    assert reasons(["a" * n for n in (4, 5, 9, 10)], min_characters=5, max_characters=9) == [LENGTH, None, None, LENGTH]


def test_exact_duplicates_ignore_white_space_only() -> None:
    """Operators and case are content: x=a+b and x=a-b have the same words."""
    assert reasons(["one two", " one\n\ttwo ", "One two", "", " "]) == [None, EXACT, None, None, EXACT]
    assert reasons(["x=a+b", "x=a-b", "x=a+b"]) == [None, None, EXACT]
    assert reasons(["a b", "a b"], exact_duplicates=False) == [None, None]


def test_near_duplicates_are_those_above_the_similarity() -> None:
    """3 of 120 words changed: a Jaccard similarity of about 0.78; 30 changed: about 0.15."""
    pytest.importorskip("datasketch")
    text, close, far = words(0), words(0), words(0)
    for n in (10, 60, 100):
        close[n] = "changed"
    far[::4] = ["changed"] * 30
    texts = [" ".join(part) for part in (text, close, far, words(1))]
    assert reasons(texts, near_duplicates=0.6) == [None, NEAR, None, None]
    assert reasons(texts, near_duplicates=0.95) == [None, None, None, None]
    for similarity in (0.99, 1):  # the index of datasketch has no bands for these
        assert reasons([texts[0], texts[0], texts[1]], near_duplicates=similarity, exact_duplicates=False) == [
            None,
            NEAR,
            None,
        ]
    assert reasons(["one two", "one, two", "three"], near_duplicates=0.9, exact_duplicates=False) == [None, NEAR, None]


def test_a_dropped_document_does_not_stand_for_others() -> None:
    """A repeat of a document that was dropped for its length is dropped for its length, too, not as a repeat."""
    assert reasons(["ab", "ab", "abc", "abc"], min_characters=3) == [LENGTH, LENGTH, None, EXACT]


def test_a_document_that_is_dropped_later_has_no_near_duplicates() -> None:
    """A contaminated document is not kept, so its clean near duplicate must be."""
    pytest.importorskip("datasketch")
    clean = words(0)
    dirty = " ".join([*clean, *QUESTION.split()[:13]])
    assert reasons([dirty, " ".join(clean)], [QUESTION], near_duplicates=0.6) == [CONTAMINATED, None]
    checked = DocumentFilter(FilterConfig(near_duplicates=0.6), quality=Refuses())
    found = checked.reasons([Document(text, {}, "") for text in (" ".join([*clean, "low"]), " ".join(clean))])
    assert found == [QUALITY, None]


class Refuses:
    """Texts that end in "low" are of low quality."""

    name, labels = "refuses", ("High", "Low")

    def probabilities(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        return np.stack([np.eye(2)[int(text.endswith("low"))] for text in texts])


def test_thirteen_words_of_a_question_contaminate() -> None:
    some = QUESTION.split()
    thirteen, twelve = " ".join(some[2:15]), " ".join(some[2:14])
    texts = [f"Before. {thirteen.upper()}, after", f"before {twelve} after", QUESTION, "nothing of it"]
    assert reasons(texts, [QUESTION]) == [CONTAMINATED, None, CONTAMINATED, None]


def test_a_shorter_question_contaminates_as_a_whole_and_a_very_short_one_is_not_looked_for() -> None:
    texts = [f"quiz: {SHORT}!", " ".join(SHORT.split()[:-1]), "who wrote it? me"]
    checked = DocumentFilter(FilterConfig(), [SHORT, "Who wrote it? Me"])
    assert checked.reasons([Document(text, {}, "") for text in texts]) == [CONTAMINATED, None, None]
    assert checked.num_questions_checked == 1


class ByLength:
    """Long texts are good; it records what it is asked."""

    name, labels = "by length", ("High", "Medium", "Low")

    def __init__(self) -> None:
        self.seen: list[str] = []

    def probabilities(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        self.seen += texts
        return np.stack([np.eye(3)[0 if len(text) > 8 else 1 if len(text) > 4 else 2] for text in texts])


def test_low_quality_is_dropped_and_only_what_is_left_is_classified() -> None:
    quality = ByLength()
    documents = [Document(text, {}, "") for text in ("long enough", "middle", "low", "low", "x")]
    checked = DocumentFilter(FilterConfig(min_characters=2), quality=quality)
    assert checked.reasons(documents) == [None, None, QUALITY, EXACT, LENGTH]
    assert quality.seen == ["long enough", "middle", "low"]
    with pytest.raises(ConfigurationError, match=r"\['Bad'\] are not among those of by length"):
        DocumentFilter(FilterConfig(dropped_quality=("Bad",)), quality=quality)


@pytest.mark.parametrize(("label", "dropped"), [("LOW", "Low"), ("low", "Low"), (0, "0")])
def test_a_stated_quality_may_be_in_any_case_or_a_number(label: Any, dropped: str) -> None:
    """It was kept, without a word."""
    documents = [Document("one", {"quality": label}, ""), Document("two", {"quality": "High"}, "")]
    checked = DocumentFilter(FilterConfig(quality_key="quality", dropped_quality=(dropped,)))
    assert checked.reasons(documents) == [QUALITY, None]


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="no document fits"):
        FilterConfig(min_characters=5, max_characters=4)
    with pytest.raises(ConfigurationError, match="near_duplicates is 80"):
        FilterConfig(near_duplicates=80)


def test_the_command_counts_what_it_drops_over_all_domains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "kept here", "id": 1}, {"text": "x"}, {"text": f"see {QUESTION}"}]
    web = write_jsonl(tmp_path / "web.jsonl", rows)
    math = write_jsonl(tmp_path / "math.jsonl.gz", [{"text": "kept  here"}, {"text": "only here"}])
    questions = [{"question": QUESTION, "answer": "120"}, {"question": "Why?", "answer": "So"}]
    quiz = write_jsonl(tmp_path / "quiz.jsonl", questions)
    command = ["filter", "--domain", f"source/web={web}", "--domain", f"target/math={math}", "--min-characters", "3"]
    command += ["--decontaminate", str(quiz), "--output", str(tmp_path / "out"), "--no-progress"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 questions are looked for" in printed
    assert "source/web: 1 of 3 kept; dropped: 1 length, 1 contaminated" in printed
    assert "target/math: 1 of 2 kept; dropped: 1 exact duplicate" in printed

    def read(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in gzip.decompress((tmp_path / "out" / name).read_bytes()).splitlines()]

    assert read("source/web.jsonl.gz") == [{"id": 1, "text": "kept here"}]
    assert read("target/math.jsonl.gz") == [{"text": "only here"}]
    assert [row["reason"] for row in read("dropped/source/web.jsonl.gz")] == ["length", "contaminated"]
    assert not (tmp_path / "out" / ".filtering").exists()
    assert main(command) == 2
    assert "holds the domain(s) ['source/web', 'target/math'] already" in capsys.readouterr().err


def test_bad_records_are_left_out_up_to_the_bound_and_listed_as_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web, output = tmp_path / "web.jsonl", tmp_path / "out"
    web.write_text('{"text": "one"}\n{"text": 1}\n{"text": "one"}\n{\n{"text": "two"}\n')
    command = ["filter", "--domain", f"source/web={web}", "--output", str(output), "--no-progress"]
    assert main(command) == 2
    assert "line 2 has no text in column 'text', but 1: " in capsys.readouterr().err
    assert main([*command, "--max-bad", "1"]) == 2
    assert "more than 1 records that are no documents, the last: " in capsys.readouterr().err
    assert main([*command, "--max-bad", "2"]) == 0
    assert "source/web: 2 of 5 kept; dropped: 1 exact duplicate, 2 bad record" in capsys.readouterr().out
    kept, dropped = (
        [json.loads(line) for line in gzip.decompress((output / name).read_bytes()).splitlines()]
        for name in ("source/web.jsonl.gz", "dropped/source/web.jsonl.gz")
    )
    assert [row["text"] for row in kept] == ["one", "two"]
    assert [(row["origin"].rpartition(", ")[2], row["reason"]) for row in dropped] == [
        ("line 2", "bad record"),
        ("line 3", "exact duplicate"),
        ("line 4", "bad record"),
    ]
    assert "line 4 is not JSON" in dropped[2]["fault"]


def test_the_command_refuses_an_output_that_holds_its_inputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    web = write_jsonl(tmp_path / "out" / "web.jsonl", [{"text": "kept here"}])
    command = ["filter", "--domain", f"source/web={web}", "--output", str(tmp_path / "out"), "--no-progress"]
    assert main(command) == 2
    assert "lies in the output folder" in capsys.readouterr().err
    assert main([*command, "--drop-quality", "Medium"]) == 2
    assert "--drop-quality has no effect without --quality" in capsys.readouterr().err


def test_the_command_refuses_names_that_shard_would_refuse_and_leaves_its_unfinished_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A filter that was done removed `.partial`."""
    unfinished = tmp_path / "out" / ".partial" / "job" / "chunk.safetensors"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(b"hours of work")
    web = write_jsonl(tmp_path / "web.jsonl", [{"text": "kept here"}])
    command = ["filter", "--output", str(tmp_path / "out"), "--no-progress", "--domain"]
    assert main([*command, f"source/../web={web}"]) == 2
    assert "domain 'source/../web' cannot be a folder" in capsys.readouterr().err
    assert main([*command, f"source/web={web}"]) == 0
    assert unfinished.read_bytes() == b"hours of work"


def test_an_input_that_vanishes_is_not_called_a_fault_of_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = tmp_path / "a.tar"
    tar.touch()
    examine = DocumentChecks.examine

    def removed(self: DocumentChecks, *arguments: Any) -> Examined:
        tar.unlink(missing_ok=True)
        return examine(self, *arguments)

    monkeypatch.setattr(DocumentChecks, "examine", removed)
    web = write_jsonl(tmp_path / "web.jsonl", [{"text": "kept here"}])
    command = ["filter", "--domain", f"source/web={web}", "--domain", f"source/tar={tar}", "--tar-member", "txt"]
    assert main([*command, "--output", str(tmp_path / "out"), "--no-progress"]) == 2
    assert "cannot be written" not in capsys.readouterr().err


def test_two_processes_do_not_filter_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second one would remove the documents of the first, which it has not finished."""
    web = write_jsonl(tmp_path / "web.jsonl", [{"text": "kept here"}])
    command = ["filter", "--domain", f"source/web={web}", "--output", str(tmp_path / "out"), "--no-progress"]
    with locked(tmp_path / "out" / ".lock"):
        assert main(command) == 2
    assert "another process is writing documents to" in capsys.readouterr().err
    assert main(command) == 0


def test_what_was_found_is_not_looked_for_again_and_damage_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first call dies in the third part of two documents."""
    monkeypatch.setattr(filter_files, "PART_DOCUMENTS", 2)
    web = write_jsonl(tmp_path / "web.jsonl", [{"text": text} for text in ("one", "two", "one", "three", "four")])
    command = ["filter", "--domain", f"source/web={web}", "--output", str(tmp_path / "out"), "--no-progress"]
    examine, seen = DocumentChecks.examine, []

    def dies(self: DocumentChecks, documents: Sequence[Document], *others: Any) -> Examined:
        seen.extend(document.text for document in documents)
        if seen == ["one", "two", "one", "three", "four"]:
            raise KeyboardInterrupt
        return examine(self, documents, *others)

    monkeypatch.setattr(DocumentChecks, "examine", dies)
    assert main(command) == 130
    part = tmp_path / "out" / ".filtering" / "found" / "part-000000-000001.safetensors"
    content = part.read_bytes()
    part.write_bytes(content[:9])
    assert main(command) == 2
    assert f"the unfinished work {part} cannot be read" in capsys.readouterr().err
    part.write_bytes(content)
    seen.clear()
    assert main(command) == 0
    assert seen == ["four"]
    assert "source/web: 4 of 5 kept; dropped: 1 exact duplicate" in capsys.readouterr().out
    assert not (tmp_path / "out" / ".filtering").exists()


def test_an_input_that_changes_while_it_is_filtered_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Documents are read twice: to examine them, and to write them."""
    decide = DocumentFilter.decide
    for changed in ([{"text": "one"}, {"text": "two"}], []):
        web = write_jsonl(tmp_path / "web.jsonl", [{"text": "one"}])

        def changes(self: DocumentFilter, found: Examined, rows: Sequence[Any] = changed) -> list[str | None]:
            write_jsonl(tmp_path / "web.jsonl", list(rows))
            return decide(self, found)

        monkeypatch.setattr(DocumentFilter, "decide", changes)
        output = tmp_path / f"out{len(changed)}"
        assert main(["filter", "--domain", f"source/web={web}", "--output", str(output), "--no-progress"]) == 2
        assert "the inputs of domain 'source/web' have changed while they were filtered" in capsys.readouterr().err
        assert not (output / "source").exists()
