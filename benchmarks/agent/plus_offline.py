"""Offline reinforcement learning for `dmagent-plus`, judged on surrogate tasks beside the trained networks.

    python -m benchmarks.agent.plus_offline --output build/plus/offline.jsonl [--record build/tasks/record.jsonl]

Each finished training is a line of the output; trainings that are there are not run again. The batch is the recorded
set of the bundled agents (random walks, no measured influence of its own: that of the same corpus and questions
stands in) and, if given, the record of `benchmarks.comparison.record`, whose tasks of the split ``train`` are read.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.records import add, lines
from dmagent_loader.agent.plus.observation import Facts
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.influence import Influence
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies.influence import InfluencePolicy
from dmagent_loader.policies.plus import influence_facts
from dmagent_loader.training.data.spaces import ROW_TOKENS
from dmagent_loader.training.plus.calibration import CALIBRATION, Calibration
from dmagent_loader.training.plus.evolution import Judged
from dmagent_loader.training.plus.fitting import fit, fit_rate, with_levels
from dmagent_loader.training.plus.offline import ALGORITHMS, RecordedRun, episodes, train_offline
from dmagent_loader.training.plus.sampling import TaskSource, influence_of
from dmagent_loader.training.plus.surrogate import LEAST_RANGE, joined
from dmagent_loader.training.plus.train import split
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.stages import find_record


def facts_of(space: DomainSpace, natural: FloatArray, influence: Influence) -> Facts:
    """Facts of a run whose questions' topics are unknown."""
    policy = InfluencePolicy(space, natural)
    policy.inform("influence", influence)
    start = History(domains=space.names, fields=influence.fields, mixes=natural[None], feedback=np.zeros((1, 2)))
    members = np.array([[d.field == name for d in space.domains] for name in space.fields], dtype=np.float64)
    found = influence_facts(influence, space, natural, influence.fields, ([0], 1))
    return Facts(
        prior=policy.unlimited(start),
        natural=natural,
        fields=members,
        acquires=np.array([0.0, 1.0]),
        measured=np.ones(()),
        topics=np.zeros(len(natural)),
        topics_known=np.zeros(()),
        **found,
    )


def walks(calibration: Calibration, record: FeedbackRecord) -> list[RecordedRun]:
    """The recorded trajectories of the bundled agents."""
    number = calibration.environments.index("mmlu+math")
    present = np.flatnonzero(~np.isnan(calibration.truth[number, 0]))
    space = DomainSpace.from_names([DomainSpace.canonical().names[i] for i in present])
    values, errors = calibration.values[number, 0][:, present], calibration.errors[number, 0][:, present]
    groups = calibration.groups[number, 0][..., present]
    influence = influence_of(space, values, errors, groups)
    natural = calibration.natural[number, present] / calibration.natural[number, present].sum()
    facts = facts_of(space, natural, influence)
    gains = record.feedback[:, 1:] - record.feedback[:, :1]
    last = np.array([gains[i, length - 1] for i, length in enumerate(record.trajectories.lengths)])
    attainable = np.quantile(last, 0.95, axis=0) - np.quantile(last, 0.05, axis=0)
    found = []
    for i, length in enumerate(record.trajectories.lengths):
        mixes = record.trajectories.mixes[i, 1 : length + 1][:, present]
        found.append(
            RecordedRun(
                facts=facts,
                mixes=mixes / mixes.sum(axis=1, keepdims=True),
                feedback=gains[i, :length],
                attainable=attainable,
                passes=np.zeros(len(present)),
            )
        )
    return found


def by_task(path: Path) -> dict[str, list[Mapping[str, Any]]]:
    """Lines of the record of `benchmarks.comparison.record`, by task."""
    if not path.is_file():
        raise SystemExit(f"there is no record {path}: make it with python -m benchmarks.comparison.record")
    found: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines(path):
        found.setdefault(line["task"], []).append(line)
    return found


