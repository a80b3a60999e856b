"""The stage ``dmagent train-agent plus``: from recorded runs to a checkpoint of `dmagent-plus`.

    calibrate the surrogate -> draw tasks -> several trainings -> choose on validation tasks -> checkpoint and report

Every training is a folder of its own and continues where it stopped. Environments whose question sets serve validation
or the tests of `training.tasks` train nothing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from dmagent_loader._files import write_atomically
from dmagent_loader.agent.plus import checkpoint
from dmagent_loader.agent.plus.network import PlusNetwork
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.plus.calibration import Calibration
from dmagent_loader.training.plus.evolution import EvolutionConfig, Judged, evolve
from dmagent_loader.training.plus.fitting import (
    Fit,
    final_rank_correlation,
    fit,
    fit_rate,
    rank_correlations,
    with_levels,
)
from dmagent_loader.training.plus.report import card, report
from dmagent_loader.training.plus.sampling import TaskSource
from dmagent_loader.training.plus.scores import Scores, score
from dmagent_loader.training.plus.surrogate import joined
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.run_folder import claim

logger = logging.getLogger(__name__)

VALIDATION_KEEP = ("commonsenseqa",)
TEST_KEEP, TEST_ACQUIRE = ("hellaswag", "arc", "boolq"), ("mbpp", "humaneval")
"""Question sets of environments that are left for validation and for tests, as in `training.tasks.axes`."""
RESULT = "dmagent-plus"
TRAININGS = "trainings"
"""Folder of the results: the checkpoint of each training, by its number."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Tasks of one number of decisions.

    Args:
        decisions: Number of decisions.
        tasks: Number of tasks.
        batch: Tasks of a batch; tasks with similar numbers of domains share one.
    """

    decisions: int
    tasks: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class PlusConfig:
    """Settings of the whole stage.

    Args:
        trainings: Number of trainings, with seeds from 0.
        evolution: Settings of each.
        train: Training tasks.
        judged: Validation tasks, and as many test tasks.
        seed: Seed of the tasks.
    """

    trainings: int = 10
    evolution: EvolutionConfig = field(default_factory=EvolutionConfig)
    train: tuple[Bucket, ...] = (
        Bucket(decisions=10, tasks=240, batch=24),
        Bucket(decisions=16, tasks=240, batch=24),
        Bucket(decisions=24, tasks=120, batch=24),
    )
    judged: tuple[Bucket, ...] = (
        Bucket(decisions=10, tasks=96, batch=48),
        Bucket(decisions=24, tasks=96, batch=48),
        Bucket(decisions=80, tasks=48, batch=48),
        Bucket(decisions=200, tasks=24, batch=24),
    )
    seed: int = 0


def split(calibration: Calibration) -> tuple[list[int], list[int], list[int]]:
    """Numbers of the environments for training, validation and test."""
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for number, name in enumerate(calibration.environments):
        keep, acquire = name.split("+")
        is_test = keep in TEST_KEEP or acquire in TEST_ACQUIRE
        parts[2 if is_test else 1 if keep in VALIDATION_KEEP else 0].append(number)
    return parts


@dataclass(frozen=True, kw_only=True)
class PlusTraining:
    """The stage.

    Args:
        config: Settings.
        calibration: File of the calibration record.
        record: Recorded trajectories, for the rate.
        output: Folder of all results.
        notes: Further Markdown sections of the card.
    """

    config: PlusConfig
    calibration: Path
    record: FeedbackRecord
    output: Path
    notes: str = ""

    def run(self) -> Path:
        """Trains, chooses and saves; returns the folder of the checkpoint.

        Raises:
            StateError: The output folder holds results of other settings or records, or there is no calibration record.
        """
        calibration = Calibration.load(self.calibration)
        train, validation, test = split(calibration)
        directory = self.output / "plus"
        recorded = hashlib.sha256(self.record.trajectories.fingerprint.encode() + self.record.feedback.tobytes())
        origin = {
            "calibration": hashlib.sha256(self.calibration.read_bytes()).hexdigest(),
            "record": recorded.hexdigest(),
        }
        claim(directory, {**asdict(self.config), **origin}, "trainings")
        constants, rate, checks = self._calibrated(calibration, train, validation + test)
        tasks = self._judged(calibration, constants, rate, train, self.config.train, 0)
        logger.info("drew %d batches of training tasks", len(tasks))
        networks = [self._trained(tasks, seed, directory) for seed in range(self.config.trainings)]
        constants = with_levels(constants, calibration)
        scores: dict[str, list[Scores]] = {}
        for number, (name, members) in enumerate((("validation", validation), ("test", test)), start=1):
            judged = self._judged(calibration, constants, rate, members, self.config.judged, number)
            everyone = [PlusNetwork.untrained(0), *networks]
            scores[name] = [score(network, judged) for network in everyone]
        order = np.argsort([own.mean() for own in scores["validation"][1:]])
        chosen, median = int(order[-1]), int(order[(len(order) - 1) // 2])
        result = self.output / RESULT
        text = report(checks, scores, chosen, median)
        write_atomically(self.output / "plus.md", text.encode())
        for number, network in enumerate(networks):
            checkpoint.save(network, self.output / TRAININGS / str(number))
        checkpoint.save(networks[chosen], result, card=card(networks[chosen], text, self.notes))
        return result

    def _calibrated(
        self, calibration: Calibration, train: Sequence[int], held_out: Sequence[int]
    ) -> tuple[Fit, FloatArray, dict[str, float]]:
        """Constants, rate of a step, and rank correlations on runs that were not fitted."""
        constants = fit(calibration, train)
        ranks = rank_correlations(calibration, constants, held_out).mean(axis=0)
        starts = self.record.trajectories.starts
        bases = []
        for base in np.unique(starts):
            without = fit_rate(self.record, np.flatnonzero(starts != base))
            bases.append(final_rank_correlation(self.record, without, np.flatnonzero(starts == base)))
        share = np.mean(bases, axis=0)
        rate = fit_rate(self.record, np.arange(len(starts))).rate
        checks = {
            "keep, environments held out": float(ranks[0]),
            "acquire, environments held out": float(ranks[1]),
            "keep, base models held out": float(share[0]),
            "acquire, base models held out": float(share[1]),
        }
        for name, value in checks.items():
            logger.info("rank correlation of final gains, %s: %.2f", name, value)
        return constants, rate, checks

    def _judged(
        self,
        calibration: Calibration,
        constants: Fit,
        rate: FloatArray,
        environments: Sequence[int],
        buckets: Sequence[Bucket],
        number: int,
    ) -> list[Judged]:
        source = TaskSource(calibration=calibration, constants=constants, rate=rate, environments=environments)
        found = []
        for bucket in buckets:
            first = 1_000_000 * number + 100_000 * self.config.seed
            tasks = [source.batch(1, bucket.decisions, first + i) for i in range(bucket.tasks)]
            tasks.sort(key=lambda part: part.facts.prior.shape[-1])
            groups = [tasks[i : i + bucket.batch] for i in range(0, len(tasks), bucket.batch)]
            found += [Judged.of(joined(group)) for group in groups]
        return found

    def _trained(self, tasks: Sequence[Judged], seed: int, directory: Path) -> PlusNetwork:
        def told(generation: int, utility: float) -> None:
            if (generation + 1) % 10 == 0:
                logger.info("training %d, generation %d: utility %.4f", seed, generation + 1, utility)

        return evolve(tasks, self.config.evolution, seed, directory / f"seed-{seed}", on_generation=told)
