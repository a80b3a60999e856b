"""What it costs that the mix changes while training, and how soon a new mix holds.

    make demo && python benchmarks/dynamics.py

Throughput of packed rows with a new mix every 500 samples, set by hand and decided by the bundled agent, against one
mix for the whole run; how long a decision takes, alone and agreed on by two processes; how many samples are still
trained under the old mix, in bare loaders and in the Trainer (which runs the demo's model on the demo's data).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import dynamics_trainer
import numpy as np
import torch
from dynamics_decisions import AGENT, FIELDS, MANY_DOMAINS, decision_sampler, decisions, distributed_decisions, profile
from dynamics_decisions import proposals as agent_proposals
from measuring import Aim, aims_table, interleaved, measured_parts, median, median_ratio, number, parser, save, table

from dmagent_loader import AgentWeightedSampler, DomainSpace, MixingDataLoader, ReadingConfig
from dmagent_loader.testing import write_toy_shards

PARTS = ("throughput", "paced", "proposals", "decisions", "profile", "staleness", "stock_trainer", "own_loader")
INTERVAL, BATCH_SIZE = 500, 50
SAMPLES = 40_500
"""Of one measurement; the first 500 are not timed."""

ROWS, TOKENS = 1152, 2048
"""Rows of each of 52 domains, and tokens of each: 300 MB of shards."""

STEP_SECONDS = 0.0125
"""Of a training step that waits for an accelerator: 500 samples take 0.125 s."""

KINDS = ("static", "set_mix", "agent")
WORKERS = (0, 2)
LOST = 0.01
SECONDS_BETWEEN = (1.0, 10.0)
MAX_PROPOSAL_MS = 5.0


def packed_shards(folder: Path, quick: bool) -> dict[str, list[str]]:
    """Shards of packed rows in the 52 canonical domains; written once."""
    rows = 24 if quick else ROWS
    home = folder / f"packed-{rows}"
    names = DomainSpace.canonical().names
    if not (home / "complete").exists():
        write_toy_shards(home, dict.fromkeys(names, rows), rows_per_shard=rows // 2, tokens=TOKENS, vocabulary=50_000)
        (home / "complete").touch()
    return {name: sorted(str(path) for path in (home / name).glob("*.tar")) for name in names}


def tokens_only(samples: list[dict[str, Any]]) -> torch.Tensor:
    """The tokens of a batch: (B, T) uint16."""
    return torch.from_numpy(np.stack([sample["input_ids.npy"] for sample in samples]))


class Throughput:
    """Reads one run after the other over the same shards.

    Args:
        folder: For shards and indexes.
        quick: Few rows, few samples.
    """

    def __init__(self, folder: Path, quick: bool) -> None:
        self._shards, self._cache = packed_shards(folder, quick), folder / "cache"
        self._samples = 2 * INTERVAL if quick else SAMPLES
        generator = np.random.default_rng(0)
        names = list(self._shards)
        changes = self._samples // INTERVAL
        self._mixes = [dict(zip(names, mix.tolist(), strict=True)) for mix in generator.dirichlet(np.ones(52), changes)]
        self._feedback = [dict(zip(FIELDS, f, strict=True)) for f in generator.normal(-3, 0.3, (changes, 2)).tolist()]
        self.changes = changes - 1

    def run(self, kind: str, workers: int, step_seconds: float = 0.0) -> float:
        """Seconds of the samples after the first 500, each batch of which is trained on for a while."""
        sampler = AgentWeightedSampler(
            self._shards,
            agent=AGENT if kind == "agent" else None,
            samples_per_reweight=INTERVAL,
            initial_mix=self._mixes[0],
            exhausted="repeat",
            reading=ReadingConfig(cache_dir=self._cache, progress=False),
        )
        loader = MixingDataLoader(sampler, batch_size=BATCH_SIZE, num_workers=workers, collate_fn=tokens_only)
        batches, consumed, change, started = iter(loader), 0, 0, 0.0
        while consumed < self._samples:
            consumed += len(next(batches))
            if step_seconds:
                time.sleep(step_seconds)
            if consumed == INTERVAL:
                started = time.perf_counter()
            due = sampler.reweight_due(consumed)  # also tells the sampler what was consumed, as every trainer does
            if due and consumed % INTERVAL == 0 and consumed < self._samples:
                if kind == "set_mix":
                    sampler.set_mix(self._mixes[change])
                elif kind == "agent":
                    sampler.reweight(self._feedback[change], consumed=consumed)
                change += 1
        took = time.perf_counter() - started
        del batches
        return took


def throughput(folder: Path, repeats: int, quick: bool, step_seconds: float = 0.0) -> dict[str, Any]:
    """Seconds of every run, the kinds in turn, so that what disturbs the machine disturbs all of them."""
    runs = Throughput(folder, quick)
    runs.run("static", 0)  # the page cache is warm from here on
    works = {f"{kind} {w}": lambda k=kind, n=w: runs.run(k, n, step_seconds) for w in WORKERS for kind in KINDS}
    timed = interleaved(works, repeats, loud=f"steps of {step_seconds:g} s")
    samples = (2 * INTERVAL if quick else SAMPLES) - INTERVAL
    return {"samples": samples, "changes": runs.changes, "seconds": timed}


def staleness(folder: Path) -> list[dict[str, Any]]:
    """Samples trained under the old mix after a decision, in a loader whose training loop reports."""
    found = []
    for workers, prefetch, batch_size in [(0, None, 8), (2, 2, 8), (2, 4, 8), (2, 2, 50)]:
        sampler = decision_sampler(folder, 52)
        loader = MixingDataLoader(
            sampler, batch_size=batch_size, num_workers=workers, prefetch_factor=prefetch, collate_fn=list
        )
        stale, consumed = [], 0
        for batch in loader:
            consumed += len(batch)
            if sampler.reweight_due(consumed):
                feedback = dict.fromkeys(FIELDS, -3.0 - consumed / 10_000)
                stale.append(sampler.reweight(feedback, consumed=consumed).staleness)
            if len(stale) == 6:
                break
        found.append({"workers": workers, "prefetch": prefetch, "batch_size": batch_size, "staleness": stale[1:]})
    return found


def lost(results: dict[str, Any], kind: str, workers: int) -> float:
    """Share of the throughput that the changes cost, at the loader's full speed."""
    timed = results["throughput"]["seconds"]
    return 1 - 1 / median_ratio(timed[f"{kind} {workers}"], timed[f"static {workers}"])


