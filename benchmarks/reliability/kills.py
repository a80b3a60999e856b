"""Kills a training run again and again, and compares what it trained on with a run that nobody disturbed.

    python -m benchmarks.reliability.kills OUTPUT.json [--kills 200] [--aimed 60] [--seconds 200] [--seed 0]

Each kill is a SIGKILL to a process of its own; the next process goes on from the newest state. `--kills` come at random
moments of the clock, `--aimed` at exact points before or after a step of a decision, a save or a read (see `killable`).
The run is a plain loop with 0 and with 2 data workers, and the Hugging Face Trainer with 0 and with 2.

The processes are forked from this one, which has imported torch, so that a kill costs a second and not five. A campaign
goes on where its output file stops: start it again until it has all its kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.reliability.killable import ROWS, Kill, Run
from benchmarks.reliability.victim import Counts, Difference, Victim, undisturbed
from dmagent_loader.testing import write_toy_shards

KINDS = ("plain 0", "plain 2", "trainer 0", "trainer 2")
AIMS = {
    "plain": ("replace", "fsync", "half", "propose", "append", "publish", "read", "train"),
    "trainer": ("torch.save", "state.json", "propose", "append", "publish", "read", "train"),
}


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
    print(table(summed))


def table(summed: dict[str, Any]) -> str:
    """For people, as Markdown."""
    columns = {
        "random kills": lambda c: c["kills"],
        "while it": lambda c: ", ".join(f"{phase} {number}" for phase, number in sorted(c["phases"].items())),
        "aimed kills": lambda c: c["aimed"],
        "of these in a data worker": lambda c: c["worker_deaths"],
        "processes": lambda c: c["restarts"] + c["without_state"],
        "batches compared": lambda c: c["batches"],
        "states half-written": lambda c: c["half_written"],
        "batches that differ": lambda c: c["differences"],
        "temporary files left at the end": lambda c: c["leftovers_at_end"],
    }
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name in KINDS:
        if name in summed:
            lines.append(f"| {name} | " + " | ".join(str(show(summed[name])) for show in columns.values()) + " |")
    return "\n".join(lines)


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
