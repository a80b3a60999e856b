"""Shards, labels and documents written to an S3 server, and trained on from there."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import fsspec
import pytest

from dmagent_loader import AgentWeightedSampler
from dmagent_loader._loading.config import ReadingConfig
from dmagent_loader.cli import main
from dmagent_loader.errors import ConfigurationError, DomainError, ShardError
from dmagent_loader.labelling import files
from dmagent_loader.labelling.filtering import DocumentChecks
from dmagent_loader.labelling.labels import Labeller
from dmagent_loader.shards import load_compositions, load_manifest
from dmagent_loader.shards.sources.writing import upload_file
from dmagent_loader.shards.writing import place
from dmagent_loader.shards.writing.config import ShardingConfig
from dmagent_loader.shards.writing.writer import shard_files
from tests.stores import BUCKET, S3Server, forget_filesystems, s3_server

pytest.importorskip("s3fs", reason="needs s3fs: pip install 'dmagent-loader[s3]'")

OUTPUT = f"s3://{BUCKET}/shards"


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    pytest.importorskip("moto.server", reason="needs moto's server: pip install 'moto[s3]' flask flask-cors")
    with s3_server() as server:
        yield server


@pytest.fixture(autouse=True)
def s3(running: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    running.reset()
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DMAGENT_CACHE_DIR", str(tmp_path / "cache"))
    forget_filesystems()
    return running


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"document {number} " * 20}) for number in range(60)]
    path.write_text("\n".join(lines) + "\n{\n", encoding="utf-8")
    return path


CONFIG = ShardingConfig(rows_per_shard=5, max_bad=1)


def stored() -> dict[str, bytes]:
    filesystem = fsspec.filesystem("s3")
    filesystem.invalidate_cache()
    names = filesystem.find(OUTPUT)
    return {name.removeprefix(f"{BUCKET}/shards/"): filesystem.cat_file(name) for name in names}


def names_of_shards() -> list[str]:
    filesystem = fsspec.filesystem("s3")
    filesystem.invalidate_cache()
    return [name for name in filesystem.find(OUTPUT) if name.endswith(".tar")]


def local_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_store_gets_the_files_that_a_folder_gets(texts: Path, tmp_path: Path) -> None:
    local = shard_files({"source/a": [texts]}, tmp_path / "out", CONFIG, progress=False)
    assert shard_files({"source/a": [texts]}, OUTPUT, CONFIG, progress=False) == local
    assert stored() == local_files(tmp_path / "out")
    assert "source/a/rejects.jsonl" in stored()
    work = tmp_path / "cache" / "writing"
    assert not [path for path in work.rglob("*") if path.is_file()], "the work stays"


def test_domains_and_shards_are_added_as_in_a_folder(texts: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"text": "more"}), encoding="utf-8")
    for output in (tmp_path / "out", OUTPUT):
        shard_files({"source/a": [texts]}, output, CONFIG, progress=False)
        with pytest.raises(DomainError, match=r"holds the domain\(s\) \['source/a'\] already"):
            shard_files({"source/a": [more]}, output, CONFIG, progress=False)
        shard_files({"source/a": [more]}, output, CONFIG, append=True, progress=False)
        shard_files({"target/b": [more]}, output, CONFIG, progress=False)
    assert stored() == local_files(tmp_path / "out")
    fsspec.filesystem("s3").pipe_file(f"{OUTPUT}/source/c/x.txt", b"mine")
    with pytest.raises(ConfigurationError, match=r"'s3://corpus/shards/source/c' holds files that .*'x\.txt'"):
        shard_files({"source/c": [more]}, OUTPUT, CONFIG, progress=False)
    with pytest.raises(ConfigurationError, match="where the shards of 'source/a' would be written"):
        shard_files(
            {"source/a": [f"{OUTPUT}/source/a/rejects.jsonl"]},
            OUTPUT,
            ShardingConfig(text_key="reason"),
            append=True,
            progress=False,
        )


@pytest.mark.slow
def test_a_killed_upload_shows_no_shards_and_is_continued(texts: Path, tmp_path: Path) -> None:
    """With a shard for each row the upload takes long enough to be killed in the middle."""
    command = ["shard", "--domain", f"source/a={texts}", "--output", OUTPUT, "--rows-per-shard", "1"]
    command += ["--max-bad", "1", "--no-progress"]
    process = subprocess.Popen([sys.executable, "-m", "dmagent_loader", *command], env={**os.environ})
    try:
        deadline = time.monotonic() + 240
        while len(names_of_shards()) < 3:
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    first = stored().keys()
    of_shards = {f"source/a/a-{number:06d}.tar{suffix}" for number in range(60) for suffix in ("", ".index")}
    assert first < of_shards, "a manifest, or incomplete files"
    filesystem = fsspec.filesystem("s3")
    times = {name: filesystem.info(f"{OUTPUT}/{name}")["LastModified"] for name in first}
    time.sleep(1)  # the server's times are whole seconds
    assert main(command) == 0
    local = tmp_path / "out"
    assert main([*command[:4], str(local), *command[5:]]) == 0
    assert stored() == local_files(local)
    filesystem.invalidate_cache()
    again = {name for name in first if filesystem.info(f"{OUTPUT}/{name}")["LastModified"] != times[name]}
    assert len(again) < len(first), "everything was uploaded again"


TOPICS = ("Sports", "Health", "News")


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Documents that carry their topic; the last has one that nobody knows."""
    path = tmp_path / "topics.jsonl"
    topics = [TOPICS[number % 3] for number in range(24)] + [""]
    rows = [{"text": f"document {number} " * 20, "topic": topic} for number, topic in enumerate(topics)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def label(path: Path | str, output: str, *options: str) -> int:
    return main(["label", "--domain", f"source/web={path}", "--output", output, "--no-progress", *options])


def test_a_store_gets_the_labels_and_documents_that_a_folder_gets(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "PART_DOCUMENTS", 10)
    assert label(labelled, str(tmp_path / "out"), "--split") == label(labelled, OUTPUT) == 0
    assert stored().keys() == {
        f"labels/source/web/{name}" for name in ("settings.json", *(f"part-000000-{n:06d}.jsonl.gz" for n in range(3)))
    }
    unread = Labeller.label
    monkeypatch.setattr(Labeller, "label", lambda *arguments: pytest.fail("labelled again, though the store has them"))
    assert label(labelled, OUTPUT, "--split") == 0
    monkeypatch.setattr(Labeller, "label", unread)
    assert stored() == local_files(tmp_path / "out")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()], "the work stays"
    assert f"next: dmagent shard --input {OUTPUT}/source --field source" in capsys.readouterr().out
    shards = ["--output", str(tmp_path / "shards"), "--no-progress"]
    assert main(["shard", "--input", f"{OUTPUT}/source", "--field", "source", *shards]) == 0
    assert load_manifest(tmp_path / "shards").keys() == {f"source/{topic}" for topic in TOPICS}


