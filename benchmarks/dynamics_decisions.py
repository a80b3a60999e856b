"""How long a decision takes: of the agent alone, and one that several processes agree on; for `dynamics.py`."""

from __future__ import annotations

import json
import os
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import interleaved, profiled, seconds

from dmagent_loader import AgentWeightedSampler, DomainSpace, MixingAgent, ReadingConfig
from dmagent_loader.mixture.domains import CANONICAL_TOPICS
from dmagent_loader.mixture.history import History
from dmagent_loader.testing import write_toy_shards

STEPS = (1, 20, 40, 80)
AGENT = "dmagent-rl"
FIELDS = ("general", "math")
PROCESSES = 2
MANY_DOMAINS = 1000
_BETWEEN = 64
_ROWS = 4


def proposals(repeats: int, quick: bool) -> list[dict[str, Any]]:
    """Milliseconds of the bundled agent's proposal, and of a plain torch Transformer of its size, on one core."""
    torch.set_num_threads(1)
    agent = MixingAgent.from_pretrained(AGENT)
    layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, dropout=0.0)
    peer = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    generator = np.random.default_rng(0)
    rows = []
    for steps in STEPS[: 2 if quick else None]:
        history = History(
            domains=DomainSpace.canonical().names,
            fields=FIELDS,
            mixes=generator.dirichlet(np.ones(52), steps),
            feedback=generator.normal(-3, 0.3, (steps, 2)),
        )
        inputs = torch.randn(1, steps, 256)
        mask = torch.nn.Transformer.generate_square_subsequent_mask(steps)
        works = {
            "agent": lambda h=history: agent.propose(h),
            "plain": lambda x=inputs, m=mask: peer(x, mask=m, is_causal=True),
        }
        with torch.no_grad():
            for work in works.values():
                work()
            timed = {name: lambda w=work: 1000 * seconds(w) for name, work in works.items()}
            rows.append({"steps": steps, **interleaved(timed, repeats)})
    return rows


def decision_sampler(folder: Path, domains: int, **settings: Any) -> AgentWeightedSampler:
    """A sampler over toy shards, decided by the bundled agent: the canonical domains, or as many of mixed topics."""
    if domains == 52:
        names, compositions = DomainSpace.canonical().names, None
    else:
        names = tuple(f"{('source', 'target')[number % 2]}/d{number:04d}" for number in range(domains))
        generator = np.random.default_rng(0)
        compositions = {
            name: dict(zip(CANONICAL_TOPICS, generator.dirichlet(np.full(26, 0.2)).tolist(), strict=True))
            for name in names
        }
    home = folder / f"toy-{domains}"
    listing = home / "shards.json"
    if not listing.exists():
        shards = write_toy_shards(home, dict.fromkeys(names, _ROWS), rows_per_shard=_ROWS)
        listing.write_text(json.dumps(shards))
    return AgentWeightedSampler(
        json.loads(listing.read_text()),
        agent=AGENT,
        samples_per_reweight=_BETWEEN,
        exhausted="repeat",
        compositions=compositions,
        reading=ReadingConfig(cache_dir=folder / "cache", progress=False),
        **settings,
    )


def decide(sampler: AgentWeightedSampler, steps: int, first: int = 0) -> list[dict[str, float]]:
    """Milliseconds of each decision of a run from its `first` on: all of `sampler.reweight`, and the policy's part."""
    generator = np.random.default_rng(0)
    stream, found = iter(sampler), []
    for step in range(first, first + steps):
        feedback = dict(zip(FIELDS, generator.normal(-3, 0.3, 2).tolist(), strict=True))
        decision = []
        took = seconds(lambda f=feedback, s=step, d=decision: d.append(sampler.reweight(f, consumed=s * _BETWEEN)))
        assert decision[0].in_force, f"the agent's decision was refused: {decision[0].notes}"
        found.append({"all": 1000 * took, "policy": 1000 * decision[0].seconds})
        for _ in range(_BETWEEN // sampler.world_size):
            next(stream)
    return found


def profile(folder: Path, changes: int) -> str:
    """Where the time goes of decisions, each followed by `_BETWEEN` samples, after `STEPS[-2]` of them."""
    torch.set_num_threads(1)
    sampler = decision_sampler(folder, 52)
    decide(sampler, STEPS[-2])
    return profiled(lambda: decide(sampler, changes, first=STEPS[-2]))


def decisions(folder: Path, domains: int, repeats: int, quick: bool) -> dict[str, Any]:
    """Whole decisions of one process at the steps of `STEPS`."""
    torch.set_num_threads(1)
    steps = STEPS[: 2 if quick else None]
    return _at_steps(steps, domains, 1, [decide(decision_sampler(folder, domains), steps[-1]) for _ in range(repeats)])


def _at_steps(
    steps: tuple[int, ...], domains: int, processes: int, runs: list[list[dict[str, float]]]
) -> dict[str, Any]:
    return {
        "domains": domains,
        "processes": processes,
        "steps": [
            {"step": step, **{name: [run[step - 1][name] for run in runs] for name in ("all", "policy")}}
            for step in steps
        ],
    }


def distributed_decisions(folder: Path, repeats: int, quick: bool) -> dict[str, Any]:
    """Whole decisions of two processes over gloo: rank 0 decides, both wait until both have the mix."""
    steps = STEPS[: 2 if quick else None]
    decision_sampler(folder, 52)  # writes and indexes the shards
    runs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as meeting:
            context = get_context("spawn")
            processes = [
                context.Process(target=_rank, args=(rank, str(folder), meeting, steps[-1])) for rank in range(PROCESSES)
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join(timeout=120)
                if process.exitcode != 0:
                    raise SystemExit(f"a process of the distributed decision ended with {process.exitcode}")
            runs.append(json.loads(Path(meeting, "times.json").read_text()))
    return _at_steps(steps, 52, PROCESSES, runs)


def _rank(rank: int, folder: str, meeting: str, steps: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{meeting}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    sampler = decision_sampler(Path(folder), 52)
    times = decide(sampler, steps)
    if rank == 0:
        Path(meeting, "times.json").write_text(json.dumps(times))
    torch.distributed.barrier()
    os._exit(0)  # leaving a gloo process the normal way aborts now and then
