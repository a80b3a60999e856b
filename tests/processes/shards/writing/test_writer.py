"""Writers of shards that are killed, and that run at different times."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shard_fixtures import published, write_jsonl

from dmagent_loader.shards import ShardCollection, load_manifest, shard_files


def test_equal_input_gives_equal_bytes_and_the_manifest_tells_them(web: Path, tmp_path: Path) -> None:
    shard_files({"source/web": [web]}, tmp_path / "one", progress=False)
    time.sleep(1.1)  # tar times are whole seconds
    shard_files({"source/web": [web]}, tmp_path / "two", progress=False)
    one, two = ((tmp_path / name / "source/web/web-000000.tar").read_bytes() for name in ("one", "two"))
    assert one == two
    entry = json.loads((tmp_path / "one/manifest.json").read_text())["domains"]["source/web"]
    assert entry["shards"][0]["sha256"] == hashlib.sha256(one).hexdigest()
    assert entry["shards"][0]["bytes"] == len(one)
    assert (entry["rows"], entry["documents"], entry["tokens"]) == (25, 25, None)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_writer_leaves_no_manifest_and_does_not_hinder_the_next(tmp_path: Path, kill: int) -> None:
    path = write_jsonl(tmp_path / "big.jsonl", [{"text": "x" * 200}] * 30_000)
    program = (
        # A shell starts what runs in the background with SIGINT ignored, and its children inherit that.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from dmagent_loader.shards import shard_files; print('go', flush=True); "
        "shard_files({'source/x': [sys.argv[1]]}, sys.argv[2], progress=False)"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(path), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").rglob("*.tar.*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    writer.send_signal(kill)
    assert writer.wait(timeout=60) != 0
    writer.stdout.close()
    assert not (tmp_path / "out/manifest.json").exists()
    assert published(tmp_path / "out") == []
    shard_files({"source/x": [path]}, tmp_path / "out", progress=False)
    assert not (tmp_path / "out/.partial").exists()
    assert ShardCollection.open(load_manifest(tmp_path / "out"), progress=False).num_rows.tolist() == [30_000]
