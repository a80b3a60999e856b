"""What one decision costs, and what the plan costs, on one core.

    python benchmarks/decision_cost.py

For several lengths of the history, the time of the agent's proposal, against one forward pass of a plain two-layer
torch Transformer of the same width. Then the time to plan samples, for several numbers of domains, against drawing
domains independently with numpy (which keeps no mix, and cannot be resumed).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import measuring
import numpy as np
import torch

from dmagent_loader import DomainSpace, MixingAgent
from dmagent_loader.agent import AgentConfig
from dmagent_loader.history import FeedbackStatistics, History
from dmagent_loader.ledger import LedgerEntry
from dmagent_loader.plan import Plan

MAX_AGENT_MS = 5.0


def milliseconds(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each work in each round, after a warm-up."""
    for work in works.values():
        work()
    timed = {name: lambda w=work: 1000 * measuring.seconds(w) for name, work in works.items()}
    return measuring.interleaved(timed, repeats)


def agent_rows(repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    agent = MixingAgent(AgentConfig(statistics=FeedbackStatistics(mean=(-3.0, -3.0), std=(0.3, 0.3), count=100)))
    layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, dropout=0.0)
    peer = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    generator = np.random.default_rng(0)
    space = DomainSpace.canonical()
    rows = []
    for steps in (1, 20, 40, 80):
        history = History(
            domains=space.names,
            fields=("general", "math"),
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
            rows.append({"steps": steps, **milliseconds(works, repeats)})
    return rows


def plan_rows(repeats: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    rows = []
    for num_domains in (2, 52, 1000):
        space = DomainSpace.from_names([f"source/{i}" for i in range(num_domains)])
        plan = Plan(space, [np.full(4, 25_000)] * num_domains, seed=0)
        mix = generator.dirichlet(np.ones(num_domains))
        entry = LedgerEntry(start=0, mix=tuple(mix), decided_by="bench", decided_at=0)
        plan.append(entry)
        blocks = iter(range(10**9, 2 * 10**9, 1024))
        works = {
            "plan": lambda p=plan, b=blocks: p.locate(next(b) + np.arange(1024)),
            "draws": lambda m=mix, d=num_domains: generator.choice(d, 1024, p=m),
        }
        timed = milliseconds(works, repeats)
        new_mix = milliseconds({"append": lambda p=plan, e=entry: p.append(e)}, max(1, repeats // 10))["append"]
        rows.append({"domains": num_domains, **timed, "append": new_mix})
    return rows


def aims(results: dict[str, Any]) -> list[measuring.Aim]:
    last = results["agent"][-1]
    measured = measuring.median(last["agent"])
    what = f"the agent's decision at step {last['steps']}, one core: < {MAX_AGENT_MS:g} ms"
    return [measuring.Aim(what, f"{measuring.number(measured)} ms", measured < MAX_AGENT_MS)]


def section(results: dict[str, Any]) -> str:
    median, ratio = measuring.median, measuring.median_ratio
    agent = [
        (row["steps"], median(row["agent"]), median(row["plain"]), ratio(row["agent"], row["plain"]))
        for row in results["agent"]
    ]
    plan = [
        (
            row["domains"],
            median(row["plan"]),
            median(row["draws"]),
            ratio(row["plan"], row["draws"]),
            median(row["append"]),
        )
        for row in results["plan"]
    ]
    parts = [
        "## The cost of a decision",
        "One core. The agent's proposal, against one forward pass of a plain two-layer torch Transformer of its width:",
        measuring.table(("steps", "agent ms", "plain Transformer ms", "ratio"), agent),
        "Planning 1,024 samples far into a run, against drawing as many domains independently with numpy (which keeps "
        "no mix exactly and cannot be resumed), and taking in a new mix:",
        measuring.table(("domains", "plan ms", "independent draws ms", "ratio", "new mix ms"), plan),
        measuring.aims_table(aims(results)),
    ]
    return "\n\n".join(parts)


def main() -> None:
    args = measuring.parser(__doc__, "decision_cost", repeats=50).parse_args()
    torch.set_num_threads(1)
    repeats = 1 if args.quick else args.repeats
    results = {"agent": agent_rows(repeats), "plan": plan_rows(repeats)}
    print(section(results))
    measuring.save(args, results)


if __name__ == "__main__":
    main()
