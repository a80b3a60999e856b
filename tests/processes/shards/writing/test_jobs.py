"""Jobs that are killed, and jobs of several processes: the same bytes as in one process and in one go."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from byte_level_tokenizers import definition, tokenizer_of
from shard_fixtures import files_under, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers

from dmagent_loader.errors import ShardError
from dmagent_loader.shards import ShardingConfig, shard_files
from dmagent_loader.shards.inputs.documents import Document, Documents
from dmagent_loader.shards.manifest import ShardRecord
from dmagent_loader.shards.writing import collecting, running, writer
from dmagent_loader.shards.writing.encoding import TextEncoder
from dmagent_loader.shards.writing.packing import DocumentTokenizer
from dmagent_loader.shards.writing.tar_writer import TarWriter

PROGRAM = """
import json, sys, time
from dmagent_loader.shards import ShardingConfig, shard_files
from dmagent_loader.shards.writing import assembling, collecting, writer

writer.PIECE_BYTES = 1 << 14
for task in (collecting.Collection, assembling.Assembly):
    def run(self, *arguments, original=task.run):
        time.sleep(0.05)
        return original(self, *arguments)
    task.run = run

if __name__ == "__main__":
    inputs, output, settings, workers = json.loads(sys.argv[1])
    shard_files({"source/a": inputs}, output, ShardingConfig(**settings), workers=workers, progress=False)
"""
"""A job of many small and slow tasks; workers run the upper part, too."""

FILES, DOCUMENTS = 6, 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    words = [f"w{number}" for number in range(50)]
    tokenizer = Tokenizer(models.WordLevel({"</s>": 50, **{w: n for n, w in enumerate(words)}}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    for number in range(FILES):
        rows = [{"text": " ".join(words[(number + n + k) % 50] for k in range(n % 97 + 1))} for n in range(DOCUMENTS)]
        write_jsonl(folder / f"{number}.jsonl", [*rows, {"body": number}])
    return folder


def settings(folder: Path, tokenizer: str = "tokenizer.json") -> dict[str, object]:
    tokenizer = str(folder / tokenizer)
    return {"tokenizer": tokenizer, "sequence_length": 64, "rows_per_shard": 100, "max_bad": FILES}


def start(folder: Path, output: Path, workers: int, tokenizer: str = "tokenizer.json") -> subprocess.Popen[bytes]:
    inputs = [str(folder / f"{number}.jsonl") for number in range(FILES)]
    argument = json.dumps([inputs, str(output), settings(folder, tokenizer), workers])
    program = folder / "program.py"
    program.write_text(PROGRAM)
    output.parent.mkdir(parents=True, exist_ok=True)
    with (output.parent / "stderr").open("wb") as stderr:
        return subprocess.Popen([sys.executable, str(program), argument], stderr=stderr)


def contents(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in files_under(output)}


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, bytes]:
    inputs = [folder / f"{number}.jsonl" for number in range(FILES)]
    config = ShardingConfig(**settings(folder))  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "PIECE_BYTES", 1 << 14)
        shard_files({"source/a": inputs}, folder / "expected", config, progress=False)
    return contents(folder / "expected")


def wait_for(output: Path, pattern: str, count: int, job: subprocess.Popen[bytes]) -> int:
    """Waits until a job has written so many files; the number that it has."""
    deadline = time.monotonic() + 120
    while (found := len(list(output.glob(f".partial/*/{pattern}")))) < count:
        assert job.poll() is None, "the job has ended"
        assert time.monotonic() < deadline, "the job is too slow"
        time.sleep(0.005)
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_job_that_is_killed_goes_on_where_it_stood(
    folder: Path, expected: dict[str, bytes], tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it reads, and again while it writes shards; the third call is left alone."""
    out = tmp_path / "out"
    for pattern, count in (("chunks/source/a/*/*.safetensors", 4), ("shards/source/a/*/*.json", 2)):
        job = start(folder, out, workers)
        wait_for(out, pattern, count, job)
        job.send_signal(signal.SIGKILL)
        job.wait()
        assert not (out / "manifest.json").exists()
    read: list[int] = []
    write: list[str] = []
    _count(monkeypatch, read, write)
    inputs = [str(folder / f"{number}.jsonl") for number in range(FILES)]
    config = ShardingConfig(**settings(folder))  # type: ignore[arg-type]
    monkeypatch.setattr(writer, "PIECE_BYTES", 1 << 14)
    shard_files({"source/a": inputs}, out, config, progress=False)
    assert read == [], "all documents were read before the second kill"
    shards = sum(name.endswith(".tar") for name in expected)
    assert 0 < len(write) <= shards - 2, "the shards that were there are not written again"
    assert contents(out) == expected


def _count(monkeypatch: pytest.MonkeyPatch, read: list[int], write: list[str]) -> None:
    """Counts the documents that are tokenised and the shards that are written, in this process."""
    tokens, close = DocumentTokenizer.tokens, TarWriter.close

    def counted(self: DocumentTokenizer, documents: list[Document]) -> list[object]:
        read.extend(range(len(documents)))
        return tokens(self, documents)  # type: ignore[return-value]

    def closed(self: TarWriter, **settings: bool) -> ShardRecord:
        record = close(self, **settings)
        write.append(record.path)
        return record

    monkeypatch.setattr(DocumentTokenizer, "tokens", counted)
    monkeypatch.setattr(TarWriter, "close", closed)


