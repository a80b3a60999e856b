"""Runs tasks in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import parent_process
from typing import Any, TypeVar

from dmagent_loader.errors import ShardError
from dmagent_loader.shards.inputs.records import Advance
from dmagent_loader.shards.writing.config import ShardingConfig
from dmagent_loader.shards.writing.packing import TextTokenizer

Task = TypeVar("Task")
Result = TypeVar("Result")
Function = Callable[[Task, TextTokenizer | None, Advance], Result]


def run_tasks(
    function: Function[Task, Result],
    tasks: Sequence[Task],
    config: ShardingConfig,
    tokenizer: TextTokenizer | None,
    workers: int,
    advance: Advance,
) -> Iterator[tuple[Task, Result]]:
    """Yields each task with its result, in the order in which they are done.

    Args:
        function: Function of a task, the tokenizer and `advance`.
        tasks: Tasks, in the order in which they are begun.
        config: Settings, with which a process loads its tokenizer.
        tokenizer: The tokenizer of this process.
        workers: Number of processes; 0 or 1: this process, in which the tokenizer uses all cores by itself.
        advance: Called with the number of bytes or shards done since the last call; in this process only.

    Raises:
        ShardError: A process died.
    """
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield task, function(task, tokenizer, advance)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), multiprocessing.get_context("spawn"), initializer=_start, initargs=(config,)
    )
    try:
        futures = {pool.submit(_run, function, task): task for task in tasks}
        for future in as_completed(futures):
            result, done = future.result()
            advance(done)
            yield futures[future], result
    except BrokenProcessPool as error:
        raise ShardError(
            "a worker process died, perhaps for lack of memory: run the same command again, which goes on where it "
            "stood, with fewer --workers (workers=); a script needs if __name__ == '__main__': around its main part"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_tokenizer: TextTokenizer | None = None


def _start(config: ShardingConfig) -> None:
    """Prepares a worker process."""
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops its workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    if config.tokenizer is not None:
        _tokenizer = TextTokenizer.load(
            config.tokenizer, config.eos_token, parse_special_tokens=config.parse_special_tokens
        )


def _exit_with_parent() -> None:
    """Ends the process when its parent is gone: a killed job leaves no writers behind."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(function: Function[Task, Result], task: Task) -> tuple[Result, int]:
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size

    result: Any = function(task, _tokenizer, advance)
    return result, done
