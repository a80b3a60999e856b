"""What the plan costs on ranks, domains, shards and decisions in any number; for `benchmarks/scale.py`.

The plan is a function of a seed and a ledger, so that rank 9,999 of 10,000 needs no other process to be measured: it
plans its own share of the global batches, and that is what runs here.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measuring import interleaved, median, profiled, say, seconds

from dmagent_loader import DomainSpace
from dmagent_loader.mixture.ledger import LedgerEntry
from dmagent_loader.mixture.plan import Plan

SAMPLES = 1024
BLOCK = 16_384
"""Samples that a loader in full run plans in one call (`dmagent_loader._loading.stream`)."""

START = 10**9
"""Global index at which the measured samples begin: a run that has been going on for long."""

WARM_UP = 8
"""Blocks before those that are timed: by then nearly every domain has had a sample, and so an order of its shards."""

BASE = {"domains": 1000, "shards": 1_000_000, "ranks": 10_000, "decisions": 80}
"""The point from which one size at a time is varied."""

VARIED = {
    "domains": (10, 52, 100, 1000),
    "shards": (1000, 10_000, 100_000, 1_000_000),
    "ranks": (1, 10, 100, 1000, 10_000),
    "decisions": (1, 10, 80, 100, 1000, 10_000),
}


def shard_rows(domains: int, shards: int) -> list[np.ndarray]:
    """Rows of each shard of each domain: between 500 and 1,500."""
    generator = np.random.default_rng(0)
    return [generator.integers(500, 1500, shards // domains) for _ in range(domains)]


def build(domains: int, shards: int) -> Plan:
    """A plan without any mix."""
    space = DomainSpace.from_names([f"source/{i}" for i in range(domains)])
    return Plan(space, shard_rows(domains, shards), seed=0)


def add_decisions(plan: Plan, decisions: int) -> list[float]:
    """Appends as many mixes, the last of them in force at `START`; returns the seconds that each took."""
    generator = np.random.default_rng(1)
    apart = min(64_000, START // max(1, decisions))
    times = []
    for number in range(decisions):
        mix = generator.dirichlet(np.ones(len(plan.space)))
        entry = LedgerEntry(start=number * apart, mix=tuple(mix.tolist()), decided_by="bench", decided_at=0)
        times.append(seconds(lambda e=entry: plan.append(e)))
    return times


def point(domains: int, shards: int, ranks: int, decisions: int, repeats: int) -> dict[str, Any]:
    """Everything that one combination of sizes costs.

    Returns:
        Milliseconds for 1,024 samples of the last rank: `first_ms` at the start, `call_ms` in one call after that,
        `own_ms` as a loader in full run plans, which asks for 16,384 at a time.
    """
    made = time.perf_counter()
    plan = build(domains, shards)
    made = time.perf_counter() - made
    appended = add_decisions(plan, decisions)
    positions = ranks - 1 + ranks * np.arange(SAMPLES, dtype=np.int64)
    first = seconds(lambda: plan.locate(START + positions))
    own: dict[int, list[float]] = {}
    begin = START + SAMPLES * ranks
    for _ in range(WARM_UP):
        plan.locate(begin + ranks - 1 + ranks * np.arange(BLOCK, dtype=np.int64))
        begin += BLOCK * ranks
    for count in (SAMPLES, BLOCK):
        positions = ranks - 1 + ranks * np.arange(count, dtype=np.int64)
        own[count] = []
        for _ in range(repeats):
            own[count].append(1000 * SAMPLES / count * seconds(lambda b=begin, p=positions: plan.locate(b + p)))
            begin += count * ranks
    return {
        "domains": domains,
        "shards": shards,
        "ranks": ranks,
        "decisions": decisions,
        "build_ms": 1000 * made,
        "append_ms": 1000 * median(appended),
        "first_ms": 1000 * first,
        "call_ms": own[SAMPLES],
        "own_ms": own[BLOCK],
    }


def profile(quick: bool) -> str:
    """Where the time goes of planning 8 blocks at `BASE`."""
    sizes = {**BASE, **({"shards": 10_000} if quick else {})}
    plan = build(sizes["domains"], sizes["shards"])
    add_decisions(plan, sizes["decisions"])
    blocks = [START + sizes["ranks"] * np.arange(turn * BLOCK, (turn + 1) * BLOCK) for turn in range(2 * WARM_UP)]
    for block in blocks[:WARM_UP]:
        plan.locate(block)
    return profiled(lambda: [plan.locate(block) for block in blocks[WARM_UP:]])


def growth(repeats: int, quick: bool) -> dict[str, list[dict[str, Any]]]:
    """`point` along each size, the others as in `BASE`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, values in VARIED.items():
        found[name] = []
        for value in values[:2] if quick else values:
            sizes = {**BASE, **({"shards": 10_000} if quick else {}), name: value}
            found[name].append(point(**sizes, repeats=repeats))
            row = found[name][-1]
            say(f"{name} {value}: own {median(row['own_ms']):.2f} ms, in one call {median(row['call_ms']):.2f} ms")
    return found


