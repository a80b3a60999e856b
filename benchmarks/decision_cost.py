"""What one decision costs, and what the plan costs: medians of several runs on one core.

    python benchmarks/decision_cost.py

Prints, for several lengths of the history, the time of the agent's proposal, and of the same proposal against one
forward pass of a plain two-layer torch Transformer of the same width, measured in the same run. Then the time to plan
samples, for several numbers of domains, against drawing domains independently with numpy (which keeps no mix, and
cannot be resumed).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from dmagent_loader import DomainSpace, MixingAgent
from dmagent_loader.agent import AgentConfig
from dmagent_loader.history import FeedbackStatistics, History
from dmagent_loader.ledger import LedgerEntry
from dmagent_loader.plan import Plan


def median_ms(work: Callable[[], object], repeats: int) -> float:
    """Median duration in milliseconds, after a warm-up."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def agent_rows(repeats: int) -> None:
    torch.manual_seed(0)
    agent = MixingAgent(AgentConfig(statistics=FeedbackStatistics(mean=(-3.0, -3.0), std=(0.3, 0.3), count=100)))
    layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, dropout=0.0)
    peer = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    generator = np.random.default_rng(0)
    space = DomainSpace.canonical()
    print(f"{'steps':>6} {'agent ms':>9} {'plain Transformer ms':>21} {'ratio':>6}")
    for steps in (1, 20, 40, 80):
        history = History(
            domains=space.names,
            fields=("general", "math"),
            mixes=generator.dirichlet(np.ones(52), steps),
            feedback=generator.normal(-3, 0.3, (steps, 2)),
        )
        inputs = torch.randn(1, steps, 256)
        mask = torch.nn.Transformer.generate_square_subsequent_mask(steps)
        with torch.no_grad():
            ours = median_ms(lambda h=history: agent.propose(h), repeats)
            plain = median_ms(lambda x=inputs, m=mask: peer(x, mask=m, is_causal=True), repeats)
        print(f"{steps:>6} {ours:>9.2f} {plain:>21.2f} {ours / plain:>6.2f}")


def plan_rows(repeats: int) -> None:
    generator = np.random.default_rng(0)
    print(f"{'domains':>8} {'plan ms per 1,024':>18} {'independent draws ms':>21} {'ratio':>6} {'new mix ms':>11}")
    for num_domains in (2, 52, 1000):
        space = DomainSpace.from_names([f"source/{i}" for i in range(num_domains)])
        plan = Plan(space, [np.full(4, 25_000)] * num_domains, seed=0)
        mix = generator.dirichlet(np.ones(num_domains))
        entry = LedgerEntry(start=0, mix=tuple(mix), decided_by="bench", decided_at=0)
        plan.append(entry)
        blocks = iter(range(10**9, 2 * 10**9, 1024))
        ours = median_ms(lambda p=plan, b=blocks: p.locate(next(b) + np.arange(1024)), repeats)
        plain = median_ms(lambda m=mix, d=num_domains: generator.choice(d, 1024, p=m), repeats)
        append = median_ms(lambda p=plan, e=entry: p.append(e), max(5, repeats // 10))
        print(f"{num_domains:>8} {ours:>18.2f} {plain:>21.3f} {ours / plain:>6.1f} {append:>11.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    agent_rows(repeats)
    print()
    plan_rows(repeats)


if __name__ == "__main__":
    main()
