"""What `dmagent-plus` uses: advantage over the influence policy on surrogate tasks with parts of its tokens frozen.

python -m benchmarks.agent.plus_ablation --agent dmagent-plus
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.agent.plus_offline import judged
from dmagent_loader.agent.plus import checkpoint
from dmagent_loader.agent.plus.observation import Facts, Moment
from dmagent_loader.training.plus.calibration import CALIBRATION, Calibration
from dmagent_loader.training.plus.evolution import Judged
from dmagent_loader.training.plus.train import split
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.stages import find_record

Change = Callable[[Facts, Moment], tuple[Facts, Moment]]


def without_passes(facts: Facts, moment: Moment) -> tuple[Facts, Moment]:
    """Passes over the rows unknown."""
    none = np.zeros_like(moment.passes)
    ones = np.ones_like(moment.rows_left)
    return facts, dataclasses.replace(moment, passes=none, final_passes=none, rows_left=ones)


CHANGES: dict[str, Change] = {
    "whole": lambda facts, moment: (facts, moment),
    "feedback frozen at the first": lambda f, m: (f, dataclasses.replace(m, gains=np.zeros_like(m.gains))),
    "progress unknown": lambda f, m: (
        f,
        dataclasses.replace(m, progress=np.zeros_like(m.progress), progress_known=np.zeros_like(m.progress_known)),
    ),
    "passes unknown": without_passes,
    "balance 0.5": lambda f, m: (f, dataclasses.replace(m, balance=np.full_like(m.balance, 0.5))),
    "effect across fields unknown": lambda f, m: (dataclasses.replace(f, across=np.zeros_like(f.across)), m),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agent", default="dmagent-plus")
    parser.add_argument("--calibration", type=Path, default=Path("training_record/plus") / CALIBRATION)
    arguments = parser.parse_args()
    network = checkpoint.load(arguments.agent)[0].in_float32()
    calibration = Calibration.load(arguments.calibration)
    record = FeedbackRecord.load(find_record("recorded-math"))
    batches: list[Judged] = judged(calibration, record, split(calibration)[2], 2_500_000)
    whole = None
    for name, change in CHANGES.items():

        def decide(facts: Facts, moment: Moment, change: Change = change) -> np.ndarray:
            return network.mix(*change(facts, moment))

        found = np.concatenate([batch.advantages(decide, 0) for batch in batches])
        whole = found if whole is None else whole
        lost = whole - found
        errors = [values.std(ddof=1) / np.sqrt(len(values)) for values in (found, lost)]
        print(f"{name}: {found.mean():+.3f} ± {errors[0]:.3f}; lost {lost.mean():+.3f} ± {errors[1]:.3f}", flush=True)


if __name__ == "__main__":
    main()
