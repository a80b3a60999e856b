"""Parallel execution of independent units of work: in this process, in several processes, or on a Ray cluster.

The result of a unit does not depend on the worker that computes it, and computing a unit twice gives the same file.

joblib runs the local processes. Its Ray backend is not used: results would arrive only after the last unit, a single
worker would be this process instead of a machine of the cluster, and the data would be sent again with each unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from dmagent_loader._tasks import on_ray
from dmagent_loader.errors import ConfigurationError, require_extra

Result = dict[str, Tensor]


class Units(Protocol):
    """Numbered units of work, picklable."""

    def work(self, number: int) -> Result:
        """Computes one unit, or loads its result if it is already done."""
        ...


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Number and place of the workers.

    Args:
        count: Number of local processes, among which the cores are divided (``OMP_NUM_THREADS`` limits the threads of
            each further); 1: this process. On Ray, the largest number of simultaneous tasks; None: as many as the
            cluster has CPUs and GPUs for.
        backend: ``"local"``: this machine. ``"ray"``: the cluster that `ray.init` finds, or else this machine. The
            machines of the cluster need the same installation. If they do not share the folder of partial results, a
            unit that was interrupted starts from the beginning.
        gpus_per_worker: GPUs that a Ray task requests.

    Raises:
        ConfigurationError: The number of workers is not positive, or the backend is unknown.
    """

    count: int | None = 1
    backend: Literal["local", "ray"] = "local"
    gpus_per_worker: float = 0.0

    def __post_init__(self) -> None:
        if self.backend not in ("local", "ray"):
            raise ConfigurationError(f"unknown backend {self.backend!r}; choose 'local' or 'ray'")
        if (self.count is None and self.backend == "local") or (self.count is not None and self.count < 1):
            raise ConfigurationError(f"{self.count} workers: give a number of at least 1")

    def run(self, units: Units, sizes: Sequence[int], *, progress: bool, description: str = "feedback") -> list[Result]:
        """Computes all units.

        Args:
            units: The work.
            sizes: Number of steps of each unit, for the progress bar.
            progress: Whether to show a bar with an estimate of the time left.
            description: Label of the bar.

        Returns:
            The result of each unit, in order.

        Raises:
            MissingExtraError: joblib or Ray is not installed.
        """
        results: dict[int, Result] = {}
        with tqdm(total=sum(sizes), desc=description, unit="step", disable=not progress, smoothing=0.1) as bar:
            for number, result in self.results(units, len(sizes)):
                results[number] = result
                bar.update(sizes[number])
        return [results[number] for number in range(len(sizes))]

    def results(self, units: Units, count: int) -> Iterator[tuple[int, Result]]:
        """Number and result of each unit, in the order in which they finish.

        The first failure is raised at once and ends the other workers. A local process that is killed is a failure; a
        Ray task whose process is killed is repeated up to three times.

        Args:
            units: The work.
            count: Number of units.

        Raises:
            MissingExtraError: joblib or Ray is not installed.
        """
        if self.backend == "ray":
            found = on_ray(_on_one_thread, range(count), units, self.count, self.gpus_per_worker)
            return (result for _, result in found)
        joblib = require_extra("joblib", "rl")
        # A unit takes minutes or hours: batches of several would only delay results.
        parallel = joblib.Parallel(n_jobs=self.count, batch_size=1, return_as="generator_unordered")
        results: Iterator[tuple[int, Result]] = parallel(joblib.delayed(_work)(units, n) for n in range(count))
        return results


def _work(units: Units, number: int) -> tuple[int, Result]:
    return number, units.work(number)


def _on_one_thread(number: int, units: Units) -> tuple[int, Result]:
    torch.set_num_threads(1)
    return _work(units, number)
