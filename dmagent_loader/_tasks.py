"""Runs independent tasks in this process, in several, or on a Ray cluster.

A task is picklable, its result does not depend on where it runs, and running it twice, even at the same time, leaves
the same files. So the number and place of the workers do not change the result of a job.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import parent_process
from typing import Any, TypeVar

from dmagent_loader._validation import is_finite_number, shown
from dmagent_loader.errors import ConfigurationError, ShardError, require_extra

Task = TypeVar("Task")
Context = TypeVar("Context")
Result = TypeVar("Result")
Advance = Callable[[int], object]
Function = Callable[[Task, Context, Advance], Result]

_RETRIES = 3
"""Times that Ray repeats a task whose worker died."""
_MOST_SUBMITTED = 1000
"""Tasks that are submitted to Ray at once, which waits in a time that grows with them."""
_SECONDS_TO_CANCEL = 30

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RayWorkers:
    """Workers on a Ray cluster: the one that `ray.init` finds, or else a Ray of this machine.

    The machines need the same installation, and must see the inputs, the output and the working directory under the
    same paths. A task whose worker dies is repeated elsewhere, up to three times.

    Args:
        count: Largest number of simultaneous tasks; None: as many as the cluster has CPUs (and GPUs) for. Each task
            takes one CPU.
        gpus_per_worker: GPUs of a task, for classifiers; without any, a task sees no GPU.

    Raises:
        ConfigurationError: A number cannot be used.
    """

    count: int | None = None
    gpus_per_worker: float = 0.0

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ConfigurationError(f"count={self.count} workers on Ray: it must be at least 1, or None for no limit")
        if not is_finite_number(self.gpus_per_worker) or self.gpus_per_worker < 0:
            raise ConfigurationError(f"gpus_per_worker={shown(self.gpus_per_worker)}: it must be 0 or more")


Workers = int | RayWorkers
"""Number of processes of this machine, or workers on Ray."""


def check_workers(workers: Workers) -> None:
    """Raises ConfigurationError for a negative number of processes."""
    if isinstance(workers, int) and workers < 0:
        raise ConfigurationError(f"workers={workers}: it must be at least 0, which is this process alone")


def run_tasks(
    function: Function[Task, Context, Result],
    tasks: Sequence[Task],
    context: Context,
    workers: Workers,
    advance: Advance,
) -> Iterator[tuple[Task, Result]]:
    """Yields each task with its result, in the order in which they are done.

    Args:
        function: Function of a task, the context and `advance`; importable.
        tasks: Tasks, in the order in which they are begun.
        context: What all tasks need, such as a tokenizer or a classifier; unpickled once by each worker.
        workers: Number of processes, 0 or 1: this one, in which tokenizers use all cores by themselves; or workers on
            Ray.
        advance: Called with what was done since the last call, in the units of the function; in this process only.

    Raises:
        ShardError: A worker died; on Ray, the last of four that tried one task.
        ConfigurationError: The Ray cluster cannot be reached.
        MissingExtraError: Ray is not installed.
    """
    if isinstance(workers, RayWorkers):
        results = _on_cluster(function, tasks, context, workers)
    elif workers > 1 and len(tasks) > 1:
        results = _in_processes(function, tasks, context, min(workers, len(tasks)))
    else:
        for task in tasks:
            yield task, function(task, context, advance)
        return
    for task, (result, done) in results:
        advance(done)
        yield task, result


def _counted(function: Function[Task, Context, Result], task: Task, context: Context) -> tuple[Result, int]:
    """Runs a task in a worker: its result, and the sum of its calls of `advance`."""
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size

    result = function(task, context, advance)
    return result, done


# Processes of this machine

_context: Any = None


def _in_processes(
    function: Function[Task, Context, Result], tasks: Sequence[Task], context: Context, count: int
) -> Iterator[tuple[Task, tuple[Result, int]]]:
    processes = multiprocessing.get_context("spawn")
    stopped, stop = processes.Pipe(duplex=False)
    pool = ProcessPoolExecutor(count, processes, initializer=_start, initargs=(pickle.dumps(context), stopped))
    try:
        futures = {pool.submit(_run, function, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise ShardError(
            "a worker process died, perhaps for lack of memory: run the same command again, with fewer --workers "
            "(workers=); a script needs if __name__ == '__main__': around its main part"
        ) from error
    except BaseException:
        stop.close()  # ends the workers: a task may take hours, and is repeated by the next call
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        stop.close()
        stopped.close()


def _start(context: bytes, stopped: Connection) -> None:
    """Prepares a worker process."""
    global _context
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops its workers
    threading.Thread(target=_exit_with_job, args=(stopped,), daemon=True).start()
    _share_cores()
    _context = pickle.loads(context)


def _exit_with_job(stopped: Connection) -> None:
    """Ends the process when its parent stops the job or is gone: a killed job leaves no writers behind."""
    parent = parent_process()
    wait([stopped] if parent is None else [stopped, parent.sentinel])
    os._exit(1)


def _share_cores() -> None:
    """Keeps tokenizers from starting threads of their own: the workers share the cores already."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _run(function: Function[Task, Any, Result], task: Task) -> tuple[Result, int]:
    return _counted(function, task, _context)


