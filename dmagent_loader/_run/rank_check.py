"""What all ranks of a run must have in common; compared whenever they meet: at the start, a decision, a restore.

Ranks that differ would go on without an error, and train on samples twice or never.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dmagent_loader import _distributed as distributed
from dmagent_loader.errors import RankError

if TYPE_CHECKING:
    from dmagent_loader._run.state import RestoredState
    from dmagent_loader.sampler import AgentWeightedSampler


@contextmanager
def together(sampler: AgentWeightedSampler, step: str) -> Iterator[dict[str, Any]]:
    """`distributed.together` for a step of a sampler, whose settings must be the same on all ranks.

    Raises:
        RankError: Another rank failed, differs, does something else, or does not answer.
    """
    with distributed.together(step) as facts:
        if distributed.is_active():
            facts |= settings(sampler)
        yield facts
    check_ranks(sampler, step)


def settings(sampler: AgentWeightedSampler) -> dict[str, Any]:
    """What decides about samples and mixes besides the ledger: name -> value."""
    decisions, plan = sampler.decisions, sampler.plan
    return {
        "seed": plan.seed,
        "exhausted": plan.rules,
        "shuffle_window": plan.window,
        "world_size": sampler.world_size,
        "samples_per_reweight": sampler.samples_per_reweight,
        "policy": decisions.policy_name,
        "guard": decisions.guard.config,
        "shadow": sampler.shadow,
        "history_mix": decisions.history_mix,
        "start_state": digest(decisions.start_state.tolist()),
        "the loader": sampler.loader,
        "the domains": plan.space.names,
        "the contents of the shards": sampler.fingerprint,
    }


def contents(restored: RestoredState) -> dict[str, Any]:
    """What a saved state says: name -> value."""
    return {
        "the state's consumed samples": restored.consumed,
        "the state's mixes": restored.plan.ledger.summary(),
        "the state's feedback": f"{len(restored.measurements)} steps, digest {digest(restored.measurements)}",
        "the state's start_state": digest(restored.start_state.tolist()),
    }


def digest(value: Any) -> str:
    """A short text that differs where values differ."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def check_ranks(sampler: AgentWeightedSampler, step: str) -> None:
    """Several processes may share a data-parallel rank (they hold parts of one model), but none may be without one.

    Raises:
        RankError: A rank is missing.
    """
    if not distributed.is_active():
        return
    ranks = distributed.all_gather_object(sampler.rank, step)
    missing = sorted(set(range(sampler.world_size)) - set(ranks))
    if missing:
        raise RankError(
            f"{step}: no process has data-parallel rank {', '.join(map(str, missing[:8]))} of {sampler.world_size} "
            f"(the processes have {ranks[:16]}), so that the samples of it would never be trained on: give each "
            "process its own rank= and the same world_size=, or neither"
        )
