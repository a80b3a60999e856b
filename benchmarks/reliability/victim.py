"""One run that is killed and resumed until it is done, and what became of it; see `kills`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.reliability.killable import Kill, Moments, Run, read_counts, read_phase, train_plain, train_trainer
from dmagent_loader._run.state import load_state

RUN_SECONDS = 240.0
"""A process that takes longer hangs."""


class Difference(AssertionError):
    """A run that was killed trained on something else than the run that was not."""


@dataclass
class Counts:
    """What was tried on one kind of run, and what came of it."""

    kills: int = 0
    aimed: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    worker_deaths: int = 0
    restarts: int = 0
    without_state: int = 0
    batches: int = 0
    samples: int = 0
    runs: int = 0
    compared_results: int = 0
    passed_over: int = 0
    left_behind: int = 0
    half_written: int = 0
    most_leftovers: int = 0
    leftovers_at_end: int = 0
    differences: int = 0


class Victim:
    """One run, killed and resumed until it is done.

    Args:
        run: The run.
        expected: What the undisturbed run left: its batches and its result.
        counts: To be added to.
    """

    def __init__(self, run: Run, expected: tuple[list[dict[str, Any]], dict[str, Any]] | None, counts: Counts) -> None:
        self.run, self.expected, self.counts = run, expected, counts
        self._read = self._covered = 0
        self.groups: list[int] = []
        """Process groups: a killed process, with data workers that may outlive it."""
        run.folder.mkdir(parents=True, exist_ok=True)

    def process(self, kill: Kill | None = None, after_seconds: float | None = None, from_start: bool = False) -> bool:
        """Runs one process, kills it or lets it kill itself, and checks what it left.

        Args:
            kill: An exact moment.
            after_seconds: A moment of the clock, counted from the first batch of this process.
            from_start: Counted from its start, so that it may be killed while it restores.

        Returns:
            Whether it was killed.
        """
        memory = self.run.folder / "moments"
        memory.unlink(missing_ok=True)
        step = self._newest_step()
        started = time.monotonic()
        pid = self._fork(memory, kill)
        status = None
        trained = self._size()
        deadline = None
        while status is None:
            done, found = os.waitpid(pid, os.WNOHANG)
            if done:
                status = found
                break
            now = time.monotonic()
            if deadline is None and after_seconds is not None and (from_start or self._size() > trained):
                deadline = now + after_seconds
            if (deadline is not None and now > deadline) or now - started > RUN_SECONDS:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                break
            time.sleep(0.0005)
        if time.monotonic() - started > RUN_SECONDS:
            raise Difference(f"a process of {self.run.folder} hung: see its log")
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        worker_died = not killed and status != 0 and kill is not None and kill.point == "read" and self.run.workers > 0
        if not killed and not worker_died and status != 0:
            raise Difference(f"a process ended with status {status}:\n{(self.run.folder / 'log').read_text()[-3000:]}")
        self.counts.restarts += step is not None
        self.counts.without_state += step is None
        if killed or worker_died:
            self._count(kill, worker_died, memory)
        self._check(step or 0)
        return killed or worker_died

    def _count(self, kill: Kill | None, worker_died: bool, memory: Path) -> None:
        self.counts.worker_deaths += worker_died
        if kill is None:
            self.counts.kills += 1
            self.counts.phases[read_phase(memory)] += 1
        else:
            self.counts.aimed += 1
            self.counts.points[f"{'after' if kill.after else 'before'} {kill.point}"] += 1

    def _fork(self, memory: Path, kill: Kill | None) -> int:
        pid = os.fork()
        if pid:
            self.groups.append(pid)
            return pid
        code = 1
        try:
            os.setpgid(0, 0)
            log = os.open(self.run.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            (train_trainer if self.run.trainer else train_plain)(self.run, Moments(memory, kill))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @property
    def done(self) -> bool:
        """Whether nothing is left to train. The Trainer would train one step more than max_steps if it were resumed."""
        return (self.run.folder / "result.json").exists() or self._newest_step() == self.run.steps

    def finish(self) -> None:
        """Lets the run come to its end, and compares the whole."""
        if not self.done:
            self.process()
        if self.expected is None:
            return
        batches, result = self.expected
        if self._covered != len(batches):
            self._differ(f"{self._covered} steps were trained instead of {len(batches)}")
        path = self.run.folder / "result.json"
        left = json.loads(path.read_text()) if path.exists() else {}
        for name, value in left.items():
            if value != result[name]:
                self._differ(f"{name} at the end is {str(value)[:300]} instead of {str(result[name])[:300]}")
        self.counts.leftovers_at_end += len(list(self.run.folder.rglob(".*.partial")))
        self.counts.runs += 1
        self.counts.compared_results += bool(left)

    def _check(self, step: int) -> None:
        """Each batch since the last check, from where the state said on, is the one of the undisturbed run."""
        for line in self._new_lines():
            if line["step"] != step:
                self._differ(f"step {line['step']} came where step {step} was due")
            if self.expected is not None:
                wanted = self.expected[0][step]
                if (line["indices"], line["keys"]) != (wanted["indices"], wanted["keys"]):
                    self._differ(f"step {step} trained on {line} instead of {wanted}")
            self.counts.batches += 1
            self.counts.samples += len(line["indices"])
            step += 1
            self._covered = max(self._covered, step)
        leftovers = list(self.run.folder.rglob(".*.partial"))
        weights = list(self.run.folder.glob("weights-*"))
        checkpoints = list(self.run.folder.glob("checkpoints/checkpoint-*"))
        newest = max((int(path.name.rsplit("-", 1)[1]) for path in checkpoints), default=0)
        self.counts.passed_over += newest > (self._newest_step() or 0)
        extra = len(leftovers) + max(0, len(weights) - 1) + max(0, len(checkpoints) - 2)
        self.counts.most_leftovers = max(self.counts.most_leftovers, extra)

    def _differ(self, message: str) -> None:
        self.counts.differences += 1
        raise Difference(f"{self.run.folder}: {message}")

    def _newest_step(self) -> int | None:
        """The step of the newest state; None: there is none yet. A state file that cannot be read is a failure."""
        if self.run.trainer:
            from dmagent_loader.integrations.huggingface import last_whole_checkpoint

            newest = last_whole_checkpoint(self.run.folder / "checkpoints")
            return None if newest is None else int(newest.rsplit("-", 1)[1])
        path = self.run.folder / "state.json"
        if not path.exists():
            return None
        try:
            state = load_state(path)
            if not (self.run.folder / state["weights"]).stat().st_size:
                raise ValueError(f"{state['weights']} is empty")
            return int(state["step"])
        except Exception as error:
            self.counts.half_written += 1
            raise Difference(f"{path} is not whole: {error}") from error

    def _size(self) -> int:
        try:
            return (self.run.folder / "trained.jsonl").stat().st_size
        except FileNotFoundError:
            return 0

    def _new_lines(self) -> list[dict[str, Any]]:
        if not self._size():
            return []
        with (self.run.folder / "trained.jsonl").open("rb") as file:
            file.seek(self._read)
            data = file.read()
        self._read += len(data)
        return [json.loads(line) for line in data.splitlines()]


def undisturbed(run: Run) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, int], float]:
    """Batches, result, how often each point was reached, and seconds of a run that nobody kills."""
    victim = Victim(run, None, Counts())
    started = time.monotonic()
    victim.process()
    seconds = time.monotonic() - started
    lines = [json.loads(line) for line in (run.folder / "trained.jsonl").read_text().splitlines()]
    result = json.loads((run.folder / "result.json").read_text())
    return lines, result, read_counts(run.folder / "moments"), seconds
