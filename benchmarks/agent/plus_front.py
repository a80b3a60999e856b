"""Pareto front of `dmagent-plus` over its balance, on surrogate tasks, and what a floor holds.

    python -m benchmarks.agent.plus_front --agent dmagent-plus --output docs/images/plus-front.png

Gains are shares of the attainable range against the natural mix with 30% target, means over the surrogate tasks of test
environments; the target shares of the influence policy and of the natural mix vary for comparison. For each floor, the
share of tasks that end below it, and the mean gains.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.agent.plus_offline import judged
from dmagent_loader.agent.plus import checkpoint
from dmagent_loader.agent.plus.network import PlusNetwork, corrected
from dmagent_loader.agent.plus.observation import Facts, Moment, horizon_of
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies.plus import PlusPolicy
from dmagent_loader.training.plus.calibration import CALIBRATION, Calibration
from dmagent_loader.training.plus.evolution import Judged
from dmagent_loader.training.plus.surrogate import Decide, rollout, static
from dmagent_loader.training.plus.train import split
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.stages import find_record

matplotlib.use("Agg")
BALANCES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
FLOORS = (0.0, 0.02, 0.05, 0.1)
SHARES = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)


def mean_gains(batches: list[Judged], decide: Decide) -> FloatArray:
    """Mean gains as shares of the range: (K,)."""
    found = np.concatenate([rollout(b.tasks, decide, 0).gains / b.attainable for b in batches])
    return np.asarray(found.mean(axis=0))


def at_share(share: float) -> Decide:
    """The influence policy with another target share."""
    odds = np.log(share / (1 - share)) - np.log(0.3 / 0.7)

    def decide(facts: Facts, moment: Moment) -> FloatArray:
        return corrected(facts, np.zeros_like(facts.prior), facts.acquires * odds)

    return decide


def main() -> None:
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agent", default="dmagent-plus")
    parser.add_argument("--calibration", type=Path, default=Path("training_record/plus") / CALIBRATION)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    network = checkpoint.load(arguments.agent)[0].in_float32()
    calibration = Calibration.load(arguments.calibration)
    record = FeedbackRecord.load(find_record("recorded-math"))
    batches = judged(calibration, record, split(calibration)[2], 2_500_000)
    fronts: dict[str, list[FloatArray]] = {"dmagent-plus": [], "influence": [], "natural": []}
    for balance in BALANCES:
        own = [
            dataclasses.replace(b, tasks=dataclasses.replace(b.tasks, balance=np.full_like(b.tasks.balance, balance)))
            for b in batches
        ]
        fronts["dmagent-plus"].append(mean_gains(own, network.mix))
    for share in SHARES:
        fronts["influence"].append(mean_gains(batches, at_share(share)))
        natural = [rollout(b.tasks, static(b.tasks.natural_at(share)), 0).gains / b.attainable for b in batches]
        fronts["natural"].append(np.concatenate(natural).mean(axis=0))
    reference = np.array(fronts["natural"][SHARES.index(0.3)])
    fronts = {name: [point - reference for point in points] for name, points in fronts.items()}
    for name, points in fronts.items():
        labels = BALANCES if name == "dmagent-plus" else SHARES
        for label, point in zip(labels, points, strict=True):
            print(f"{name} {label:g}: keep {point[0]:+.3f}, acquire {point[1]:+.3f}")
    for floor in FLOORS:
        found = np.concatenate([_floored(b, network, floor) for b in batches])
        losses = found[:, 2]
        print(
            f"floor {floor:g}: keep {found[:, 0].mean() - reference[0]:+.3f}, acquire "
            f"{found[:, 1].mean() - reference[1]:+.3f}; below the floor {(losses > floor).mean():.0%}, "
            f"by more than 0.02 nats {(losses > floor + 0.02).mean():.0%}"
        )
    figure, axis = plt.subplots(figsize=(6, 4.2))
    for name, points in fronts.items():
        x, y = np.array(points).T
        axis.plot(x, y, marker="o", markersize=4, label=name)
    axis.set_xlabel("gain of the field to keep against natural 30%")
    axis.set_ylabel("gain of the field to acquire")
    axis.set_title("Surrogate tasks of test environments", fontsize=10)
    axis.set_xlim(-0.8, 0.6)
    axis.set_ylim(-0.5, 0.05)
    axis.legend(frameon=False, loc="lower left")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=110)


def _floored(batch: Judged, network: PlusNetwork, floor: float) -> FloatArray:
    """Gains as shares of the range, and the final loss of the field to keep in nats: (B, 3)."""
    tasks, past = batch.tasks, []
    space = DomainSpace.from_names(["source/a", "target/b"])
    controller = PlusPolicy(network, space, np.array([0.5, 0.5]), floor=floor)

    def decide(facts: Facts, moment: Moment) -> FloatArray:
        if moment.exposure.any():
            past.append(moment.gains[:, 0])
        history = np.stack(past, axis=1) if past else np.zeros((len(tasks), 0, 2))
        balance = [controller.balances(gains, horizon_of(tasks.decisions)) for gains in history]
        return network.mix(facts, dataclasses.replace(moment, balance=np.array(balance, dtype=np.float32)))

    gains = rollout(tasks, decide, 0).gains
    return np.column_stack([gains / batch.attainable, -gains[:, 0]])


if __name__ == "__main__":
    main()
