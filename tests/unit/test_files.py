"""A file is there whole or not at all, whoever writes it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from pathlib import Path

import pytest

from dmagent_loader._files import locked, only_writer, remove_leftovers, write_atomically
from dmagent_loader.errors import ConfigurationError, ShardNotFoundError


def test_a_reader_sees_one_whole_file_whoever_writes_it(tmp_path: Path) -> None:
    """Catches writing in place, and partial files that two writers share."""
    path = tmp_path / "group"
    contents = [bytes([i]) * 300_000 for i in range(3)]
    write_atomically(path, contents[0])
    failures: list[BaseException] = []

    def write(data: bytes) -> None:
        try:
            for _ in range(20):
                write_atomically(path, data)
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(data,)) for data in contents]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers) or reads == 0:
        assert path.read_bytes() in contents
        reads += 1
    assert not failures
    assert [file.name for file in tmp_path.iterdir()] == ["group"]


def test_a_temporary_file_that_another_process_still_writes_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text")  # type: ignore[arg-type]
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"], "a failed attempt left its temporary file"

    busy = tmp_path / f".state.json.{os.uname().nodename}.partial"
    with busy.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b"of another")
        other.flush()
        write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert busy.read_bytes() == b"of another"


def test_what_another_user_left_half_written_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / f".state.json.{os.uname().nodename}.partial"
    left.write_bytes(b"half")
    really_open = os.open

    def refused(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if str(path) == str(left):  # root, under whom tests may run, would be let in
            raise PermissionError(13, "Permission denied")
        return really_open(path, flags, mode)

    monkeypatch.setattr("dmagent_loader._files.os.open", refused)
    write_atomically(tmp_path / "state.json", b"whole")
    assert (tmp_path / "state.json").read_bytes() == b"whole"


def test_old_leftovers_are_removed_unless_someone_writes_them(tmp_path: Path) -> None:
    old, new, busy, other = (tmp_path / name for name in (".a.1.partial", ".b.1.partial", ".c.1.partial", "d.partial"))
    for path in (old, new, busy, other):
        path.write_bytes(b"half")
    for path in (old, busy, other):
        os.utime(path, (0, 0))
    with busy.open("rb+") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.1.partial", ".c.1.partial", "d.partial"]
    remove_leftovers(tmp_path / "nowhere")


def test_a_file_system_without_locks_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("dmagent_loader._files.fcntl.flock", no_locks)
    write_atomically(tmp_path / "a", b"1")
    write_atomically(tmp_path / "a", b"2", durable=False)
    assert (tmp_path / "a").read_bytes() == b"2"


def test_the_file_is_as_readable_as_any_other_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "whole", b"")
    modes = {stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("plain", "whole")}
    assert len(modes) == 1


def test_a_lock_is_refused_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A marker file in its place would outlive a killed holder."""

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match="not implemented"), locked(tmp_path / ".lock"):
        pytest.fail("held without a lock")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_named_with_its_remedy(tmp_path: Path, number: int) -> None:
    """It was a traceback without the folder."""
    with (
        pytest.raises(
            ConfigurationError, match=r"no room for the labels in .*out.*free some, and run the same command"
        ),
        only_writer(tmp_path / "out", "labels"),
    ):
        raise OSError(number, os.strerror(number))
    with pytest.raises(ShardNotFoundError), only_writer(tmp_path / "out", "labels"):
        raise ShardNotFoundError("no file")
    with pytest.raises(IsADirectoryError), only_writer(tmp_path / "out", "labels"):
        raise IsADirectoryError(errno.EISDIR, "a folder")
