"""The saved state of a run: a small JSON object, checked against the run that loads it."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dmagent_loader._files import write_atomically
from dmagent_loader._loading.bad_rows import SavedBadRows
from dmagent_loader._run.decisions import Decider, Measurement, measurements_from_json
from dmagent_loader._run.rank_check import digest
from dmagent_loader._run.settings import RESTORE, RunSettings
from dmagent_loader._validation import is_count, is_finite_number, read_regular, shown, whole_number
from dmagent_loader.errors import ConfigurationError, EmptyShardError, MixError, StateError
from dmagent_loader.mixture.domains import Domain, DomainSpace
from dmagent_loader.mixture.ledger import Ledger
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.mixture.simplex import FloatArray, validate_mix
from dmagent_loader.policies import InformedPolicy

logger = logging.getLogger(__name__)

SCHEMA = 5
MAX_STATE_BYTES = 1 << 32
MAX_ROWS = 1 << 62

_RUN = {"rows", "consumed", "counts", "start_state", "ledger", "fields", "measurements", "policy_failures", "bad_rows"}
_POLICY_STATE = "policy_state"
"""Key of the state of an informed policy; only states of runs with such a policy have it."""
_KEYS = {"schema", *_RUN, *(name for name, restore in RESTORE.items() if restore != "free")}


@dataclass(frozen=True, kw_only=True)
class RestoredState:
    """Contents of a saved state, after all checks."""

    plan: Plan
    consumed: int
    start_state: FloatArray
    measurements: list[Measurement]
    policy_failures: int
    samples_per_reweight: int | None
    bad_rows: SavedBadRows
    policy_state: Mapping[str, Any] | None = None

    def to_compare(self) -> dict[str, Any]:
        """Contents that must be the same on all ranks: name -> value."""
        return {
            "the state's consumed samples": self.consumed,
            "the state's mixes": self.plan.ledger.summary(),
            "the state's feedback": f"{len(self.measurements)} steps, digest {digest(self.measurements)}",
            "the state's start_state": digest(self.start_state.tolist()),
            "the state of the policy": digest(json.dumps(self.policy_state)),
        }


def write_state(settings: RunSettings, decider: Decider, consumed: int, bad_rows: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a run after `consumed` samples, as JSON values.

    Args:
        settings: Settings of the run.
        decider: Decider of the run, with its plan.
        consumed: Samples consumed over all ranks.
        bad_rows: `BadRows.to_json` after as many samples.

    Raises:
        StateError: `consumed` contradicts the run.
    """
    plan = decider.plan
    end = plan.ends_by(max(0, consumed))
    if consumed < 0 or (end is not None and consumed > end):
        raise StateError(
            f"consumed is {consumed}, but the run has {end} samples: count the samples of all ranks since the run began"
        )
    measured = decider.measurements
    if measured and consumed < measured[-1].consumed:
        raise StateError(
            f"consumed is {consumed}, but a decision was made after {measured[-1].consumed} samples, so no run could "
            "resume from this state: count the samples of all ranks since the run began"
        )
    counts = plan.counts(consumed)
    return {
        "schema": SCHEMA,
        **settings.saved(),
        "rows": plan.num_rows.tolist(),
        "consumed": int(consumed),
        "counts": {name: int(count) for name, count in zip(plan.space.names, counts, strict=True)},
        "start_state": decider.start_state.tolist(),
        "ledger": plan.ledger.to_json(),
        "fields": list(decider.fields),
        "measurements": decider.to_json(),
        "policy_failures": decider.failures,
        "bad_rows": bad_rows,
        **({} if decider.policy_state is None else {_POLICY_STATE: decider.policy_state}),
    }


