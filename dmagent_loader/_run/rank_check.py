"""The check that all ranks of a run agree: at the start, at each decision, and at a restore."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from dmagent_loader import _distributed as distributed
from dmagent_loader._run.settings import RunSettings
from dmagent_loader.errors import RankError


def together(step: str, settings: Callable[[], RunSettings], rank: int) -> AbstractContextManager[dict[str, Any]]:
    """`distributed.together` for a step of a run, whose settings must be the same on all ranks.

    Args:
        step: Name of the step, for messages.
        settings: Function that returns the settings of the run on this rank; called only if there are several ranks.
        rank: Data-parallel rank of this process.

    Raises:
        RankError: Another rank failed, differs, is at another step, or does not answer.
    """
    return _together(step, settings, rank) if distributed.is_active() else nullcontext({})


@contextmanager
def _together(step: str, settings: Callable[[], RunSettings], rank: int) -> Iterator[dict[str, Any]]:
    """`together` with several ranks."""
    with distributed.together(step) as facts:
        facts |= settings().to_compare()
        yield facts
    check_ranks(step, rank, settings().world_size)


def digest(value: Any) -> str:
    """A short text that differs between different values."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def check_ranks(step: str, rank: int, world_size: int) -> None:
    """Checks that every data-parallel rank has a process. Several may share one, each with a part of one model.

    Raises:
        RankError: No process has one of the ranks.
    """
    if not distributed.is_active():
        return
    ranks = distributed.all_gather_object(rank, step)
    missing = sorted(set(range(world_size)) - set(ranks))
    if missing:
        raise RankError(
            f"{step}: no process has data-parallel rank {', '.join(map(str, missing[:8]))} of {world_size} "
            f"(the processes have {ranks[:16]}), so its samples would never be trained on: pass each process its own "
            "rank= and the same world_size=, or neither"
        )
