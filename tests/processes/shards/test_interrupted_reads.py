"""Reads of a batch by the compiled loop that signals interrupt, as on some network mounts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import environment

COMPILER = shutil.which("cc")
INTERRUPTED = r"""
#include <errno.h>
#include <signal.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* The first three reads are interrupted, the second of them by SIGUSR1. */
ssize_t preadv(int descriptor, const struct iovec *parts, int count, off_t offset)
{
    static int calls;
    if (++calls == 2)
        raise(SIGUSR1);
    if (calls <= 3) {
        errno = EINTR;
        return -1;
    }
    ssize_t done = 0;
    for (int i = 0; i < count; i++)
        done += pread(descriptor, parts[i].iov_base, parts[i].iov_len, offset + done);
    return done;
}

ssize_t preadv64(int descriptor, const struct iovec *parts, int count, off_t offset)
{
    return preadv(descriptor, parts, count, offset);
}
"""
PROGRAM = """
import signal, sys, tempfile
from dmagent_loader.shards import _reading

def handle(number, frame):
    if sys.argv[1] == "raise":
        raise KeyboardInterrupt
    print("handled")

signal.signal(signal.SIGUSR1, handle)
file = tempfile.TemporaryFile()
file.write(bytes(range(30)))
file.flush()
heads, bodies = bytearray(2), bytearray(4)
try:
    print(_reading.read_rows([file.fileno()] * 2, [10, 20], heads, bodies), list(heads + bodies))
except KeyboardInterrupt:
    print("raised", list(heads))
heads.append(0)  # which a memory in use refuses
"""


@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C compiler and LD_PRELOAD")
@pytest.mark.parametrize(
    ("handler", "printed"), [("raise", "raised [0, 0]\n"), ("go on", "handled\nTrue [10, 20, 11, 12, 21, 22]\n")]
)
def test_the_handler_of_the_signal_runs_and_the_read_goes_on_unless_it_raises(
    tmp_path: Path, handler: str, printed: str
) -> None:
    source, library = tmp_path / "interrupted.c", tmp_path / "interrupted.so"
    source.write_text(INTERRUPTED)
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-o", library, source], check=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, handler],
        env=environment(LD_PRELOAD=str(library)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, printed), done.stderr