def against_peers(repeats: int, quick: bool) -> list[dict[str, Any]]:
    """Planning 1,024 samples, against drawing their domains independently, and against a blend as Megatron makes it.

    numpy's draws keep no mix, tell no row, and are lost when a run resumes. Megatron's `build_blending_indices` fixes
    the domain and the draw of every sample of the run before it begins; the rows come from further indexes of its own.
    """
    found = []
    for domains in (52,) if quick else (2, 52, 1000):
        timed = interleaved(_peers(domains, SAMPLES * (20 if quick else 200)), repeats)
        found.append({"domains": domains, **timed})
        say(f"{domains} domains: " + ", ".join(f"{name} {median(values):.3f} ms" for name, values in timed.items()))
    return found


def _peers(domains: int, blended: int) -> dict[str, Callable[[], float]]:
    """Name -> milliseconds of 1,024 samples."""
    generator = np.random.default_rng(0)
    mix = generator.dirichlet(np.ones(domains))
    plan = build(domains, domains * 20)
    add_decisions(plan, 1)
    blocks = iter(range(START, 2 * START, SAMPLES))
    plan.locate(next(blocks) + np.arange(SAMPLES))
    works = {
        "plan": lambda: 1000 * seconds(lambda: plan.locate(next(blocks) + np.arange(SAMPLES))),
        "draws": lambda: 1000 * seconds(lambda: generator.choice(domains, SAMPLES, p=mix)),
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.datasets import helpers_cpp
    except ImportError:
        return works

    def blend() -> None:
        dataset, draw = np.empty(blended, np.int16), np.empty(blended, np.int64)
        helpers_cpp.build_blending_indices(dataset, draw, mix, domains, blended, False)

    return {**works, "blend": lambda: 1000 * seconds(blend) * SAMPLES / blended}


def memory(quick: bool) -> dict[str, float]:
    """MB that a process needs beyond its imports for a plan of the largest sizes and 64 x 1,024 samples of one rank.

    Runs in a process of its own: what it measures is the peak since that process began.
    """
    sizes = {**BASE, **({"shards": 10_000} if quick else {})}
    before = resident_mb("VmRSS")
    plan = build(sizes["domains"], sizes["shards"])
    add_decisions(plan, sizes["decisions"])
    built = resident_mb("VmHWM")
    positions = sizes["ranks"] - 1 + sizes["ranks"] * np.arange(SAMPLES, dtype=np.int64)
    for turn in range(2 if quick else 64):
        plan.locate(START + turn * SAMPLES * sizes["ranks"] + positions)
    return {"imports_mb": before, "built_mb": built - before, "peak_mb": resident_mb("VmHWM") - before, **sizes}


def resident_mb(line: str) -> float:
    """Memory of this process in MB: ``VmRSS`` now, ``VmHWM`` at most so far."""
    status = Path("/proc/self/status").read_text()
    kilobytes = next(text.split()[1] for text in status.splitlines() if text.startswith(f"{line}:"))
    return int(kilobytes) / 1024
