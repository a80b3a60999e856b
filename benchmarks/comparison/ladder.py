"""Agreement of models of 0.16M to 15M parameters about the same mixes, also at a tenth of the learning rate.

python -m benchmarks.comparison.ladder run --data DATA
python -m benchmarks.comparison.ladder table --output build/tasks/ladder.jsonl

Every size has a base model of its own, pre-trained on the same tokens, and is then trained on the same rows under each
of `MIXES`: constant ones, and those of the policies. The table has the rank correlations of the gains over the base
model, on questions that nothing reads. A finished run is a line of the output and is not repeated.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.agent.fidelity import agreement
from benchmarks.comparison.plus import plus
from benchmarks.comparison.policies import Factory, TaskContext, named, natural, random_mix
from benchmarks.records import add, lines, rounded
from dmagent_loader.mixture.domains import TARGET
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies import Policy
from dmagent_loader.training.tasks.episode import run_episode
from dmagent_loader.training.tasks.library import TaskLibrary
from dmagent_loader.training.tasks.simulator import ProxySimulator, Start
from dmagent_loader.training.tasks.spec import BaseModel, TaskSpec

LEARNING_RATES = {"0.16M": 1.5e-3, "0.7M": 1.2e-3, "3.2M": 8e-4, "5M": 7e-4, "15M": 5e-4}
"""Size -> learning rate. They fall with the width, as is usual; they were not searched for."""
FACTORS = (1.0, 0.1)
"""Factors of the learning rate; the second is the control."""
AGAIN = "0.16M, other rows"
"""The smallest size on the rows of another stream: the agreement that noise allows."""
TASK = TaskSpec(
    number=0,
    split="ladder",
    keep="mmlu",
    target="math",
    acquire="math",
    base=BaseModel(tokens=600_000),
    steps=40,
    tokens_per_step=2048,
)
RANDOM_MIXES = 5
SCORES = ("keep", "acquire", "mean")


def drawn(number: int, context: TaskContext) -> FloatArray:
    """A random constant mix, the same for every size."""
    return random_mix(np.random.default_rng([number, 17]), context.start, 0.05, 0.95)


MIXES: dict[str, Factory] = {
    **{f"natural {share:.0%}": functools.partial(natural, share) for share in (0.1, 0.3, 0.5, 0.7, 0.9)},
    **{f"random {number}": functools.partial(drawn, number) for number in range(RANDOM_MIXES)},
    "influence": functools.partial(named, "influence"),
    "dmagent-plus": functools.partial(plus, "dmagent-plus"),
}

Rung = tuple[str, float, int]
"""Size, factor of the learning rate, stream."""


def rungs(sizes: Sequence[str], factors: Sequence[float]) -> list[Rung]:
    """What is compared, the cheapest first."""
    found = [(size, factor, 0) for factor in factors for size in sizes]
    if "0.16M" in sizes:
        found.append(("0.16M", 1.0, 1))
    return sorted(found, key=lambda rung: list(LEARNING_RATES).index(rung[0]))


def label(rung: Rung) -> str:
    """Its name in tables."""
    size, factor, stream = rung
    return AGAIN if stream else size if factor == 1 else f"{size}, rate x {factor:g}"


def run(simulator: ProxySimulator, output: Path, chosen: Sequence[Rung]) -> None:
    """Runs what is missing from the output."""
    done = {(line["rung"], line["mix"]) for line in lines(output)}
    for rung in chosen:
        size, factor, stream = rung
        spec = replace(TASK, base=replace(TASK.base, size=size), learning_rate=LEARNING_RATES[size] * factor)
        for name, make in MIXES.items():
            if (label(rung), name) in done:
                continue
            choose = functools.partial(_made, make, spec, stream)
            episode = run_episode(simulator, spec, stream, choose, feedback_every=spec.steps)
            domains = simulator.library.space(spec.target, spec.space, spec.number).names
            is_target = np.array([domain.startswith(f"{TARGET}/") for domain in domains])
            line = {
                "rung": label(rung),
                "mix": name,
                "learning_rate": spec.learning_rate,
                "base": rounded(episode.feedback[0]),
                "gains": rounded(episode.gains),
                "target_share": round(float(episode.mixes[1:].mean(axis=0) @ is_target), 4),
                "seconds": round(episode.seconds, 1),
            }
            add(output, line)
            print(line, flush=True)


def _made(make: Factory, spec: TaskSpec, stream: int, start: Start) -> FloatArray | Policy:
    """A mix or a policy at the start of a run."""
    return make(TaskContext(spec=spec, start=start, stream=stream, recorded=_nothing, proxies=None, ranges=np.ones(2)))


def _nothing(name: str, stream: int) -> FloatArray:
    raise AssertionError(f"no path is recorded here, not that of {name} on stream {stream}")


def table(output: Path) -> str:
    """Rank correlations between all pairs of rungs that are complete."""
    by_rung: dict[str, dict[str, dict[str, Any]]] = {}
    for line in lines(output):
        by_rung.setdefault(line["rung"], {})[line["mix"]] = line
    complete = [
        name for name in map(label, rungs(list(LEARNING_RATES), FACTORS)) if len(by_rung.get(name, ())) == len(MIXES)
    ]
    gains = {name: np.array([by_rung[name][mix]["gains"] for mix in MIXES]) for name in complete}
    shares = {name: np.array([by_rung[name][mix]["target_share"] for mix in MIXES]) for name in complete}
    scores = {name: np.column_stack([found, (found / found.std(axis=0)).mean(axis=1)]) for name, found in gains.items()}
    rows = [f"| models | {' | '.join(SCORES)} |", f"|---|{'---:|' * len(SCORES)}"]
    for first, one in enumerate(complete):
        for other in complete[first + 1 :]:
            cells = []
            for column in range(len(SCORES)):
                found = agreement(scores[one][:, column], scores[other][:, column], shares[one])
                cells.append(f"{found.spearman:.2f} ({found.low:.2f} to {found.high:.2f})")
            rows.append(f"| {one} and {other} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run what is missing")
    runs.add_argument("--data", type=Path, required=True)
    runs.add_argument("--work", type=Path, default=Path("build/tasks"), help="for corpora, base models and probes")
    runs.add_argument("--sizes", nargs="+", choices=list(LEARNING_RATES), default=list(LEARNING_RATES))
    runs.add_argument("--factors", nargs="+", type=float, choices=FACTORS, default=list(FACTORS))
    show = commands.add_parser("table", help="print the table of what is there")
    for command in (runs, show):
        command.add_argument("--output", type=Path, default=Path("build/tasks/ladder.jsonl"))
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table(arguments.output))
        return
    torch.set_num_threads(1)
    simulator = ProxySimulator(TaskLibrary(arguments.data, arguments.work))
    run(simulator, arguments.output, rungs(arguments.sizes, arguments.factors))


if __name__ == "__main__":
    main()