# Ray


def _on_cluster(
    function: Function[Task, Context, Result], tasks: Sequence[Task], context: Context, workers: RayWorkers
) -> Iterator[tuple[Task, tuple[Result, int]]]:
    ray = require_extra("ray", "ray")
    try:
        counted = partial(_counted, function)
        yield from on_ray(counted, tasks, context, workers.count, workers.gpus_per_worker, folder=os.getcwd())
    except ray.exceptions.RayError as error:
        raise ShardError(
            f"a task on Ray failed {1 + _RETRIES} times, because its worker died, perhaps for lack of memory, or could "
            f"not be started ({type(error).__name__}): run the same command again, with fewer --workers"
        ) from error


_contexts: dict[str, Any] = {}
"""Context of the running job, by the id of its Ray object."""


def on_ray(
    function: Callable[[Task, Context], Result],
    tasks: Iterable[Task],
    context: Context,
    limit: int | None,
    gpus: float,
    *,
    folder: str | None = None,
) -> Iterator[tuple[Task, Result]]:
    """Yields each task with its result, in the order in which they are done, from the cluster that `ray.init` finds.

    The first failure is raised as in this process, and the other tasks are cancelled.

    Args:
        function: Function of a task and the context.
        tasks: Tasks, in the order in which they are begun.
        context: What all tasks need; sent, and unpickled, once for each worker.
        limit: Largest number of simultaneous tasks; None: no limit.
        gpus: GPUs of a task.
        folder: Working directory of the tasks, for relative paths; None: any.

    Raises:
        ConfigurationError: There is no cluster at the address that `ray.init` reads, or none can be started.
        MissingExtraError: Ray is not installed.
        RuntimeError: A task raised an error that cannot be pickled; the message holds its traceback.
        RayError: The workers of a task died `_RETRIES` times and once more (``ray.exceptions``).
    """
    ray = require_extra("ray", "ray")
    if not ray.is_initialized():
        _connect(ray)
    _announce_missing_gpus(ray, gpus)
    # Nested in a list, it is not fetched again for each task. As bytes, it is unpickled where its errors are seen.
    shared = [ray.put(ray.cloudpickle.dumps(context))]
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=_RETRIES)(_with_context)
    remaining = iter(tasks)
    running = {
        remote.remote(function, task, shared, folder): task
        for task in itertools.islice(remaining, limit or _MOST_SUBMITTED)
    }
    try:
        while running:
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            task = running.pop(done)
            running |= {remote.remote(function, task, shared, folder): task for task in itertools.islice(remaining, 1)}
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                if type(error.cause) is ray.exceptions.RayError:  # in place of an error that cannot be pickled
                    raise RuntimeError(f"a task on Ray failed: {error}") from error
                raise error.cause from error
            yield task, result
    finally:
        for reference in running:
            ray.cancel(reference)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=_SECONDS_TO_CANCEL)


def _connect(ray: Any) -> None:
    try:
        ray.init()
    except Exception as error:  # of many kinds
        address = os.environ.get("RAY_ADDRESS")
        raise ConfigurationError(
            f"no Ray cluster could be reached or started, with RAY_ADDRESS={address!r} ({type(error).__name__}: "
            f"{error}): correct RAY_ADDRESS, or unset it for a Ray of this machine"
        ) from error


def _announce_missing_gpus(ray: Any, gpus: float) -> None:
    """Warns of a cluster without the GPUs of a task, on which Ray would wait in silence."""
    found = ray.cluster_resources().get("GPU", 0.0)
    if gpus > found:
        logger.warning(
            "a task needs %g GPUs, and the Ray cluster has %g: tasks wait until a machine with GPUs joins it",
            gpus,
            found,
        )


def _with_context(
    function: Callable[[Task, Context], Result], task: Task, shared: list[Any], folder: str | None
) -> Result:
    ray = require_extra("ray", "ray")
    try:
        if folder is not None:
            os.chdir(folder)
    except OSError as error:
        raise ShardError(
            f"the working directory {folder!r} is not there on a machine of the Ray cluster ({error}): run the command "
            "in a folder that all machines share"
        ) from error
    name = shared[0].hex()
    if name not in _contexts:
        _contexts.clear()
        _share_cores()
        _contexts[name] = pickle.loads(ray.get(shared[0]))
    return function(task, _contexts[name])
