"""Full trajectories of real proxies under varied mixes, to calibrate surrogates of tasks and to train agents offline.

    python -m benchmarks.comparison.record --data DATA --work build/tasks --output build/tasks/record.jsonl

Each finished run is a line with these values; runs that are there are not run again.

| value | |
|---|---|
| `task`, `spec`, `stream` | id of the task, all its settings, and the stream of rows |
| `path` | how the mixes were drawn: `natural S%`, `random N`, `schedule N`, `walk N`, `influence N` |
| `domains`, `natural`, `start_mix` | (D,) each: names, natural shares (half in each field), mix of the base model |
| `rows`, `repeats` | (D,) each: number of rows, whether they are read again when they are used up |
| `mixes` | (T, D); a single row if the mix was constant |
| `feedback` | (T + 1, K) on the questions that policies read, in nats, keep first; row 0 of the base model |
| `gains` | (K,) on the scored questions, in nats, over the base model |
| `influence` | `Influence.to_json` of the first measurement on the start model |
| `seconds` | of training and feedback |
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.records import add, lines, rounded
from dmagent_loader.mixture.domains import TARGET
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.influence import Influence
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies import INFLUENCE, LENGTH
from dmagent_loader.policies.influence import InfluencePolicy
from dmagent_loader.training.tasks.axes import sample_tasks
from dmagent_loader.training.tasks.episode import run_episode
from dmagent_loader.training.tasks.library import TaskLibrary
from dmagent_loader.training.tasks.simulator import ProxySimulator, Start
from dmagent_loader.training.tasks.spec import TaskSpec

STREAM = 500
"""Stream of the first path of a task; other rows than those of the comparison."""

Draw = Callable[[Start, TaskSpec, np.random.Generator, Influence], FloatArray]
"""Draws mixes: (D,) or (T, D)."""


def _shares(start: Start, within: FloatArray, share: FloatArray | float) -> FloatArray:
    """Mixes from weights inside the fields, (..., D), and target shares, (...)."""
    is_target = np.array([domain.field == TARGET for domain in start.space.domains])
    share = np.asarray(share, dtype=np.float64)[..., None]
    within = np.where(start.natural > 0, within, 0.0)
    target, source = within * is_target, within * ~is_target
    return np.asarray(
        share * target / target.sum(axis=-1, keepdims=True) + (1 - share) * source / source.sum(axis=-1, keepdims=True)
    )


def _share(rng: np.random.Generator) -> float:
    """A target share; most are small, as good ones are."""
    return float(rng.beta(1.3, 2.2))


def _natural(share: float, start: Start, *_: object) -> FloatArray:
    return start.at(share)


def random_static(start: Start, spec: TaskSpec, rng: np.random.Generator, _: Influence) -> FloatArray:
    """Weights of the domains spread by a random sharpness around the natural ones."""
    within = start.natural * np.exp(rng.normal(0, rng.uniform(0.3, 2.0), len(start.natural)))
    return _shares(start, within, _share(rng))


def schedule(start: Start, spec: TaskSpec, rng: np.random.Generator, _: Influence) -> FloatArray:
    """A target share that moves on a line or jumps once, over random weights inside the fields."""
    progress = (np.arange(spec.steps) + 0.5) / spec.steps
    first, last = _share(rng), _share(rng)
    course = progress if rng.random() < 0.5 else (progress > rng.uniform(0.2, 0.8)).astype(np.float64)
    within = start.natural * np.exp(rng.normal(0, rng.uniform(0.0, 1.5), len(start.natural)))
    return _shares(start, np.tile(within, (spec.steps, 1)), first + (last - first) * course)


def walk(start: Start, spec: TaskSpec, rng: np.random.Generator, _: Influence) -> FloatArray:
    """Weights and target share that drift through the run, faster in some runs than in others."""
    speed = rng.uniform(0.5, 3.0) / np.sqrt(spec.steps)
    logits = np.cumsum(rng.normal(0, speed, (spec.steps, len(start.natural))), axis=0)
    logit = rng.normal(-0.8, 1.0) + np.cumsum(rng.normal(0, speed, spec.steps))
    return _shares(start, start.natural * np.exp(logits), 1 / (1 + np.exp(-logit)))


def around_influence(start: Start, spec: TaskSpec, rng: np.random.Generator, influence: Influence) -> FloatArray:
    """The influence policy's mix of a random temperature, with noise that drifts through the run."""
    policy = InfluencePolicy(start.space, start.natural, temperature=float(rng.uniform(0.3, 1.5)), max_measurements=1)
    policy.inform(INFLUENCE, influence)
    policy.inform(LENGTH, start.length)
    mix = policy.propose(
        History(domains=start.space.names, fields=start.fields, mixes=start.mix[None], feedback=start.feedback[None])
    )
    speed = rng.uniform(0.0, 1.5) / np.sqrt(spec.steps)
    logits = rng.normal(0, 0.3, len(mix)) + np.cumsum(rng.normal(0, speed, (spec.steps, len(mix))), axis=0)
    return _shares(start, mix * np.exp(logits), np.full(spec.steps, _share(rng)))