def read_state(state: Mapping[str, Any], settings: RunSettings, decider: Decider) -> RestoredState:
    """Checks a saved state against a run and rebuilds its plan.

    Args:
        state: Return value of `write_state`.
        settings: Settings of this run.
        decider: Decider of this run, with its plan and start state.

    Raises:
        StateError: The state belongs to another run, or cannot be read; the message names the difference.
    """
    _check_keys(state)
    plan, present = decider.plan, settings.saved()
    for key in (name for name, restore in RESTORE.items() if restore == "refuse" and state[name] != present[name]):
        if key == "fingerprint":
            raise StateError(
                f"the state belongs to another shard set: its fingerprint is {shown(state[key])}, the one of this run "
                f"{shown(present[key])}; load it with the same shards: names, order, row counts and contents must be "
                "the same (their folder may differ)"
            )
        raise StateError(
            f"the state is of a run with {key} {shown(state[key])}, this run has {shown(present[key])}: a different "
            f"{key} would change the order of samples; build the sampler with the saved value"
        )
    restored = _restored(state, plan.empty_copy())
    for key in (name for name, restore in RESTORE.items() if restore == "warn" and state[name] != present[name]):
        if key == "samples_per_reweight" and None in (state[key], present[key]):
            continue  # one of the two follows the other
        logger.warning(
            "the state was saved with %s %s, but this run has %r: decisions will differ",
            key,
            shown(state[key]),
            present[key],
        )
    if not np.allclose(restored.start_state, decider.start_state, rtol=0, atol=1e-9):
        logger.warning("the state was saved with another start_state than that of this run: the saved one is used")
    return replace(restored, policy_state=_policy_state(state, decider))


def rebuild_state(state: Any) -> RestoredState:
    """Rebuilds a run from its saved state alone, without shards and policy.

    The plan counts the samples of each domain, past and future. It knows the rows of a domain, but not its shards, so
    it cannot locate rows.

    Args:
        state: Return value of `write_state`.

    Raises:
        StateError: The state cannot be read.
    """
    _check_keys(state)
    names, fields, rules, rows = (state[key] for key in ("domains", "domain_fields", "exhausted", "rows"))
    for key, values in (("domains", names), ("domain_fields", fields), ("exhausted", rules), ("rows", rows)):
        valid = is_count if values is rows else _is_text
        if not isinstance(values, list) or len(values) != len(names) or not all(map(valid, values)):
            raise StateError(
                f"the state's {key} is {shown(values)}, not a list with {'a count' if values is rows else 'a text'} "
                "for each domain: it is damaged; load an older one"
            )
    if sum(rows) >= MAX_ROWS:
        raise StateError(f"the state's rows are {shown(rows)}, more than a run can have: it is damaged")
    try:
        space = DomainSpace(tuple(Domain(name=n, field=f) for n, f in zip(names, fields, strict=True)))
        plan = Plan(
            space,
            [np.array([count], dtype=np.int64) for count in rows],
            seed=whole_number("seed", state["seed"]),
            exhausted=dict(zip(names, rules, strict=True)),
            window=whole_number("shuffle_window", state["shuffle_window"], least=1),
        )
    except (ConfigurationError, EmptyShardError) as error:
        raise StateError(f"the state does not describe a run ({error}): it is damaged; load an older one") from error
    return replace(_restored(state, plan), policy_state=state.get(_POLICY_STATE))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _check_keys(state: Any) -> None:
    """Refuses what is not a state of this version; warns of unknown entries."""
    if not isinstance(state, Mapping) or "schema" not in state:
        raise StateError(
            "this is not the state of a sampler: it has no 'schema'; pass the return value of state_dict()"
        )
    if state["schema"] != SCHEMA:
        raise StateError(
            f"the state has schema {shown(state['schema'])}, but this version of dmagent_loader reads schema {SCHEMA}: "
            "install the version that wrote the state"
        )
    missing = sorted(_KEYS - set(state))
    if missing:
        raise StateError(f"the state lacks {missing}: it is damaged or was edited; load an older one")
    unknown = sorted(shown(key) for key in set(state) - _KEYS - {_POLICY_STATE})
    if unknown:
        logger.warning("the state has %s, which this version does not know and ignores", ", ".join(unknown[:10]))


