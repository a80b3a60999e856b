"""Kills a training run again and again, and compares what it trained on with a run that nobody disturbed.

    python tests/reliability/kills.py OUTPUT.json [--kills 200] [--aimed 60] [--seconds 200] [--seed 0]

Each kill is a SIGKILL to a process of its own; the next process goes on from the newest state. `--kills` come at random
moments of the clock, `--aimed` at exact points before or after a step of a decision, a save or a read (see `killable`).
The run is a plain loop with 0 and with 2 data workers, and the Hugging Face Trainer with 0 and with 2.

The processes are forked from this one, which has imported torch, so that a kill costs a second and
not five.
A campaign goes on where its output file stops: start it again until it has all its kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reliability.killable import ROWS, Kill, Moments, Run, read_counts, read_phase, train_plain, train_trainer

from dmagent_loader.state import load_state
from dmagent_loader.testing import write_toy_shards

KINDS = ("plain 0", "plain 2", "trainer 0", "trainer 2")
AIMS = {
    "plain": ("replace", "fsync", "half", "propose", "append", "publish", "read", "train"),
    "trainer": ("torch.save", "state.json", "propose", "append", "publish", "read", "train"),
}
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


class Campaign:
    """Kills of one kind of run.

    Args:
        folder: For the runs; removed when they are done.
        name: One of `KINDS`: plain loop or Trainer, and the number of data workers.
        steps: Of each run.
        draw: For the moments.
    """

    def __init__(self, folder: Path, name: str, steps: int, draw: random.Random) -> None:
        self.folder, self.draw = folder, draw
        self.kind, workers = name.split()
        self.counts = Counts()
        folder.mkdir(parents=True)
        shards = folder / "shards.json"
        shards.write_text(json.dumps(write_toy_shards(folder / "shards", ROWS, rows_per_shard=64, tokens=16)))
        self._run = Run(
            folder=folder / "whole",
            shards=shards,
            workers=int(workers),
            steps=steps,
            trainer=self.kind == "trainer",
        )
        lines, result, self.reached, self.seconds = undisturbed(self._run)
        self.expected = (lines, result)
        self._victim: Victim | None = None
        self._number, self._groups = 0, list[int]()

    def kill_at(self, kill: Kill) -> None:
        """A kill at an exact point of the next process."""
        if self._victim is None:
            self._begin()
        assert self._victim is not None
        self._victim.process(kill=kill)

    def kill(self, *, aimed: bool) -> None:
        """One kill of the run in hand, or of a new one if that is done."""
        for _ in range(20):
            if self._victim is None:
                self._begin()
            assert self._victim is not None
            if aimed:
                point = self.draw.choice([name for name in AIMS[self.kind] if self.reached[name]])
                number = self.draw.randint(1, max(1, self.reached[point] // 5))
                killed = self._victim.process(kill=Kill(point=point, number=number, after=self.draw.random() < 0.5))
            else:
                early = self.draw.random() < 0.2
                seconds = self.draw.uniform(0, 1.0 if early else self.seconds / 5)
                killed = self._victim.process(after_seconds=seconds, from_start=early)
            if self._victim.done:
                self.finish()
            if killed:
                return
        raise Difference("twenty processes in a row came to their end before they were killed")

    def kill_before_anything(self) -> None:
        """While the first process still indexes the shards."""
        self.kill_at(Kill(point="replace", number=self.draw.randint(1, 10), after=False))

    def end_orphans(self, seconds: float = 30.0) -> None:
        """Data workers of killed processes notice it and end; those that do not are counted and killed."""
        ends = time.monotonic() + seconds
        alive = self._groups
        while alive and time.monotonic() < ends:
            alive = [group for group in alive if _is_alive(group)]
            time.sleep(0.2)
        for group in alive:
            self.counts.left_behind += 1
            os.killpg(group, signal.SIGKILL)

    def _begin(self) -> None:
        self._number += 1
        self._victim = Victim(
            replace(self._run, folder=self.folder / f"run-{self._number}"), self.expected, self.counts
        )

    def finish(self) -> None:
        """The run in hand comes to its end undisturbed and is compared as a whole."""
        if self._victim is not None:
            self._victim.finish()
            self._groups += self._victim.groups
            shutil.rmtree(self._victim.run.folder)
            self._victim = None


def _is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def totals(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sum of several parts of a campaign, by kind of run."""
    summed: dict[str, Any] = {}
    for part in parts:
        for name, counts in part.items():
            into = summed.setdefault(name, {})
            for key, value in counts.items():
                if isinstance(value, dict):
                    into[key] = dict(Counter(into.get(key, {})) + Counter(value))
                elif key.startswith("most"):
                    into[key] = max(into.get(key, 0), value)
                else:
                    into[key] = into.get(key, 0) + value
    return summed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--kills", type=int, default=200, help="at random moments (default: %(default)s)")
    parser.add_argument("--aimed", type=int, default=60, help="at exact points (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=200.0, help="of this call (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=301, help="of each run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of runs (default: all)")
    args = parser.parse_args()
    import_for_all(any(kind.startswith("trainer") for kind in args.kinds))
    wanted = {what: -(-getattr(args, what) // len(args.kinds)) for what in ("kills", "aimed")}
    parts = json.loads(args.output.read_text())["parts"] if args.output.exists() else []
    ends = time.monotonic() + args.seconds
    while time.monotonic() < ends:
        summed = totals(parts)
        left = {
            kind: {what: max(0, wanted[what] - summed.get(kind, {}).get(what, 0)) for what in wanted}
            for kind in args.kinds
        }
        name = max(left, key=lambda kind: sum(left[kind].values()))
        if not any(left[name].values()):
            break
        plan = [what for what, number in left[name].items() for _ in range(number)]
        counts = part(name, plan, args.steps, random.Random(f"{args.seed}/{len(parts)}"), ends)
        parts.append({name: counts})
        print(f"{name}: {counts}", flush=True)
        args.output.write_text(json.dumps({"totals": totals(parts), "parts": parts}, indent=1))
    summed = totals(parts)
    done = [f"{sum(counts[what] for counts in summed.values())} of {getattr(args, what)} {what}" for what in wanted]
    print(", ".join(done))


def part(name: str, plan: list[str], steps: int, draw: random.Random, ends: float) -> dict[str, Any]:
    """Kills of one kind of run, in a random order, as many as there is time for."""
    draw.shuffle(plan)
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder) / "campaign", name, steps, draw)
        campaign.kill_before_anything()
        for what in plan:
            if time.monotonic() > ends:
                break
            campaign.kill(aimed=what == "aimed")
        campaign.finish()
        campaign.end_orphans()
    return vars(campaign.counts)


def import_for_all(trainer: bool) -> None:
    """Before the forks, so that each process need not."""
    import torch._dynamo  # noqa: F401  # torch imports it at the first step of an optimizer

    if not trainer:
        return
    import transformers
    from accelerate import Accelerator  # noqa: F401

    import dmagent_loader.integrations.huggingface  # noqa: F401

    _ = transformers.Trainer, transformers.LlamaForCausalLM


if __name__ == "__main__":
    main()
