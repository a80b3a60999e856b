"""The saved state of a run: small JSON, checked against the run that it is loaded into."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dmagent_loader.decisions import Measurement, measurements_from_json
from dmagent_loader.errors import MixError, StateError
from dmagent_loader.ledger import Ledger
from dmagent_loader.plan import Plan
from dmagent_loader.simplex import FloatArray, validate_mix

if TYPE_CHECKING:
    from dmagent_loader.sampler import AgentWeightedSampler

logger = logging.getLogger(__name__)

SCHEMA = 2

_KEYS = {
    "schema",
    "seed",
    "domains",
    "fingerprint",
    "exhausted",
    "shuffle_window",
    "consumed",
    "counts",
    "samples_per_reweight",
    "policy",
    "start_state",
    "ledger",
    "measurements",
}


@dataclass(frozen=True, kw_only=True)
class RestoredState:
    """What a saved state says, after all checks."""

    plan: Plan
    consumed: int
    start_state: FloatArray
    measurements: list[Measurement]


def write_state(sampler: AgentWeightedSampler, consumed: int) -> dict[str, Any]:
    """The state of a run after `consumed` samples, as JSON values."""
    plan = sampler.plan
    end = plan.ends_by(max(0, consumed))
    if consumed < 0 or (end is not None and consumed > end):
        raise StateError(f"consumed is {consumed}, but the run has {end} samples")
    counts = plan.counts(consumed)
    return {
        "schema": SCHEMA,
        "seed": plan.seed,
        "domains": list(plan.space.names),
        "fingerprint": sampler.collection.fingerprint,
        "exhausted": list(plan.rules),
        "shuffle_window": plan.window,
        "consumed": int(consumed),
        "counts": {name: int(count) for name, count in zip(plan.space.names, counts, strict=True)},
        "samples_per_reweight": sampler.samples_per_reweight,
        "policy": _policy_name(sampler),
        "start_state": sampler.decisions.start_state.tolist(),
        "ledger": plan.ledger.to_json(),
        "measurements": sampler.decisions.to_json(),
    }


def read_state(
    sampler: AgentWeightedSampler, state: Mapping[str, Any], plan_settings: Mapping[str, Any]
) -> RestoredState:
    """Checks a saved state against a sampler and rebuilds its plan.

    Raises:
        StateError: It belongs to another run, or cannot be understood; the message says what differs.
    """
    if not isinstance(state, Mapping) or "schema" not in state:
        raise StateError("this is not the state of a sampler: it has no 'schema'; pass what state_dict() returned")
    if state["schema"] != SCHEMA:
        raise StateError(
            f"the state has schema {state['schema']!r}, this version of dmagent_loader reads schema {SCHEMA}: "
            "install the version that wrote it"
        )
    missing = sorted(_KEYS - set(state))
    if missing:
        raise StateError(f"the state lacks {missing}: it is damaged or was edited")
    plan = sampler.plan
    present = {
        "seed": plan.seed,
        "domains": list(plan.space.names),
        "exhausted": list(plan.rules),
        "shuffle_window": plan.window,
    }
    for key, value in present.items():
        if state[key] != value:
            raise StateError(
                f"the state is of a run with {key} {_short(state[key])}, this run has {_short(value)}: with another "
                f"{key} the order of samples would be another; build the sampler as it was"
            )
    if state["fingerprint"] != sampler.collection.fingerprint:
        raise StateError(
            f"the state is of another shard set: fingerprint {_short(state['fingerprint'])}, here "
            f"{_short(sampler.collection.fingerprint)}; names, order, row counts and contents of the shards must be "
            "the same (their folder may differ)"
        )
    restored = Plan(plan.space, [sampler.collection.shard_rows(d) for d in range(len(plan.space))], **plan_settings)
    for entry in Ledger.from_json(plan.space.names, state["ledger"]):
        restored.append(entry)
    consumed, counts = state["consumed"], state["counts"]
    whole = isinstance(consumed, int) and consumed >= 0
    end = restored.ends_by(consumed) if whole else None
    if not whole or (end is not None and consumed > end):
        raise StateError(f"the state's consumed is {consumed!r}, which is not an index of this run")
    for key, value in (("samples_per_reweight", sampler.samples_per_reweight), ("policy", _policy_name(sampler))):
        if state[key] != value:
            logger.warning(
                "the state was saved with %s %r, this run has %r: decisions will differ", key, state[key], value
            )
    expected = {n: int(c) for n, c in zip(plan.space.names, restored.counts(consumed), strict=True)}
    if counts != expected:
        raise StateError(
            f"the state's counts at sample {consumed} do not follow from its ledger (differences: "
            f"{_short([n for n in expected if not isinstance(counts, Mapping) or counts.get(n) != expected[n]])}): "
            "it is damaged, or was written by a version with another order"
        )
    try:
        start_state = validate_mix(np.asarray(state["start_state"], dtype=np.float64), plan.space.names)
    except (MixError, TypeError, ValueError) as error:
        raise StateError(f"the state's start_state is not a mix: {error}") from error
    measurements = measurements_from_json(state["measurements"])
    return RestoredState(plan=restored, consumed=consumed, start_state=start_state, measurements=measurements)


def _policy_name(sampler: AgentWeightedSampler) -> str | None:
    policy = sampler.decisions.policy
    return None if policy is None else policy.name


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
