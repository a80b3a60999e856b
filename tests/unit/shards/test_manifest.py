"""Which manifest is asked about a shard."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import pytest

from dmagent_loader.shards import manifest
from dmagent_loader.shards.manifest import recorded


def write_manifest(folder: Path, rows: int) -> None:
    record = {"path": "source/a/s.tar", "rows": rows, "bytes": 10240, "sha256": "0" * 64}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "domains": {"source/a": {"shards": [record]}}}))


def rows_of(shard: Path) -> int | None:
    record = recorded(str(shard))
    return None if record is None else record.rows


def test_what_is_above_two_dots_depends_on_links(tmp_path: Path) -> None:
    write_manifest(tmp_path / "near", rows=1)
    write_manifest(tmp_path / "far", rows=2)
    (tmp_path / "near" / "source" / "a").mkdir(parents=True)
    (tmp_path / "far" / "source" / "a").mkdir(parents=True)
    (tmp_path / "far" / "folder").mkdir()
    (tmp_path / "near" / "link").symlink_to(tmp_path / "far" / "folder")
    assert rows_of(tmp_path / "near" / "source" / "a" / "s.tar") == 1
    assert rows_of(tmp_path / "near" / "source" / "a" / ".." / "a" / "s.tar") == 1
    assert rows_of(tmp_path / "near" / "link" / ".." / "source" / "a" / "s.tar") == 2


def test_a_shard_just_below_the_root_does_not_ask_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "manifest.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert recorded("/source/a/s.tar") is None
        assert recorded("/s.tar") is None
    assert caplog.text == ""


def test_a_child_that_is_forked_while_a_manifest_is_read_does_not_wait_for_it(tmp_path: Path) -> None:
    """The thread that reads it is not in the child."""
    write_manifest(tmp_path, rows=3)
    with manifest._reading:
        child = os.fork()
        if child == 0:
            os._exit(0 if rows_of(tmp_path / "source" / "a" / "s.tar") == 3 else 1)
    ends = time.monotonic() + 20
    while time.monotonic() < ends:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            assert status == 0
            return
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")