def _restored(state: Mapping[str, Any], plan: Plan) -> RestoredState:
    """The contents of a state with all its keys, after all checks; without the state of the policy.

    Args:
        state: The state.
        plan: Plan of the run, with an empty ledger; it receives the state's mixes.

    Raises:
        StateError: The state is damaged.
    """
    for entry in Ledger.from_json(plan.space.names, state["ledger"]):
        plan.append(entry)
    consumed, counts = state["consumed"], state["counts"]
    valid = is_count(consumed)
    end = plan.ends_by(consumed) if valid else None
    if not valid or (end is not None and consumed > end):
        raise StateError(
            f"the state's consumed is {shown(consumed)}, which is not an index of this run: the state is damaged or "
            "was edited; load an older one"
        )
    interval = state["samples_per_reweight"]
    if interval is not None and not (is_count(interval) and interval > 0):
        raise StateError(
            f"the state's samples_per_reweight is {shown(interval)}, not a number of samples: it is damaged"
        )
    expected = {n: int(c) for n, c in zip(plan.space.names, plan.counts(consumed), strict=True)}
    if counts != expected:
        raise StateError(
            f"the state's counts at sample {consumed} do not follow from its ledger (differences: "
            f"{shown([n for n in expected if not isinstance(counts, Mapping) or counts.get(n) != expected[n]])}): "
            "it is damaged, or was written by a version with another order of samples; load an older state, or install "
            "that version"
        )
    weights = state["start_state"]
    if not isinstance(weights, list) or not all(map(is_finite_number, weights)):
        raise StateError(f"the state's start_state is {shown(weights)}, not a list of numbers: the state is damaged")
    try:
        start_state = validate_mix(weights, plan.space.names)
    except MixError as error:
        raise StateError(f"the state's start_state is not a mix: {error}") from error
    failures = state["policy_failures"]
    if not is_count(failures):
        raise StateError(f"the state's policy_failures is {shown(failures)}, not a count: it is damaged")
    return RestoredState(
        plan=plan,
        consumed=consumed,
        start_state=start_state,
        measurements=measurements_from_json(state["measurements"], state["fields"], consumed),
        policy_failures=failures,
        samples_per_reweight=interval,
        bad_rows=SavedBadRows.from_json(state["bad_rows"], consumed),
    )


def _policy_state(state: Mapping[str, Any], decider: Decider) -> Mapping[str, Any] | None:
    """The saved state of the policy, checked on a copy of it; None: it is another policy, or has no state.

    Raises:
        StateError: The policy cannot load it.
    """
    saved, policy = state.get(_POLICY_STATE), decider.policy
    if saved is None or state["policy"] != decider.policy_name or not isinstance(policy, InformedPolicy):
        return None
    copy.deepcopy(policy).load_state_dict(saved)
    return saved  # type: ignore[no-any-return]


def save_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes a state, or JSON values that contain one, to a file: completely or not at all.

    This is for hand-written loops. A process that is killed while it writes leaves the old file unchanged.

    Args:
        path: The file; its folder must exist.
        state: Return value of `state_dict()` of a sampler or of `Mixing`, alone or among other JSON values.
    """
    write_atomically(path, json.dumps(state, allow_nan=False).encode())


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a file of `save_state`.

    Raises:
        StateError: There is no such file, or it was not written by `save_state`.
    """
    try:
        state = json.loads(read_regular(path, MAX_STATE_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise StateError(
            f"the state {os.fspath(path)} cannot be read ({error}): it is missing, or was not written by save_state, "
            "which never leaves a partial file; resume from an older state"
        ) from error
    if not isinstance(state, dict):
        raise StateError(
            f"the state {os.fspath(path)} holds a JSON {type(state).__name__}, not an object: pass a file written by "
            "save_state"
        )
    return state
