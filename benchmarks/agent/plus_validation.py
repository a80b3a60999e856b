"""The surrogate of `dmagent-plus` against recorded runs of tasks that it was not fitted on.

    python -m benchmarks.agent.plus_validation --record build/tasks/record.jsonl

For each task, Spearman correlation of simulated and real final gains over its runs under varied mixes. The values of
the domains come from the influence that was measured on the start model, because no clones were trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.agent.plus_offline import by_task, facts_of, mixes_and_natural
from dmagent_loader.agent.plus.observation import Facts, Moment
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.influence import Influence
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.data.spaces import ROW_TOKENS
from dmagent_loader.training.plus.calibration import CALIBRATION, Calibration
from dmagent_loader.training.plus.fitting import Fit, fit, fit_rate
from dmagent_loader.training.plus.sampling import STEPS_OF_RECORD
from dmagent_loader.training.plus.surrogate import SurrogateTasks, joined, rollout
from dmagent_loader.training.plus.train import split
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.stages import find_record

TOKENS_OF_RECORD, RATE_OF_RECORD = 163_840, 1.5e-3
OVERFIT = 0.05
LEAST_RUNS = 8


def simulated(run: Mapping[str, Any], constants: Fit, rate: FloatArray) -> FloatArray:
    """Final gains of a recorded run in the surrogate, up to a scale and an offset of the task: (K,)."""
    spec = run["spec"]
    influence = Influence.from_json(run["influence"])
    place = {name: number for number, name in enumerate(run["domains"])}
    kept = [place[name] for name in influence.domains]
    space = DomainSpace.from_names(influence.domains)
    mixes, natural = mixes_and_natural(run, kept)
    facts = facts_of(space, natural, influence)
    values = influence.values()
    z = np.clip((values - values.mean(axis=1, keepdims=True)) / values.std(axis=1, keepdims=True), -3, 3)
    is_target = facts.fields[1]
    raised = np.exp(constants.sharpness[:, None] * z + constants.target_offset[:, None] * is_target)
    value = raised / raised.mean(axis=1, keepdims=True)
    total = spec["steps"] * spec["tokens_per_step"]
    mixes = np.broadcast_to(mixes, (spec["steps"], len(kept)))
    speed = total / TOKENS_OF_RECORD * spec["learning_rate"] / RATE_OF_RECORD * STEPS_OF_RECORD / spec["steps"]
    tasks = SurrogateTasks(
        decisions=spec["steps"],
        facts=Facts(**{name: entry[None] for name, entry in vars(facts).items()}),
        value=value[None],
        late_value=value[None],
        kappa=constants.kappa,
        scale=np.nanmean(constants.scale, axis=0)[None],
        offset=np.nanmean(constants.offset, axis=0)[None],
        rate=(rate * speed)[None],
        passes=(total / ROW_TOKENS / np.maximum(np.array(run["rows"])[kept], 1))[None],
        repeats=np.array(run["repeats"], dtype=np.float64)[kept][None],
        repetition=np.full(1, 8.0),
        noise=np.zeros((1, len(kept))),
        onset=np.ones(1),
        harm=np.zeros((1, 2)),
        overfit=np.full((1, 2), OVERFIT),
        feedback_noise=np.zeros((1, 2)),
        learning_rate=np.ones((1, spec["steps"])),
        learning_rate_known=np.zeros(1),
        progress_known=np.zeros(1),
        balance=np.full(1, 0.5),
        kinds=("none",),
    )
    path = iter(mixes)

    def decide(facts: Facts, moment: Moment) -> FloatArray:
        return np.asarray(next(path)[None])

    return np.asarray(rollout(joined([tasks]), decide, 0).gains[0])


def correlations(runs: Sequence[Mapping[str, Any]], constants: Fit, rate: FloatArray) -> FloatArray:
    """Spearman correlations over the runs of a task: (K,)."""
    predicted = np.array([simulated(run, constants, rate) for run in runs])
    real = np.array([run["gains"] for run in runs])
    found = [float(spearmanr(predicted[:, k], real[:, k]).statistic) for k in (0, 1)]
    return np.asarray(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, default=Path("training_record/plus") / CALIBRATION)
    parser.add_argument("--record", type=Path, required=True)
    arguments = parser.parse_args()
    calibration = Calibration.load(arguments.calibration)
    constants = fit(calibration, split(calibration)[0])
    record = FeedbackRecord.load(find_record("recorded-math"))
    rate = fit_rate(record, np.arange(len(record.trajectories.lengths))).rate
    found = []
    for runs in by_task(arguments.record).values():
        if len(runs) < LEAST_RUNS:
            continue
        spec = runs[0]["spec"]
        found.append(correlations(runs, constants, rate))
        label = f"{spec['keep']} + {spec['target']}/{spec['acquire']}, {spec['space']}, {spec['perturbation']['kind']}"
        print(f"{label}, {len(runs)} runs: keep {found[-1][0]:.2f}, acquire {found[-1][1]:.2f}")
    print(f"mean of {len(found)} tasks: keep {np.mean(found, axis=0)[0]:.2f}, acquire {np.mean(found, axis=0)[1]:.2f}")


if __name__ == "__main__":
    main()
