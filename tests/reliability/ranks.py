"""Four real gloo processes in which one rank is late, other than the rest, or gone; what each rank said about it.

    python tests/reliability/ranks.py OUTPUT.json [CASE ...]

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
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dmagent_loader import AgentWeightedSampler, Environment
from dmagent_loader.integrations.mixing import Mixing
from dmagent_loader.ledger import LedgerEntry
from dmagent_loader.policies import GuardConfig
from dmagent_loader.progress import Progress
from dmagent_loader.testing import write_toy_shards

WORLD = 4
ROWS = {"source/web": 64, "source/books": 48, "target/math": 64}
MIX = {"source/web": 0.2, "source/books": 0.3, "target/math": 0.5}
TIMEOUT_SECONDS = {"rank 1 stops": 4.0}
"""Of the process group, where it is what ends the wait."""


class Turns:
    """Another mix at every step, that depends on what was trained on."""

    name = "turns"

    def propose(self, history):
        mix = np.roll(history.mixes[-1], 1) + 0.1 * len(history)
        return mix / mix.sum()


class Rank:
    """One process: what the cases are made of."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank, self.folder = rank, folder
        self.shards = json.loads((folder / "shards.json").read_text())

    def build(self, **settings: Any) -> AgentWeightedSampler:
        shards = settings.pop("shards", self.shards)
        settings = {"samples_per_reweight": 16, "policy": Turns(), "cache_dir": self.folder / "cache", **settings}
        return AgentWeightedSampler(shards, progress=False, **settings)

    def train(self, sampler: AgentWeightedSampler, until: int) -> list[int]:
        """Samples of this rank up to a global index, with the decisions that fall due."""
        seen, consumed = [], sampler.progress.consumed
        stream = iter(sampler)
        while consumed < until:
            if sampler.reweight_due(consumed):
                sampler.reweight({"general": -3.0 - consumed / 100}, consumed=consumed)
            seen.append(next(stream)["__index__"])
            consumed += WORLD
        sampler.reweight_due(consumed)
        return seen

    def differs(self, **settings: Any) -> AgentWeightedSampler:
        """A sampler that is another one on rank 2."""
        return self.build(**(settings if self.rank == 2 else {}))


def sound(here: Rank) -> Any:
    sampler = here.build()
    return [here.train(sampler, 96), sampler.ledger.to_json()]


def slow(here: Rank) -> Any:
    """Rank 2 comes seconds late to the start, to a decision, and to a restore."""

    def wait() -> None:
        if here.rank == 2:
            time.sleep(1.5)

    wait()
    sampler = here.build()
    seen = here.train(sampler, 48)
    wait()
    seen += here.train(sampler, 96)
    state = sampler.state_dict(consumed=96)
    wait()
    sampler.load_state_dict(state)
    return [seen, sampler.ledger.to_json()]


def failing_policy(here: Rank) -> Any:
    """Rank 0's policy fails: all keep the mix and go on."""

    class Fails(Turns):
        def propose(self, history):
            raise MemoryError("no room on rank 0")

    sampler = here.build(policy=Fails() if here.rank == 0 else Turns())
    here.train(sampler, 48)
    entries = list(sampler.ledger)
    return [[entry.accepted for entry in entries[-2:]], sampler.decisions.failures, sampler.mix]


def missing_shard(here: Rank) -> Any:
    shards = {**here.shards, "target/math": [*here.shards["target/math"], "/nowhere/0.tar"]}
    return here.build(shards=shards) if here.rank == 3 else here.build()


def first_finds_nothing(here: Rank) -> Any:
    return here.build(shards="/nowhere/manifest.json") if here.rank == 0 else here.build()


def fewer_shards(here: Rank) -> Any:
    return here.differs(shards={**here.shards, "source/web": here.shards["source/web"][:-1]})


def other_domains(here: Rank) -> Any:
    return here.differs(shards={name: here.shards[name] for name in ("source/web", "target/math")})


def other_contents(here: Rank) -> Any:
    return here.differs(shards=json.loads((here.folder / "others.json").read_text()))


def other_state(here: Rank) -> Any:
    sampler = here.build()
    here.train(sampler, 48)
    early = sampler.state_dict(consumed=48)
    here.train(sampler, 64)
    late = sampler.state_dict(consumed=64)
    here.build().load_state_dict(early if here.rank == 1 else late)


def damaged_state(here: Rank) -> Any:
    state = here.build().state_dict(consumed=0)
    if here.rank == 3:
        state["counts"]["source/web"] = 7
    here.build().load_state_dict(state)


def unreadable_checkpoint(here: Rank) -> Any:
    mixing = Mixing(here.build(), None)
    state = mixing.state_dict()
    Mixing(here.build(), None).load_state_dict({} if here.rank == 3 else state)


def one_does_not_resume(here: Rank) -> Any:
    sampler = here.build()
    state = sampler.state_dict(consumed=0)
    if here.rank == 1:
        sampler.reweight({"general": -3.0}, consumed=0)
    else:
        sampler.load_state_dict(state)


def other_ledger(here: Rank) -> Any:
    sampler = here.build()
    if here.rank == 1:
        mix = (0.5, 0.25, 0.25)
        sampler.plan.append(LedgerEntry(start=0, mix=mix, decided_by="a hand on one rank", decided_at=0))
    sampler.reweight({"general": -3.0}, consumed=0)