def mixes_and_natural(run: Mapping[str, Any], kept: Sequence[int]) -> tuple[FloatArray, FloatArray]:
    """Mixes, (T, D), and natural shares, (D,), of a recorded run on the domains that were measured."""
    mixes, natural = np.array(run["mixes"])[:, kept], np.array(run["natural"])[kept]
    return mixes / mixes.sum(axis=1, keepdims=True), natural / natural.sum()


def task_runs(path: Path) -> list[RecordedRun]:
    """Runs of training tasks in the record of `benchmarks.comparison.record`."""
    found = []
    for runs in by_task(path).values():
        naturals = [run["gains"] for run in runs if run["path"].startswith("natural")]
        if runs[0]["spec"]["split"] == "train" and len(naturals) >= 3:
            found += [_task_run(run, np.maximum(np.ptp(naturals, axis=0), LEAST_RANGE)) for run in runs]
    return [run for run in found if run is not None]


def _task_run(run: Mapping[str, Any], attainable: FloatArray) -> RecordedRun | None:
    influence = Influence.from_json(run["influence"])
    place = {name: number for number, name in enumerate(run["domains"])}
    kept = [place[name] for name in influence.domains]
    feedback = np.array(run["feedback"], dtype=np.float64)
    mixes, natural = mixes_and_natural(run, kept)
    if np.isnan(feedback).any() or len(mixes) == 1:
        return None
    space = DomainSpace.from_names(influence.domains)
    rows = run["spec"]["steps"] * run["spec"]["tokens_per_step"] / ROW_TOKENS
    return RecordedRun(
        facts=facts_of(space, natural, influence),
        mixes=mixes,
        feedback=feedback[1:] - feedback[0],
        attainable=attainable,
        passes=rows / np.maximum(np.array(run["rows"])[kept], 1),
    )


def judged(calibration: Calibration, record: FeedbackRecord, members: Sequence[int], first: int) -> list[Judged]:
    """Surrogate tasks of some environments."""
    constants = with_levels(fit(calibration, split(calibration)[0]), calibration)
    rate = fit_rate(record, np.arange(len(record.trajectories.lengths))).rate
    source = TaskSource(calibration=calibration, constants=constants, rate=rate, environments=members)
    return [
        Judged.of(joined([source.batch(1, decisions, first + i) for i in range(count)]))
        for decisions, count in ((10, 64), (24, 64), (80, 32))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, default=Path("training_record/plus") / CALIBRATION)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    calibration = Calibration.load(arguments.calibration)
    record = FeedbackRecord.load(find_record("recorded-math"))
    runs = walks(calibration, record)[::2] + (task_runs(arguments.record) if arguments.record else [])
    batch = episodes(runs)
    print(f"{len(runs)} runs, {sum(len(run['rewards']) for run in batch)} transitions", flush=True)
    _, validation, test = split(calibration)
    tasks = {"validation": judged(calibration, record, validation, 1_500_000)}
    tasks["test"] = judged(calibration, record, test, 2_500_000)
    done = {(line["algorithm"], line["seed"]) for line in lines(arguments.output)}
    for seed in range(arguments.seeds):
        for name in ALGORITHMS:
            if (name, seed) in done:
                continue
            started = time.perf_counter()
            decide = train_offline(name, batch, updates=arguments.updates, seed=seed)
            line: dict[str, Any] = {"algorithm": name, "seed": seed, "updates": arguments.updates, "runs": len(runs)}
            line["seconds"] = round(time.perf_counter() - started, 1)
            for label, listed in tasks.items():
                found = np.concatenate([part.advantages(decide, 0) for part in listed])
                error = found.std(ddof=1) / np.sqrt(len(found))
                line[label] = [round(float(found.mean()), 4), round(float(error), 4)]
            add(arguments.output, line)
            print(line, flush=True)


if __name__ == "__main__":
    main()
