"""Only what is known to be data is read; everything else is named, with what to do about it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from shard_fixtures import WriteTar, write_jsonl

from dmagent_loader.errors import ConfigurationError, ShardError, ShardNotFoundError
from dmagent_loader.shards import shard_files
from dmagent_loader.shards.inputs.finding import domain_name, find_inputs
from dmagent_loader.shards.inputs.kinds import Kind, kind_of_name
from dmagent_loader.shards.inputs.options import ReadOptions


def names(path: Path | str, options: ReadOptions | None = None) -> list[str]:
    return [Path(found.url).name for found in find_inputs("source/a", [path], options)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data with what lies beside data."""
    folder = tmp_path / "data"
    (folder / "part").mkdir(parents=True)
    (folder / ".cache").mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", "part/c.json", ".cache/d.jsonl"):
        write_jsonl(folder / name, [{"text": name}])
    for name in ("README.md", "download.log", "dataset_infos.json", "part/_SUCCESS", ".hidden"):
        (folder / name).write_text("not a document")
    return folder


def test_stray_files_in_a_folder_are_named_and_not_read(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A README beside the data became a document, with exit status 0."""
    assert names(folder) == ["a.jsonl.gz", "b.jsonl", "c.json"]
    (message,) = (record.getMessage() for record in caplog.records)
    assert "of the 7 files in" in message
    assert "4 are not read" in message
    assert all(name in message for name in ("README.md", "download.log", "dataset_infos.json", "_SUCCESS"))


def test_stray_files_that_match_a_glob_are_named_and_not_read(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert names(folder / "*") == ["a.jsonl.gz", "b.jsonl", "c.json"]
    assert "README.md" in caplog.text
    assert names(folder / "*.jsonl*") == ["a.jsonl.gz", "b.jsonl"]


def test_a_folder_without_data_is_refused(folder: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "part/c.json"):
        (folder / name).unlink()
    with pytest.raises(ShardError, match=r"README.md is not read.*--text-files \.md"):
        names(folder)


def test_text_files_are_read_when_their_ending_is_named(folder: Path) -> None:
    assert names(folder, ReadOptions(text_files=(".md",))) == ["README.md", "a.jsonl.gz", "b.jsonl", "c.json"]
    with pytest.raises(ConfigurationError, match="'txt', which is not an ending"):
        ReadOptions(text_files=("txt",))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.txt", r"pass --text-files \.txt"),
        ("a", "give a plain text file an ending"),
        ("a.zip", "unpack it"),
        ("a.tar.gz", "unpack it"),
        ("a.xlsx", r"export it as \.csv"),
        ("a.orc", r"convert it to \.parquet"),
        ("a.pdf", "extract its text"),
        ("a.warc.gz", "extract its text"),
        ("a.pkl", "can execute code"),
        ("a.jsonl.lz4", r"compress it as \.gz or \.zst"),
        ("a.parquet.gz", "unpack it"),
        ("notes.txt.gz", r"pass --text-files \.txt \("),
        ("c.pkl.gz", "can execute code"),
        ("a.gz", "give a plain text file an ending"),
        ("data.npy", "convert it"),
        ("a.bin", r"not read without .*a\.idx"),
        ("a.idx", r"not read without .*a\.bin"),
    ],
)
def test_a_named_file_that_is_not_read_is_refused_with_a_remedy(tmp_path: Path, name: str, remedy: str) -> None:
    (tmp_path / name).write_bytes(b"content")
    with pytest.raises(ShardError, match=rf"source/a.*{name}.*{remedy}"):
        find_inputs("source/a", [tmp_path / name])
    with pytest.raises(ShardError):
        shard_files({"source/a": [tmp_path / name]}, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_tar_shard_is_handed_to_the_sampler_unless_its_member_is_named(tmp_path: Path, write_tar: WriteTar) -> None:
    """The members of an existing WebDataset shard became one document of binary text."""
    shard = write_tar("old.tar", [("a.txt", b"text")])
    with pytest.raises(ShardError, match=r"is a tar shard, which the sampler reads as it is.*--tar-member"):
        find_inputs("source/a", [shard])
    (found,) = find_inputs("source/a", [shard], ReadOptions(tar_member="txt"))
    assert found.kind is Kind.TAR


def test_the_manifest_of_a_folder_of_shards_is_no_document(tmp_path: Path, write_tar: WriteTar) -> None:
    """It was read as one, also where the shards were to be written again."""
    folder = Path(write_tar("old.tar", [("a.txt", b"text")])).parent
    for name in ("manifest.json", "more.jsonl"):
        (folder / name).write_text("{}")
    with pytest.raises(ShardError, match=r"holds shards and their manifest.json: give the folder to the sampler"):
        find_inputs("source/a", [folder])
    found = find_inputs("source/a", [folder], ReadOptions(tar_member="txt"))
    assert sorted(os.path.basename(entry.url) for entry in found) == ["more.jsonl", "old.tar"]


def test_an_input_that_is_listed_twice_is_read_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    assert len(find_inputs("source/a", [path, path, tmp_path])) == 1


def test_paths_without_files_are_named(tmp_path: Path) -> None:
    for path in ("nothing.jsonl", "*.jsonl"):
        with pytest.raises(ShardNotFoundError, match="no file at"):
            find_inputs("source/a", [tmp_path / path])


def test_an_empty_folder_is_not_called_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShardNotFoundError, match=r"the folder '.*empty' holds no files: .*what is read: JSON lines"):
        find_inputs("source/a", [tmp_path / "empty"])


def test_the_ending_decides_whatever_the_case_and_the_compression() -> None:
    cases = {
        "a.JSONL": Kind.JSON,
        "c4.json.gz": Kind.JSON,
        "a.ndjson.zst": Kind.JSON,
        "a.csv.bz2": Kind.CSV,
        "a.TSV": Kind.CSV,
        "a.parquet": Kind.PARQUET,
        "data-00000-of-00001.arrow": Kind.ARROW,
        "a.jsonl.gz.part": None,
        "state.json": None,
        "a.json5": None,
        "jsonl": None,
    }
    assert {name: kind_of_name(name) for name in cases} == cases
    assert domain_name("in/Science.v1.jsonl.gz") == "Science"


def test_an_index_that_is_not_of_mds_is_no_data_set_folder(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "index.json").write_text(json.dumps({"shards": [{"format": "other"}]}))
    assert names(tmp_path) == ["a.jsonl", "index.json"]
