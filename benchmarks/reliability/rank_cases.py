"""What one of four ranks does otherwise than the rest, or does not do any more; run by `ranks`."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmagent_loader import AgentWeightedSampler, DecisionConfig, Environment, ReadingConfig
from dmagent_loader._loading.cursor import Cursor
from dmagent_loader.integrations.mixing import Mixing
from dmagent_loader.mixture.ledger import LedgerEntry
from dmagent_loader.policies import GuardConfig

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
        reading = replace(settings.pop("reading", ReadingConfig()), cache_dir=self.folder / "cache", progress=False)
        return AgentWeightedSampler(
            shards, reading=reading, **{"samples_per_reweight": 16, "policy": Turns(), **settings}
        )

    def train(self, sampler: AgentWeightedSampler, until: int) -> list[int]:
        """Samples of this rank up to a global index, with the decisions that fall due."""
        seen, consumed = [], sampler._feed.cursor.consumed
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
    return [[entry.accepted for entry in entries[-2:]], sampler._run.decider.failures, sampler.mix]


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


def other_data(here: Rank) -> Any:
    """One rank would begin a new segment where the others go on exactly."""
    state = here.build().state_dict(consumed=0)
    here.build().load_state_dict(state, data="changed" if here.rank == 1 else "exact")


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
    "shuffle_window": {"reading": ReadingConfig(shuffle_window=7)},
    "shuffle_shards": {"reading": ReadingConfig(shuffle_shards=7)},
    "samples_per_reweight": {"samples_per_reweight": 32},
    "initial_mix": {"initial_mix": MIX},
    "start_state": {"start_state": MIX},
    "policy": {"policy": None},
    "shadow": {"deciding": DecisionConfig(shadow=True)},
    "history_mix": {"deciding": DecisionConfig(history_mix="requested")},
    "guard": {"deciding": DecisionConfig(guard=GuardConfig(max_change=0.1))},
    "on_bad_row": {"on_bad_row": "skip"},
    "the loader": {"reading": ReadingConfig(prefetch_factor=4)},
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
    original = Cursor.first_free

    def first_free(*args: Any) -> int:
        die(here, 2)
        return original(*args)

    Cursor.first_free = first_free
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
    "rank 1 allows other data": other_data,
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