def cost_ms(results: dict[str, Any], kind: str, workers: int, part: str = "paced") -> float:
    """Milliseconds that one change costs: while training waits for an accelerator, or (`throughput`) at full speed."""
    timed, changes = results[part]["seconds"], results[part]["changes"]
    pairs = zip(timed[f"{kind} {workers}"], timed[f"static {workers}"], strict=True)
    return 1000 * median((changed - static) / changes for changed, static in pairs)


def aims(results: dict[str, Any]) -> list[Aim]:
    """Below 1% lost, below 5 ms for a decision of the agent."""
    full = max(lost(results, "agent", workers) for workers in WORKERS)
    cost = max(cost_ms(results, "agent", workers) for workers in WORKERS)
    found = [
        Aim(
            f"a decision of the agent every {INTERVAL} samples costs < 1% at the loader's full speed, nothing "
            "being trained",
            f"{full:.1%}",
            full < LOST,
        )
    ]
    for between in SECONDS_BETWEEN:
        share = cost / 1000 / between
        what = f"... where {INTERVAL} samples take {between:g} s of training ({number(cost)} ms a decision)"
        found.append(Aim(what, f"{share:.2%}", share < LOST))
    last = results["proposals"][-1]
    proposal = median(last["agent"])
    what = f"the agent's decision at step {last['steps']}, one core, takes < {MAX_PROPOSAL_MS:g} ms"
    return [*found, Aim(what, f"{number(proposal)} ms", proposal < MAX_PROPOSAL_MS)]


def section(results: dict[str, Any]) -> str:
    """Markdown of all tables."""
    parts = [
        "## Changing the mix while training",
        f"Packed rows of {TOKENS:,} tokens (uint16) in 52 domains, batches of {BATCH_SIZE}, a warm page cache; a new "
        f"mix every {INTERVAL} samples. *Lost* is the cost for a loader at full speed, with nothing being trained; *a "
        "change* is the time behind it. *While training*: the same if the loop sleeps "
        f"{1000 * STEP_SECONDS:g} ms after each batch, as if it waited for an accelerator; data workers then plan and "
        "read in parallel (below zero: less than the noise). The share of a run follows from that.",
        _throughput(results),
        "![Cost of a change](images/bench_dynamics.png)",
        "The agent's proposal alone, one core, against one forward pass of a plain two-layer torch Transformer of its "
        "width:",
        table(
            ("steps of history", "agent, ms", "plain Transformer, ms", "ratio"),
            [
                (row["steps"], median(row["agent"]), median(row["plain"]), median_ratio(row["agent"], row["plain"]))
                for row in results["proposals"]
            ],
        ),
        "A whole decision (`sampler.reweight`), ms: history, proposal, translation to the run's domains, guard, "
        "ledger, and with two processes the exchange over gloo.",
        _decisions(results["decisions"]),
        "Profile of decisions 41 to 80 and of 64 samples after each, including the new plan (52 domains, one process, "
        "cProfile, own time of each function):",
        results["profile"],
        "Staleness: samples of all ranks that are trained on the old mix after a decision. In a bare `DataLoader`:",
        table(
            ("torch workers", "prefetch_factor", "batch size", "samples late"),
            [
                (row["workers"], row["prefetch"], row["batch_size"], _range(row["staleness"]))
                for row in results["staleness"]
            ],
        ),
    ]
    trained = [*(results["stock_trainer"] or []), *(results["own_loader"] or [])]
    if trained:
        parts += [
            "In the Trainer, on the demo's data and model, a decision every "
            f"{dynamics_trainer.SAMPLES // dynamics_trainer.DECISIONS} samples:",
            _trainer(trained),
        ]
    return "\n\n".join([*parts, aims_table(aims(results))])