def paths(turn: int) -> Iterator[tuple[str, Draw]]:
    """Paths of one task; another turn draws others."""
    if turn == 0:
        for share in (0.0, 0.3, 1.0):
            yield f"natural {share:.0%}", functools.partial(_natural, share)
    kinds: dict[str, Draw] = {
        "influence": around_influence,
        "random": random_static,
        "walk": walk,
        "schedule": schedule,
    }
    for number in (2 * turn, 2 * turn + 1):
        for name, draw in kinds.items():
            yield f"{name} {number}", draw


def record(spec: TaskSpec, turn: int, simulator: ProxySimulator, output: Path) -> None:
    """Runs what is missing of a task."""
    done = {(line["task"], line["path"]) for line in lines(output)}
    for place, (name, draw) in enumerate(paths(turn)):
        if (spec.id, name) in done:
            continue
        stream = STREAM + 20 * turn + place
        start = simulator.reset(spec, stream)
        influence = simulator.influence()
        rng = np.random.default_rng([spec.number, turn, place])
        mixes = draw(start, spec, rng, influence)
        episode = run_episode(simulator, spec, stream, lambda _, mixes=mixes: mixes)  # type: ignore[misc]
        add(
            output,
            {
                "task": spec.id,
                "spec": spec.to_json(),
                "stream": stream,
                "path": name,
                "domains": list(start.space.names),
                "natural": rounded(start.natural, 6),
                "start_mix": rounded(start.mix, 6),
                "rows": start.length.rows.tolist(),
                "repeats": start.length.repeats.tolist(),
                "mixes": rounded(episode.mixes[1:] if mixes.ndim == 2 else mixes[None]),
                "feedback": rounded(episode.feedback),
                "gains": rounded(episode.gains),
                "influence": influence.to_json(),
                "seconds": round(episode.seconds, 2),
            },
        )
        print(
            f"{spec.split} {spec.number} {name}: {episode.gains.round(3).tolist()} {episode.seconds:.1f} s", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/tasks"))
    parser.add_argument("--output", type=Path, default=Path("build/tasks/record.jsonl"))
    parser.add_argument("--split", default="train", help="tasks of this split")
    parser.add_argument("--first", type=int, default=0, help="number of the first task")
    parser.add_argument("--tasks", type=int, default=12, help="number of tasks")
    parser.add_argument("--turns", type=int, default=1, help="turns of paths through all tasks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    simulator = ProxySimulator(TaskLibrary(arguments.data, arguments.work))
    for turn in range(arguments.turns):
        for spec in sample_tasks(arguments.split, arguments.first + arguments.tasks)[arguments.first :]:
            record(spec, turn, simulator, arguments.output)


if __name__ == "__main__":
    main()