def test_compositions_are_written_beside_the_manifest_in_the_store(
    labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = ["shard", "--domain", f"source/web={labelled}", "--keep-columns", "topic", "--output", OUTPUT]
    assert main([*shards, "--no-progress"]) == 0
    assert main(["compose", OUTPUT, "--no-progress"]) == main(["compose", OUTPUT, "--no-progress"]) == 0
    assert f"wrote {OUTPUT}/compositions.json" in capsys.readouterr().out
    assert set(load_compositions(f"{OUTPUT}/compositions.json")["source/web"].counts) == set(TOPICS)
    assert main(["index", OUTPUT, "--no-progress"]) == 0
    assert "source/web" in capsys.readouterr().out, "the folder was taken for a shard"
    pytest.importorskip("matplotlib")
    assert main(["inspect", OUTPUT, "--output", str(labelled.with_suffix(".html")), "--no-progress"]) == 0
    assert main(["index", f"{OUTPUT}/nothing", "--no-progress"]) == 2
    assert f"there is no manifest {OUTPUT}/nothing/manifest.json" in capsys.readouterr().err


def test_other_labels_and_documents_in_a_store_are_not_replaced(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert label(labelled, OUTPUT, "--split") == 0
    before = stored()
    assert label(labelled, OUTPUT, "--min-confidence", "0.9") == 2
    assert f"'{OUTPUT}/labels/source/web' holds labels with other min_confidence" in capsys.readouterr().err
    other = ["label", "--domain", f"source/other={labelled}", "--output", OUTPUT, "--split", "--no-progress"]
    assert main(other) == 2
    assert "holds the documents of ['source/web'], too" in capsys.readouterr().err
    assert label(f"{OUTPUT}/source/Sports.jsonl.gz", OUTPUT) == 2
    assert "lies in the output folder 's3://corpus/shards', where it could be replaced" in capsys.readouterr().err
    assert stored() == before
    both = [*other[:3], "--domain", f"source/web={labelled}", *other[3:]]
    assert main(both) == 0
    assert len(gzip.decompress(stored()["source/Sports.jsonl.gz"]).splitlines()) == 16
    filesystem = fsspec.filesystem("s3")
    filesystem.pipe_file(f"{OUTPUT}/target/mine.txt", b"mine")
    assert main(["label", "--domain", f"target/math={labelled}", "--output", OUTPUT, "--split", "--no-progress"]) == 2
    assert "target/mine.txt' was not written by `dmagent label --split`" in capsys.readouterr().err


@pytest.mark.parametrize("kills", range(6))
def test_labelling_into_a_store_that_is_killed_goes_on(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    """Each upload may be the last of a killed call."""
    whole = tmp_path / "whole"
    assert label(labelled, str(whole), "--split") == 0
    uploads = 0

    def killed(*arguments: object) -> None:
        nonlocal uploads
        if uploads == kills:
            raise KeyboardInterrupt
        uploads += 1
        upload_file(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(place, "upload_file", killed)
        assert label(labelled, OUTPUT, "--split") == 130
    assert label(labelled, OUTPUT, "--split") == 0
    assert stored() == local_files(whole)


def test_a_store_gets_the_documents_that_are_kept(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts.write_text(texts.read_text(encoding="utf-8").removesuffix("{\n") * 2, encoding="utf-8")
    command = ["filter", "--domain", f"source/a={texts}", "--no-progress", "--output"]
    assert main([*command, str(tmp_path / "out")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(place.StorePlace, "move_in", lambda *arguments, **options: pytest.fail("as if killed"))
        with pytest.raises(pytest.fail.Exception):
            main([*command, OUTPUT])
    assert not stored()
    with monkeypatch.context() as patch:
        patch.setattr(DocumentChecks, "examine", lambda *arguments: pytest.fail("examined again"))
        assert main([*command, OUTPUT]) == 0
    assert stored() == local_files(tmp_path / "out")
    assert f"next: dmagent label or shard --input {OUTPUT}/source --field source" in capsys.readouterr().out
    assert main([*command, OUTPUT]) == 2
    assert f"'{OUTPUT}' holds the domain(s) ['source/a'] already" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()], "the work stays"


def test_a_store_that_refuses_is_found_before_the_work(
    s3: S3Server, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ShardError, match=r"s3://nowhere/shards/.*its bucket does not exist: make it"):
        shard_files({"source/a": [texts]}, "s3://nowhere/shards", CONFIG, progress=False)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    for output in ("https://host/shards", f"simplecache::{OUTPUT}", "ftp://host/shards"):
        with pytest.raises(ShardError, match="cannot be written to so that nothing incomplete is seen"):
            shard_files({"source/a": [texts]}, output, CONFIG, progress=False)
    with pytest.raises(ConfigurationError, match=r"work_dir=.* has no effect"):
        shard_files({"source/a": [texts]}, tmp_path / "out", CONFIG, work_dir=tmp_path, progress=False)


def samples(shards: str, count: int, state: object = None) -> tuple[list[str], object]:
    sampler = AgentWeightedSampler(
        load_manifest(shards), samples_per_reweight=16, reading=ReadingConfig(progress=False)
    )
    if state is not None:
        sampler.load_state_dict(state)
    keys = [f"{sample['__domain__']} {sample['__key__']}" for sample in islice(sampler, count)]
    return keys, sampler.state_dict(consumed=count // 2)


def test_a_run_on_shards_in_a_store_is_resumed(texts: Path, tmp_path: Path) -> None:
    for output in (tmp_path / "out", OUTPUT):
        shard_files({"source/a": [texts], "target/b": [texts]}, output, CONFIG, progress=False)
    keys, state = samples(OUTPUT, 32)
    assert keys == samples(str(tmp_path / "out"), 32)[0]
    assert samples(OUTPUT, 16, state)[0] == keys[16:]
    assert samples(f"simplecache::{OUTPUT}/manifest.json", 16, state)[0] == keys[16:]
