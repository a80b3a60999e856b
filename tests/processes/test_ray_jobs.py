"""`dmagent shard`, `label` and `filter` in one process, in several, and on Ray: the same bytes, also if workers die."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from launching import REPOSITORY
from shard_fixtures import files_under, own_cache, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers

from dmagent_loader import _tasks
from dmagent_loader.cli import main
from dmagent_loader.errors import ConfigurationError, ShardError
from dmagent_loader.labelling import documents, files
from dmagent_loader.shards import RayWorkers, shard_files
from dmagent_loader.shards.writing import writer

__all__ = ["own_cache"]

WORDS = ("goalkeeper penalty league match onions butter garlic soup season senate bill vote court law " * 4).split()
DOCUMENTS = 3000


@pytest.fixture(scope="module")
def two_ray_workers() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=200 << 20,
            include_dashboard=False,
            log_to_driver=False,
        )
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains with repeats, of several pieces each, and a tokenizer."""
    folder = tmp_path_factory.mktemp("jobs")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(20, 60))) for _ in range(DOCUMENTS)]
    for number in range(4):
        mine = [{"text": text, "id": n} for n, text in enumerate(texts[number::5])]
        repeats = [{"text": f"{text} again", "id": -1} for text in texts[number::50]]
        write_jsonl(folder / f"web-{number}.jsonl", mine + repeats)
    write_jsonl(folder / "law.jsonl.gz", [{"text": text} for text in texts[4::5] + texts[0::100]])
    tokenizer = Tokenizer(
        models.WordLevel({"</s>": 0, **{w: n + 1 for n, w in enumerate(set(WORDS))}}, unk_token="law")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Divided in this process, so that workers work on small pieces, too; paths are relative."""
    monkeypatch.setattr(writer, "PIECE_BYTES", 1 << 15)
    monkeypatch.setattr(documents, "PIECE_BYTES", 1 << 15)
    monkeypatch.setattr(files, "PART_DOCUMENTS", 64)
    monkeypatch.chdir(folder)


COMMANDS = {
    "shard": ["--tokenizer", "tokenizer.json", "--sequence-length", "128", "--rows-per-shard", "100"],
    "label": ["--split", "--min-confidence", "0.3"],
    "filter": ["--near-duplicates", "0.7", "--min-characters", "120"],
}


def command(name: str, output: Path, *where: str) -> list[str]:
    inputs = ["--domain", "source/web=web-*.jsonl", "--domain", "target/law=law.jsonl.gz"]
    return [name, *inputs, *COMMANDS[name], "--output", str(output), "--no-progress", *where]


def contents(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in files_under(output)}


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """What one process writes."""
    root, known = tmp_path_factory.mktemp("expected"), {}

    def write(name: str) -> dict[str, bytes]:
        if name not in known:
            assert main(command(name, root / name)) == 0
            known[name] = contents(root / name)
            assert len(known[name]) >= 4
        return known[name]

    return write


@pytest.mark.parametrize("name", ["label", pytest.param("filter", marks=pytest.mark.slow)])
def test_several_processes_write_the_same_bytes(
    name: str, expected: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    assert main(command(name, tmp_path / "out", "--workers", "2")) == 0
    assert contents(tmp_path / "out") == expected(name)


def busy_workers() -> list[psutil.Process]:
    """Workers of this process's Ray that run a task; Ray writes that into their titles."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("ray::_with_context" in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


class Killer(threading.Thread):
    """Kills some workers while they run a task."""

    def __init__(self, count: int) -> None:
        super().__init__(daemon=True)
        self.left, self.stopped = count, False

    def run(self) -> None:
        while self.left and not self.stopped:
            for process in busy_workers()[:1]:
                process.kill()
                process.wait(30)
                self.left -= 1
            time.sleep(0.01)

    def __enter__(self) -> Killer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped = True
        self.join()


@pytest.mark.parametrize("name", COMMANDS)
def test_ray_writes_the_same_bytes_although_workers_are_killed(
    name: str, expected: Callable[[str], dict[str, bytes]], two_ray_workers: Any, tmp_path: Path
) -> None:
    with Killer(2) as killer:
        assert main(command(name, tmp_path / "out", "--ray")) == 0
    assert killer.left == 0, "workers were killed while they worked"
    assert contents(tmp_path / "out") == expected(name)
    assert two_ray_workers.is_initialized()


def test_labels_of_shards_on_ray(two_ray_workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of tokens, whose tokenizer and shards each worker opens for itself."""
    monkeypatch.setattr(documents, "PIECE_ROWS", 30)
    assert main(command("shard", tmp_path / "shards")) == 0
    label = ["label", "--shards", str(tmp_path / "shards"), "--tokenizer", "tokenizer.json", "--no-progress"]
    assert main([*label, "--output", str(tmp_path / "one")]) == 0
    assert main([*label, "--output", str(tmp_path / "ray"), "--ray", "--workers", "1"]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "ray")
    assert len(list((tmp_path / "one" / "labels" / "source" / "web").glob("part-*"))) > 2


def test_an_error_of_a_task_on_ray_is_that_of_one_process(two_ray_workers: Any, tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "a"}] * 50 + [{"body": 1}])
    with pytest.raises(ShardError, match="line 51 has no text in column") as error:
        shard_files({"source/a": [bad]}, tmp_path / "out", workers=RayWorkers(), progress=False)
    assert type(error.value) is ShardError
    assert "Traceback" not in str(error.value)


class Unpicklable(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


def fail(task: int, context: None, advance: Any) -> None:
    raise Unpicklable("the fault itself")


def test_an_error_that_cannot_be_pickled_is_shown(two_ray_workers: Any) -> None:
    """It was reported as the death of four workers for lack of memory."""
    two_ray_workers.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.raises(RuntimeError, match="the fault itself"):
        list(_tasks.run_tasks(fail, [1], None, RayWorkers(), lambda size: None))


def test_a_cluster_that_cannot_be_reached_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dmagent_loader", "shard", "--domain", "source/law=law.jsonl.gz", "--ray"]
    run = subprocess.run(
        [*command, "--output", str(tmp_path / "out"), "--no-progress"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_ADDRESS": "no port"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 2, run.stderr
    assert "no Ray cluster could be reached or started, with RAY_ADDRESS='no port'" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_task_whose_workers_always_die_ends_the_job_with_a_remedy(
    two_ray_workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {n} " * 300} for n in range(30_000)])
    monkeypatch.setattr(writer, "PIECE_BYTES", 1 << 40)
    with Killer(100), pytest.raises(ShardError, match=r"failed 4 times, because its worker died.*fewer --workers"):
        shard_files({"source/a": [texts]}, tmp_path / "out", workers=RayWorkers(), progress=False)


def test_gpus_that_the_cluster_lacks_are_announced(two_ray_workers: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Ray would wait for them in silence."""
    _tasks._announce_missing_gpus(two_ray_workers, 0.0)
    assert not caplog.records
    _tasks._announce_missing_gpus(two_ray_workers, 0.5)
    assert "a task needs 0.5 GPUs, and the Ray cluster has 0" in caplog.text


def test_a_missing_column_of_labels_is_an_error_wherever_documents_are_labelled(
    folder: Path, two_ray_workers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("label", tmp_path / "out", "--ray", "--label-key", "mine")) == 2
    assert "has a label in the column 'mine'" in capsys.readouterr().err


def test_numbers_of_workers_that_cannot_work_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert main(command(name, tmp_path / "out", "--workers", "-1")) == 2
        assert "workers=-1: it must be at least 0" in capsys.readouterr().err
        assert main(command(name, tmp_path / "out", "--ray", "--workers", "0")) == 2
        assert "count=0 workers on Ray: it must be at least 1" in capsys.readouterr().err
    assert main(command("label", tmp_path / "out", "--gpus-per-worker", "1")) == 2
    assert "--gpus-per-worker has no effect without --ray" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match="gpus_per_worker=-1"):
        RayWorkers(gpus_per_worker=-1)
    assert not (tmp_path / "out").exists()
