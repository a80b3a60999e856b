"""Who works off the units of a collection: this process, several processes, or the machines of a Ray cluster.

A unit's result does not depend on who does it, and a unit that is done twice gives the same file.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from dmagent_loader.errors import ConfigurationError, require_extra

Result = dict[str, Tensor]


class Units(Protocol):
    """Numbered units of work, picklable."""

    def work(self, number: int) -> Result:
        """Does one unit, or loads it where it is done."""
        ...


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How many work at once, and where.

    Args:
        count: Processes; with Ray, tasks at once at most, None: as many as the cluster has CPUs (or GPUs) for.
        backend: ``"local"``: processes of this machine. ``"ray"``: the cluster that `ray.init` finds, else this
            machine. Workers on other machines need the same installation; where they do not see the folder of partial
            results, a unit that is broken off begins anew, and nothing else changes.
        gpus_per_worker: With Ray, GPUs that a task asks for.

    Raises:
        ConfigurationError: No worker at all, or an unknown backend.
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
        """Works off all units.

        Args:
            units: The work.
            sizes: Steps of each unit, for the progress bar.
            progress: Whether to show a bar with an estimate of the time left.
            description: In front of the bar.

        Returns:
            The result of each unit, in order.

        Raises:
            MissingExtraError: Ray is asked for and not installed.
        """
        results: dict[int, Result] = {}
        with tqdm(total=sum(sizes), desc=description, unit="step", disable=not progress, smoothing=0.1) as bar:
            for number, result in self._results(units, len(sizes)):
                results[number] = result
                bar.update(sizes[number])
        return [results[number] for number in range(len(sizes))]

    def _results(self, units: Units, count: int) -> Iterator[tuple[int, Result]]:
        if self.backend == "ray":
            return _with_ray(units, count, self)
        if self.count == 1:
            return ((number, units.work(number)) for number in range(count))
        return _with_processes(units, count, self.count or 1)


_units: Units | None = None
"""In a worker process: what it works on, sent once for each process and not with each unit."""


def _with_processes(units: Units, count: int, workers: int) -> Iterator[tuple[int, Result]]:
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    # Spawned: a fork of a process that runs torch threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin, (units, threads)) as pool:
        futures = {pool.submit(_work, number): number for number in range(count)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            # Leaving the pool waits for all that is queued: hours, before a failure would be seen.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(units: Units, threads: int) -> None:
    global _units
    _units = units
    torch.set_num_threads(threads)


def _work(number: int) -> Result:
    assert _units is not None
    return _units.work(number)


def _with_ray(units: Units, count: int, workers: Workers) -> Iterator[tuple[int, Result]]:
    ray = require_extra("ray", "ray")
    if not ray.is_initialized():
        ray.init()

    def task(units: Units, number: int) -> tuple[int, Result]:
        torch.set_num_threads(1)
        return number, units.work(number)

    remote = ray.remote(num_cpus=1, num_gpus=workers.gpus_per_worker, max_retries=3)(task)
    shared = ray.put(units)
    numbers = iter(range(count))
    waiting = [remote.remote(shared, number) for number in itertools.islice(numbers, workers.count or count)]
    try:
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            waiting += [remote.remote(shared, number) for number in itertools.islice(numbers, len(done))]
            for reference in done:
                yield ray.get(reference)
    finally:
        for reference in waiting:
            ray.cancel(reference)
