"""Four real gloo processes in which one rank is late, other than the rest, or gone; what each rank said about it.

    python -m benchmarks.reliability.ranks OUTPUT.json [CASE ...]

The program imports torch once and forks the ranks, so that a group of four costs little. Cases of one group run one
after the other: a refusal must leave the group usable. A rank that dies or stops gets a group of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.reliability.rank_cases import ALONE, ROWS, TIMEOUT_SECONDS, TOGETHER, WORLD, Rank
from dmagent_loader import AgentWeightedSampler
from dmagent_loader.testing import write_toy_shards


def groups(wanted: list[str]) -> Iterator[dict[str, Callable[[Rank], Any]]]:
    chosen = {name: case for name, case in TOGETHER.items() if not wanted or name in wanted}
    if chosen:
        yield chosen
    for name, case in ALONE.items():
        if not wanted or name in wanted:
            yield {name: case}


def run_rank(rank: int, folder: Path, number: int, cases: dict[str, Callable[[Rank], Any]]) -> None:
    """In a forked process: takes part in the cases and writes down what came of each."""
    timeout = timedelta(seconds=min(TIMEOUT_SECONDS.get(name, 60.0) for name in cases))
    store = f"file://{folder}/store-{number}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timeout)
    dist.barrier()  # or a rank that dies at once would end the others while they are still connecting
    here = Rank(rank, folder)
    with (folder / f"rank-{rank}.jsonl").open("a") as file:
        for name, case in cases.items():
            started = time.monotonic()
            report: dict[str, Any] = {"case": name, "rank": rank}
            try:
                result = case(here)
                report["result"] = result if not isinstance(result, AgentWeightedSampler) else "built"
            except Exception as error:
                report |= {"error": type(error).__name__, "message": str(error)}
                report["traceback"] = traceback.format_exc()
            report["seconds"] = time.monotonic() - started
            file.write(json.dumps(report) + "\n")
            file.flush()


def run(wanted: list[str]) -> list[dict[str, Any]]:
    """Runs cases, all of them if none is named, and returns what the ranks that lived reported."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards.json").write_text(json.dumps(write_toy_shards(folder / "shards", ROWS)))
        others = write_toy_shards(folder / "others", {**ROWS, "source/books": 48, "target/math": 64}, tokens=4)
        (folder / "others.json").write_text(json.dumps(others))
        for number, cases in enumerate(groups(wanted)):
            children = []
            for rank in range(WORLD):
                pid = os.fork()
                if pid == 0:
                    try:
                        run_rank(rank, folder, number, cases)
                    finally:
                        sys.stderr.flush()
                        os._exit(0)
                children.append(pid)
            _wait(children, set(children))
        lines = [path.read_text().splitlines() for path in sorted(folder.glob("rank-*.jsonl"))]
    return [json.loads(line) for rank in lines for line in rank]


def _wait(children: list[int], alive: set[int], seconds: float = 120.0) -> None:
    """Waits for the ranks; when all others have ended, a stopped one is killed, as a scheduler would do it."""
    deadline = time.monotonic() + seconds
    stopped: set[int] = set()
    while alive and time.monotonic() < deadline and alive != stopped:
        for pid in list(alive):
            done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if done and os.WIFSTOPPED(status):
                stopped.add(pid)
            elif done:
                alive.discard(pid)
        time.sleep(0.02)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if alive - stopped:
        raise SystemExit(f"ranks {[children.index(pid) for pid in alive - stopped]} hung for {seconds} s")


def main() -> None:
    reports = run(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps(reports, indent=1))
    ranks = Counter(report["case"] for report in reports)
    failed = Counter(report["case"] for report in reports if "error" in report)
    longest = max((report["seconds"] for report in reports if report["case"] in failed), default=0.0)
    print(f"{len(ranks)} cases; no error on any rank: {', '.join(name for name in ranks if not failed[name])}")
    print(f"an error on every rank that lived: {sum(failed[name] == ranks[name] for name in ranks)}")
    print(f"an error on some of them only: {[name for name in ranks if 0 < failed[name] < ranks[name]]}")
    print(f"the longest wait for an error: {longest:.1f} s")


if __name__ == "__main__":
    main()