def _throughput(results: dict[str, Any]) -> str:
    samples, timed = results["throughput"]["samples"], results["throughput"]["seconds"]
    rows = []
    for workers in WORKERS:
        for kind, name in zip(KINDS, ("one mix", "`set_mix`", "the agent"), strict=True):
            rate = samples / median(timed[f"{kind} {workers}"])
            cells: list[object] = [f"{name}, {workers} workers", rate, rate * TOKENS / 1e6]
            if kind == "static":
                cells += [None] * (3 + len(SECONDS_BETWEEN))
            else:
                cost = cost_ms(results, kind, workers)
                cells += [f"{lost(results, kind, workers):.1%}", cost_ms(results, kind, workers, "throughput"), cost]
                cells += [f"{cost / 1000 / between:.3%}" for between in SECONDS_BETWEEN]
            rows.append(cells)
    shares = [f"lost, {INTERVAL} samples in {between:g} s" for between in SECONDS_BETWEEN]
    header = ("", "samples/s", "million tokens/s", "lost at full speed", "a change, ms", "while training, ms", *shares)
    return table(header, rows)


def _decisions(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        for at in row["steps"]:
            cells.append((f"{row['domains']:,}", row["processes"], at["step"], median(at["policy"]), median(at["all"])))
    return table(("domains", "processes", "step", "policy", "in all"), cells)


def _trainer(rows: list[dict[str, Any]]) -> str:
    cells = [
        (
            row["loader"],
            row["processes"],
            row["workers"],
            row["accumulation"],
            _range(row["staleness"]),
            f"{max(row['staleness']) / row['step_samples']:.2f}",
            median(row["decision_ms"]),
            median(row["evaluation_seconds"]),
            f"{row['evaluation_share']:.1%}",
        )
        for row in rows
    ]
    header = ("loader", "processes", "torch workers", "accumulation", "samples late", "optimizer steps", "decision, ms")
    return table((*header, "evaluation, s", "of the run"), cells)


def _range(values: list[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"


def charts(results: dict[str, Any], folder: Path) -> None:
    """``bench_dynamics.png``: share of a run that changes cost, against how long training takes between them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 3.6))
    between = np.logspace(-2, 2, 50)
    for kind in KINDS[1:]:
        for workers in WORKERS:
            share = cost_ms(results, kind, workers) / 1000 / between
            if (share <= 0).any():
                continue  # less than the noise, and no place on a logarithmic axis
            label = f"{'the agent' if kind == 'agent' else kind}, {workers} workers"
            axis.plot(between, 100 * share / (1 + share), label=label)
    axis.axhline(100 * LOST, color="grey", linewidth=1, linestyle=":")
    axis.set(xscale="log", yscale="log", xlabel=f"seconds of training for {INTERVAL} samples", ylabel="lost, %")
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "bench_dynamics.png", dpi=150)
    pyplot.close(figure)


def main() -> None:
    options = parser(__doc__, "dynamics", repeats=7, parts=PARTS)
    options.add_argument("--data", type=Path, help="folder for shards that are made once (default: a temporary one)")
    options.add_argument("--demo", type=Path, default=Path("demo_output"), help="of `make demo`")
    args = options.parse_args()
    repeats, quick = (1 if args.quick else args.repeats), args.quick
    with tempfile.TemporaryDirectory() as scratch:
        data = args.data or Path(scratch)
        data.mkdir(parents=True, exist_ok=True)
        results = measured_parts(
            args,
            {
                "throughput": lambda: throughput(data, repeats, quick),
                "paced": lambda: throughput(data, repeats, quick, STEP_SECONDS),
                "proposals": lambda: agent_proposals(1 if quick else 50, quick),
                "decisions": lambda: [
                    decisions(data, 52, repeats, quick),
                    distributed_decisions(data, repeats, quick),
                    decisions(data, MANY_DOMAINS, repeats, quick),
                ],
                "profile": lambda: profile(data, 2 if quick else 40),
                "staleness": lambda: staleness(data),
                "stock_trainer": lambda: dynamics_trainer.training_runs(args.demo, False, quick),
                "own_loader": lambda: dynamics_trainer.training_runs(args.demo, True, quick),
            },
        )
    save(args, results)
    if len(results) == len(PARTS):
        print(section(results))


if __name__ == "__main__":
    main()
