"""A data worker does not outlive the process that reads its batches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dmagent_loader.shards.writing.tar_writer import TarWriter

PROGRAM = """
import multiprocessing, sys, time
from dmagent_loader import AgentWeightedSampler, MixingDataLoader, ReadingConfig

if __name__ == "__main__":
    folder, method = sys.argv[1:]
    reading = ReadingConfig(cache_dir=folder, progress=False)
    sampler = AgentWeightedSampler({"source/a": folder}, samples_per_reweight=1000, exhausted="repeat", reading=reading)
    loader = MixingDataLoader(sampler, batch_size=4, num_workers=2, collate_fn=list, multiprocessing_context=method)
    batches = iter(loader)
    next(batches)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""

LATE = """
import multiprocessing, os, sys, time
from dmagent_loader._loading.orphans import end_with_parent

def work(is_late):
    os.write(1, f"{os.getpid()}\\n".encode())  # at once, as the other one writes to the same pipe
    while is_late and os.getppid() == main:
        time.sleep(0.01)
    end_with_parent() if is_late else None
    time.sleep(600)

main = os.getpid()
context = multiprocessing.get_context("fork")
for is_late in (True, False):  # the second holds the other end of the first one's sentinel
    context.Process(target=work, args=(is_late,)).start()
time.sleep(600)
"""


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are looked up in /proc")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_end_when_the_main_process_is_killed(tmp_path: Path, method: str) -> None:
    """Without a look at the parent, they wait for ever: batches of text that nobody reads any more fill torch's queue,
    whose other end the workers hold themselves."""
    writer = TarWriter(tmp_path / "a.tar")
    for row in range(40):
        writer.add(f"{row:03d}", {"txt": b"text " * 20_000})
    writer.close()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with subprocess.Popen(
        [sys.executable, str(program), str(tmp_path), method],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as main:
        assert main.stdout is not None
        workers = [int(worker) for worker in main.stdout.readline().split()]
        main.kill()
    try:
        assert len(workers) == 2
        deadline = time.monotonic() + 30
        while any(map(is_running, workers)):
            assert time.monotonic() < deadline, "data workers still run 30 s after the main process was killed"
            time.sleep(0.1)
    finally:
        for worker in filter(is_running, workers):
            os.kill(worker, signal.SIGKILL)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are looked up in /proc")
def test_a_worker_whose_main_process_is_gone_before_it_first_looks_ends(tmp_path: Path) -> None:
    """The number of its parent is another's then, and stays the same."""
    workers: list[int] = []
    with subprocess.Popen([sys.executable, "-c", LATE], stdout=subprocess.PIPE, text=True) as main:
        try:
            assert main.stdout is not None
            workers += (int(main.stdout.readline()) for _ in range(2))
        finally:
            main.kill()
    try:
        deadline = time.monotonic() + 30
        while all(map(is_running, workers)):
            assert time.monotonic() < deadline, "a data worker still runs 30 s after the main process was killed"
            time.sleep(0.1)
    finally:
        for worker in filter(is_running, workers):
            os.kill(worker, signal.SIGKILL)