def test_a_piece_that_is_killed_goes_on_within_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compressed file cannot be divided, so its records are counted."""
    rows = [{"text": f"{number} " * 50} for number in range(2000)]
    path = write_jsonl(tmp_path / "a.jsonl.gz", [*rows, {"body": 1}])
    monkeypatch.setattr(running, "CHUNK_BYTES", 1 << 15)
    monkeypatch.setattr(collecting, "BATCH_CHARACTERS", 1 << 13)
    config = ShardingConfig(rows_per_shard=500)
    with pytest.raises(ShardError, match="line 2001"):
        shard_files({"source/a": [path]}, tmp_path / "out", config, progress=False)
    chunks = sorted((tmp_path / "out").rglob("*.safetensors"))
    assert len(chunks) > 3
    made: list[object] = []
    make = Documents.make
    monkeypatch.setattr(Documents, "make", lambda self, record: made.append(record) or make(self, record))  # type: ignore[func-returns-value]
    shard_files({"source/a": [path]}, tmp_path / "out", dataclasses.replace(config, max_bad=1), progress=False)
    assert 1 < len(made) < 1000
    shard_files({"source/a": [path]}, tmp_path / "one", dataclasses.replace(config, max_bad=1), progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_several_processes_write_the_same_bytes(folder: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    job = start(folder, tmp_path / "out", workers=3)
    assert job.wait(timeout=200) == 0
    assert contents(tmp_path / "out") == expected


def test_a_job_that_is_killed_goes_on_without_tiktoken(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are those of jobs that have it, or do not have it, from the beginning to the end."""
    pytest.importorskip("tiktoken")
    (folder / "bytes.json").write_text(definition("GPT-2"))
    assert TextEncoder(tokenizer_of("GPT-2")).slow_reason is None
    job = start(folder, tmp_path / "killed/out", 2, "bytes.json")
    wait_for(tmp_path / "killed/out", "chunks/source/a/*/*.safetensors", 4, job)
    job.kill()
    job.wait()
    whole = start(folder, tmp_path / "with/out", 2, "bytes.json")
    assert whole.wait(timeout=200) == 0
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    monkeypatch.setattr(writer, "PIECE_BYTES", 1 << 14)
    inputs = [str(folder / f"{number}.jsonl") for number in range(FILES)]
    config = ShardingConfig(**settings(folder, "bytes.json"))  # type: ignore[arg-type]
    for name in ("killed", "without"):
        shard_files({"source/a": inputs}, tmp_path / name / "out", config, progress=False)
    written = [contents(tmp_path / name / "out") for name in ("killed", "with", "without")]
    assert written[0] == written[1] == written[2]


def test_a_worker_that_dies_ends_the_job_with_a_remedy(folder: Path, tmp_path: Path) -> None:
    job = start(folder, tmp_path / "out", workers=2)
    wait_for(tmp_path / "out", "chunks/source/a/*/*.safetensors", 2, job)
    victim = next(child for child in psutil.Process(job.pid).children() if "spawn_main" in " ".join(child.cmdline()))
    victim.kill()
    assert job.wait(timeout=200) != 0
    assert "fewer --workers" in (tmp_path / "stderr").read_text()


def test_workers_of_a_killed_job_end(folder: Path, tmp_path: Path) -> None:
    job = start(folder, tmp_path / "out", workers=2)
    wait_for(tmp_path / "out", "chunks/source/a/*/*.safetensors", 2, job)
    workers = psutil.Process(job.pid).children()
    job.kill()
    job.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive


ENDLESS = """
import signal, sys, time
from pathlib import Path
from dmagent_loader import _tasks

def work(task, context, advance):
    (Path(sys.argv[1]) / str(task)).touch()
    if task == 2 and sys.argv[2] == "fails":
        raise ValueError("the fault of a task")
    time.sleep(0 if task == 2 else 1000)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    list(_tasks.run_tasks(work, [1, 2], None, 2, lambda size: None))
"""


@pytest.mark.parametrize("end", ["fails", "is interrupted"])
def test_a_job_that_ends_early_does_not_wait_for_tasks_that_take_hours(tmp_path: Path, end: str) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    command = [sys.executable, str(tmp_path / "endless.py"), str(tmp_path), end]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not (tmp_path / "1").exists() or not (tmp_path / "2").exists():
        assert job.poll() is None or end == "fails"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if end == "is interrupted":
        workers = psutil.Process(job.pid).children()
        job.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive
    _, errors = job.communicate(timeout=60)
    assert ("the fault of a task" if end == "fails" else "KeyboardInterrupt") in errors


def test_an_error_in_a_worker_is_that_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write_jsonl(tmp_path / f"{name}.jsonl.gz", [{"text": "a"}] * 50 + [{"body": 1}]) for name in "abcd"]
    monkeypatch.setattr(writer, "PIECE_BYTES", 1)
    with pytest.raises(ShardError, match="line 51 has no text in column"):
        shard_files({"source/a": paths}, tmp_path / "out", workers=2, progress=False)
