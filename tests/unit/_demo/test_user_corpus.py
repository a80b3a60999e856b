"""The user's own text: what is taken, what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from dmagent_loader._demo.config import DemoConfig
from dmagent_loader._demo.user_corpus import read_user_corpus
from dmagent_loader.errors import ConfigurationError, EmptyShardError, EnvironmentDataError, ShardError

CONFIG = DemoConfig(source_chars=4_000, target_chars=4_000)


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def _documents(label: str, count: int = 60) -> list[dict[str, str]]:
    return [{"text": f"{label} document number {i}"} for i in range(count)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    _write(tmp_path / "source" / "Science.jsonl.gz", _documents("science"))
    _write(tmp_path / "source" / "web.jsonl", _documents("web"))
    _write(tmp_path / "target_code" / "python.jsonl", _documents("python"))
    _write(tmp_path / "target_math" / "gsm.jsonl", _documents("gsm"))
    for name in ("general", "code_text_val", "code_text_test", "math"):
        _write(tmp_path / "env" / f"{name}.jsonl", [{"question": f"{name} {i}", "answer": "yes"} for i in range(30)])
    return tmp_path


def test_each_file_is_a_domain_of_its_field(data: Path) -> None:
    corpus = read_user_corpus(data, CONFIG, target="target_math")
    assert list(corpus.documents) == ["source/Science", "source/web", "target/gsm"]
    assert list(corpus.questions) == ["general", "math"]


def test_one_document_in_twenty_is_held_out_and_not_trained_on(data: Path) -> None:
    corpus = read_user_corpus(data, CONFIG)
    assert corpus.held_out["target"] == [f"python document number {i}" for i in (4, 24, 44)]
    assert not set(corpus.held_out["source"]) & {text for texts in corpus.documents.values() for text in texts}


def test_a_field_is_shared_out_equally_over_its_files(data: Path) -> None:
    corpus = read_user_corpus(data, DemoConfig(source_chars=600, target_chars=600))
    assert [sum(map(len, texts)) for texts in corpus.documents.values()] == [300, 300, 600]


def test_of_several_target_folders_the_first_is_used_and_said_so(data: Path) -> None:
    corpus = read_user_corpus(data, CONFIG)
    assert "target/python" in corpus.documents
    assert any("target_code, target_math, target_code is used" in note for note in corpus.notes)


def test_validation_questions_are_preferred_to_test_questions(data: Path) -> None:
    corpus = read_user_corpus(data, CONFIG)
    assert corpus.questions["code"][0].question == "code_text_val 0"


def test_an_exact_name_is_preferred_to_one_that_begins_with_it(data: Path) -> None:
    _write(data / "env" / "code.jsonl", [{"question": "exact", "answer": "yes"}])
    assert read_user_corpus(data, CONFIG).questions["code"][0].question == "exact"


def test_a_folder_called_target_takes_the_only_other_question_file(data: Path) -> None:
    for name in ("code_text_test", "math"):
        (data / "env" / f"{name}.jsonl").unlink()
    (data / "target_code").rename(data / "target")
    corpus = read_user_corpus(data, CONFIG, target="target")
    assert list(corpus.questions) == ["general", "code_text_val"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no folder .*nowhere.* expected source/"):
        read_user_corpus(tmp_path / "nowhere", CONFIG)


def test_no_target_folder_is_named(data: Path) -> None:
    (data / "target_code").rename(data / "a")
    (data / "target_math").rename(data / "b")
    with pytest.raises(ConfigurationError, match="no folder whose name begins with 'target'"):
        read_user_corpus(data, CONFIG)


def test_an_unknown_target_folder_is_refused_with_the_choice(data: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no target folder 'target_law'.*\['target_code', 'target_math'\]"):
        read_user_corpus(data, CONFIG, target="target_law")


def test_a_field_without_json_lines_is_named(data: Path) -> None:
    for path in (data / "source").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(ConfigurationError, match=r"source' is missing or holds no \.jsonl"):
        read_user_corpus(data, CONFIG)


def test_two_files_for_one_domain_are_refused(data: Path) -> None:
    _write(data / "source" / "web.jsonl.gz", _documents("web"))
    with pytest.raises(ConfigurationError, match=r"several files for the domain\(s\) \['web'\]"):
        read_user_corpus(data, CONFIG)


def test_a_line_without_text_names_file_and_line(data: Path) -> None:
    _write(data / "source" / "web.jsonl", [{"text": "fine"}, {"content": "wrong column"}])
    with pytest.raises(ShardError, match=r"web\.jsonl, line 2 has no text in column 'text'"):
        read_user_corpus(data, CONFIG)


def test_a_file_without_documents_is_named(data: Path) -> None:
    (data / "source" / "web.jsonl").write_text("")
    with pytest.raises(EmptyShardError, match=r"web\.jsonl holds no documents"):
        read_user_corpus(data, CONFIG)


def test_missing_questions_are_named_with_what_is_there(data: Path) -> None:
    (data / "env" / "math.jsonl").unlink()
    with pytest.raises(EnvironmentDataError, match=r"needs general\.jsonl and math\.jsonl .*holds \['code_text_test"):
        read_user_corpus(data, CONFIG, target="target_math")


def test_missing_general_questions_are_an_error(data: Path) -> None:
    (data / "env" / "general.jsonl").unlink()
    with pytest.raises(EnvironmentDataError, match=r"needs general\.jsonl"):
        read_user_corpus(data, CONFIG)


def test_mmlu_serves_as_general(data: Path) -> None:
    (data / "env" / "general.jsonl").rename(data / "env" / "mmlu_val_500.jsonl")
    assert read_user_corpus(data, CONFIG).questions["general"][0].question == "general 0"