def other_count(here: Rank) -> Any:
    sampler = here.build()
    here.train(sampler, 16)
    sampler.reweight({"general": -3.0}, consumed=12 if here.rank == 1 else 16)


def hand_against_policy(here: Rank) -> Any:
    sampler = here.build()
    if here.rank == 2:
        sampler.set_mix(MIX)
    else:
        sampler.reweight({"general": -3.0}, consumed=0)


def diverged_model(here: Rank) -> Any:
    here.build().reweight({"general": float("nan")}, consumed=0)


def other_questions(here: Rank) -> Any:
    pairs = [("why", "so")] if here.rank == 2 else [("why", "so"), ("how", "thus")]
    environment = Environment.from_pairs({"a": pairs}, lambda t: list(t.encode()), prefix_token_id=0, progress=False)
    return environment.evaluate(lambda input_ids, attention_mask: torch.zeros(*input_ids.shape, 256))


SETTINGS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "exhausted": {"exhausted": "repeat"},
    "shuffle_window": {"shuffle_window": 7},
    "samples_per_reweight": {"samples_per_reweight": 32},
    "initial_mix": {"initial_mix": MIX},
    "start_state": {"start_state": MIX},
    "policy": {"policy": None},
    "shadow": {"shadow": True},
    "history_mix": {"history_mix": "requested"},
    "guard": {"guard": GuardConfig(max_change=0.1)},
    "the loader": {"prefetch_factor": 4},
    "world_size": {"rank": 2, "world_size": 8},
    "no process has data-parallel rank 2 of 4": {"rank": 1, "world_size": 4},
}


def die(here: Rank, victim: int) -> None:
    if here.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)


def dies_before(here: Rank) -> Any:
    sampler = here.build()
    here.train(sampler, 48)
    die(here, 3)
    sampler.reweight({"general": -3.0}, consumed=48)


def dies_in_policy(here: Rank) -> Any:
    class Dies(Turns):
        def propose(self, history):
            os.kill(os.getpid(), signal.SIGKILL)

    here.build(policy=Dies()).reweight({"general": -3.0}, consumed=0)


def dies_in_publication(here: Rank) -> Any:
    """The decision is made and told to all, but not yet from which sample on it holds."""
    original = Progress.first_free

    def first_free(*args: Any) -> int:
        die(here, 2)
        return original(*args)

    Progress.first_free = first_free
    here.build().reweight({"general": -3.0}, consumed=0)


def dies_in_evaluation(here: Rank) -> Any:
    def model(input_ids: Any, attention_mask: Any) -> Any:
        die(here, 1)
        time.sleep(0.2)
        raise AssertionError("the others need no logits")

    pairs = {"a": [("why", "so")] * 8}
    environment = Environment.from_pairs(pairs, lambda t: list(t.encode()), prefix_token_id=0, progress=False)
    if here.rank == 1:
        environment.evaluate(model)
    environment._score = lambda *args, **settings: None  # the other ranks' own shares are sound
    environment.evaluate(model)


def dies_at_start(here: Rank) -> Any:
    die(here, 0)
    here.build()


def dies_in_restore(here: Rank) -> Any:
    sampler = here.build()
    state = sampler.state_dict(consumed=0)
    die(here, 1)
    sampler.load_state_dict(state)


def stops(here: Rank) -> Any:
    """A rank that hangs keeps its connections: only the timeout of the process group ends the wait."""
    sampler = here.build()
    if here.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    sampler.reweight({"general": -3.0}, consumed=0)


TOGETHER: dict[str, Callable[[Rank], Any]] = {
    "nothing": sound,
    "rank 2 is slow": slow,
    "rank 0's policy fails": failing_policy,
    "rank 3 lacks a shard": missing_shard,
    "rank 0 has no manifest": first_finds_nothing,
    "rank 2 has fewer shards": fewer_shards,
    "rank 2 has other domains": other_domains,
    "rank 2 has other contents": other_contents,
    "rank 1 has an older state": other_state,
    "rank 3 has a damaged state": damaged_state,
    "rank 3 has an unreadable checkpoint": unreadable_checkpoint,
    "rank 1 does not resume": one_does_not_resume,
    "rank 1 has another ledger": other_ledger,
    "rank 1 counts otherwise": other_count,
    "rank 2 sets its mix by hand": hand_against_policy,
    "rank 0's model diverged": diverged_model,
    "rank 2 has other questions": other_questions,
    **{f"rank 2 differs: {name}": lambda here, s=changed: here.differs(**s) for name, changed in SETTINGS.items()},
    "nothing, after all of these": sound,
}
ALONE: dict[str, Callable[[Rank], Any]] = {
    "rank 3 dies before a decision": dies_before,
    "rank 0 dies in its policy": dies_in_policy,
    "rank 2 dies before publication": dies_in_publication,
    "rank 1 dies in the evaluation": dies_in_evaluation,
    "rank 0 dies at the start": dies_at_start,
    "rank 1 dies in a restore": dies_in_restore,
    "rank 1 stops": stops,
}


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


if __name__ == "__main__":
    reports = run(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps(reports, indent=1))
