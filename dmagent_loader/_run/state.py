"""The saved state of a run: a small JSON object, checked against the run that loads it."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from dmagent_loader._files import write_atomically
from dmagent_loader._loading.bad_rows import SavedBadRows
from dmagent_loader._run.decisions import Decider, Measurement, measurements_from_json
from dmagent_loader._run.differences import differences
from dmagent_loader._run.rank_check import digest
from dmagent_loader._run.segments import RunData, read_segments, rebuild
from dmagent_loader._run.settings import RESTORE, RunSettings
from dmagent_loader._validation import is_count, is_finite_number, read_regular, shown
from dmagent_loader.errors import ConfigurationError, DomainError, MixError, StateError
from dmagent_loader.mixture.plan import Plan, carried_mix
from dmagent_loader.mixture.rest_of_pass import ShardSet
from dmagent_loader.mixture.shuffle import Shuffle
from dmagent_loader.mixture.simplex import FloatArray, validate_mix
from dmagent_loader.policies import InformedPolicy

logger = logging.getLogger(__name__)

SCHEMA = 7
"""Version of the entries and of the order of samples: a change of either needs another number."""
MAX_STATE_BYTES = 1 << 32

Data = Literal["exact", "changed"]

_RUN = {"consumed", "counts", "start_state", "fields", "measurements", "policy_failures", "bad_rows"}
_SHUFFLE = ("shuffle_window", "shuffle_shards")
_SEGMENTS = {"begin", "shards", "ledger", "earlier_segments", "first_fingerprint"}
_CONTINUE = "load_state_dict(state, data='changed') (with a trainer: AgentWeightedSampler(data='changed'))"
_PREVIEW = "`dmagent state STATE --shards MANIFEST` says what that does"
_POLICY_STATE = "policy_state"
"""Key of the state of an informed policy; only states of runs with such a policy have it."""
_KEYS = {"schema", *_RUN, *_SEGMENTS, *(name for name, restore in RESTORE.items() if restore != "free")}


def validated_data(value: Any) -> Data:
    """How to load a state, as passed by a user.

    Raises:
        ConfigurationError: There is no such way.
    """
    if value not in get_args(Data):
        raise ConfigurationError(f"data is {shown(value)}; choose one of {list(get_args(Data))}")
    return value  # type: ignore[no-any-return]


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
    first_fingerprint: str
    """Fingerprint of the data with which the run began."""
    earlier: str
    """Digest of the earlier segments."""
    policy_state: Mapping[str, Any] | None = None

    def to_compare(self) -> dict[str, Any]:
        """Contents that must be the same on all ranks: name -> value."""
        return {
            "the state's consumed samples": self.consumed,
            "the state's mixes": self.plan.ledger.summary(),
            "the state's earlier data": self.earlier,
            "the state's feedback": f"{len(self.measurements)} steps, digest {digest(self.measurements)}",
            "the state's start_state": digest(self.start_state.tolist()),
            "the state of the policy": digest(json.dumps(self.policy_state)),
        }


def write_state(
    settings: RunSettings, decider: Decider, consumed: int, segments: Mapping[str, Any], bad_rows: Mapping[str, Any]
) -> dict[str, Any]:
    """The state of a run after `consumed` samples, as JSON values.

    Args:
        settings: Settings of the run.
        decider: Decider of the run, with its plan.
        consumed: Samples consumed over all ranks.
        segments: `SegmentWriter.to_json` of the plan.
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
    if consumed < plan.begin:
        raise StateError(
            f"consumed is {consumed}, but the data changed after {plan.begin} samples: use the state of the run "
            "before that change"
        )
    measured = decider.measurements
    if measured and consumed < measured[-1].consumed:
        raise StateError(
            f"consumed is {consumed}, but a decision was made after {measured[-1].consumed} samples, so no run could "
            "resume from this state: count the samples of all ranks since the run began"
        )
    return {
        "schema": SCHEMA,
        **settings.saved(),
        "consumed": int(consumed),
        "counts": plan.drawn(consumed),
        "start_state": decider.start_state.tolist(),
        **segments,
        "fields": list(decider.fields),
        "measurements": decider.to_json(),
        "policy_failures": decider.failures,
        "bad_rows": bad_rows,
        **({} if decider.policy_state is None else {_POLICY_STATE: decider.policy_state}),
    }


def read_state(
    state: Mapping[str, Any], settings: RunSettings, decider: Decider, present: RunData, data: Data = "exact"
) -> RestoredState:
    """Checks a saved state against a run and rebuilds its plan.

    Args:
        state: Return value of `write_state`.
        settings: Settings of this run.
        decider: Decider of this run, with its plan and start state.
        present: Data of this run.
        data: ``"exact"`` refuses a state of other data or settings; ``"changed"`` begins a new segment of the plan.

    Raises:
        StateError: The state belongs to another run, or cannot be read; the message names the difference.
    """
    _check_keys(state)
    saved_settings = settings.saved()
    saved_settings |= {name: state[name] for name in _SHUFFLE if saved_settings[name] is None}
    different = {name for name in RESTORE if name in saved_settings and state[name] != saved_settings[name]}
    refused = [name for name in RESTORE if name in different and RESTORE[name] == "refuse"]
    if refused and (data == "exact" or "seed" in refused):
        raise StateError(_refusal(refused[0], state, saved_settings, present))
    segments = read_segments(state)
    present = _shuffled(present, saved_settings)
    if not refused and not _same_shards(segments[-1].shards, present.shards):
        raise StateError("the state's shards contradict its fingerprint: it is damaged or edited; load an older one")
    restored = _restored(state, rebuild(segments, settings.seed, None if refused else present))
    for name in (name for name in RESTORE if name in different and RESTORE[name] == "warn"):
        if name == "samples_per_reweight" and None in (state[name], saved_settings[name]):
            continue  # one of the two follows the other
        logger.warning(
            "the state was saved with %s %s, but this run has %r: decisions will differ",
            name,
            shown(state[name]),
            saved_settings[name],
        )
    replaced: list[str] = []
    if refused:
        restored = _with_changed_data(restored, present)
        found = differences(segments[-1], present)
        summary, replaced = found.summary(), found.replaced
        if "packing" in refused:
            packings = (str(packing) for packing in (state["packing"], saved_settings["packing"]))
            summary = f"the packing was {' and is '.join(packings)}, so all documents are packed anew; {summary}"
        logger.warning("the run continues with changed data from sample %d on: %s", restored.consumed, summary)
    elif not np.allclose(restored.start_state, decider.start_state, rtol=0, atol=1e-9):
        logger.warning("the state was saved with another start_state than that of this run: the saved one is used")
    policy_state = _policy_state(state, decider, are_data_changed=bool(refused), replaced=replaced)
    return replace(restored, policy_state=policy_state)


def rebuild_state(state: Any) -> RestoredState:
    """Rebuilds a run from its saved state alone, without shards and policy.

    Args:
        state: Return value of `write_state`.

    Raises:
        StateError: The state cannot be read.
    """
    _check_keys(state)
    if not is_count(state["seed"]):
        raise StateError(f"the state's seed is {shown(state['seed'])}, not a number: it is damaged; load an older one")
    restored = _restored(state, rebuild(read_segments(state), state["seed"]))
    return replace(restored, policy_state=state.get(_POLICY_STATE))


def _with_changed_data(restored: RestoredState, present: RunData) -> RestoredState:
    """A restored run with a new segment."""
    before = restored.plan
    plan = before.changed(
        restored.consumed, present.space, present.shards, rules=present.rules, shuffle=present.shuffle
    )
    start_state = carried_mix(restored.start_state, before.space.domains, plan.space, plan.num_rows)
    return replace(restored, plan=plan, start_state=start_state)


def _restored(state: Mapping[str, Any], plan: Plan) -> RestoredState:
    """The contents of a state with all its keys, after all checks; without the state of the policy.

    Args:
        state: The state.
        plan: Plan of its segments.

    Raises:
        StateError: The state is damaged.
    """
    consumed, start_state = _checked_consumed(state, plan), _start_state(state, plan)
    failures, first = state["policy_failures"], state["first_fingerprint"]
    if not is_count(failures):
        raise StateError(f"the state's policy_failures is {shown(failures)}, not a count: it is damaged")
    interval = state["samples_per_reweight"]
    if interval is not None and not (is_count(interval) and interval > 0):
        raise StateError(
            f"the state's samples_per_reweight is {shown(interval)}, not a number of samples: it is damaged"
        )
    if not isinstance(first, str):
        raise StateError(f"the state's first_fingerprint is {shown(first)}, not a text: it is damaged")
    return RestoredState(
        plan=plan,
        consumed=consumed,
        start_state=start_state,
        measurements=measurements_from_json(state["measurements"], state["fields"], consumed),
        policy_failures=failures,
        samples_per_reweight=interval,
        bad_rows=SavedBadRows.from_json(state["bad_rows"], consumed),
        first_fingerprint=first,
        earlier=digest(json.dumps([state["begin"], state["earlier_segments"]])),
    )


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


def _refusal(key: str, state: Mapping[str, Any], settings: Mapping[str, Any], present: RunData) -> str:
    """The message for a state of other data or settings."""
    if key == "fingerprint":
        try:
            found = differences(read_segments(state)[-1], _shuffled(present, settings)).summary()
        except StateError:
            found = f"its fingerprint is {shown(state[key])}, the one of this run {shown(settings[key])}"
        return (
            f"the state belongs to another shard set: {found}; load it with the shards of the run (their folder may "
            f"differ), or continue with those of this one by {_CONTINUE}; {_PREVIEW}"
        )
    if key == "packing":
        return (
            f"the state is of a run with packing {state[key]}, this run has {settings[key]}: the documents would be "
            "cut into other rows; build the sampler with the saved tokenizer and length (pack=PackText(...)), or pack "
            f"all documents anew by {_CONTINUE}"
        )
    message = (
        f"the state is of a run with {key} {shown(state[key])}, this run has {shown(settings[key])}: another value "
        "would change the order of samples; build the sampler with the saved value"
    )
    return message if key == "seed" else f"{message}, or continue with this one by {_CONTINUE}; {_PREVIEW}"


def _shuffled(present: RunData, settings: Mapping[str, Any]) -> RunData:
    """The data of a run with a shuffle, which may be that of the state."""
    return replace(present, shuffle=Shuffle(window=settings["shuffle_window"], shards=settings["shuffle_shards"]))


def _same_shards(one: ShardSet, other: ShardSet) -> bool:
    return len(one.rows) == len(other.rows) and all(
        np.array_equal(a, b) for a, b in zip([*one.rows, *one.contents], [*other.rows, *other.contents], strict=True)
    )


def _checked_consumed(state: Mapping[str, Any], plan: Plan) -> int:
    """The consumed samples of a state, after the check that its counts follow from its plan."""
    consumed, counts = state["consumed"], state["counts"]
    valid = is_count(consumed) and consumed >= plan.begin
    end = plan.ends_by(consumed) if valid else None
    if not valid or (end is not None and consumed > end):
        raise StateError(
            f"the state's consumed is {shown(consumed)}, which is not an index of this run: the state is damaged or "
            "was edited; load an older one"
        )
    expected = plan.drawn(consumed)
    if counts != expected:
        raise StateError(
            f"the state's counts at sample {consumed} do not follow from its ledger (differences: "
            f"{shown([n for n in expected if not isinstance(counts, Mapping) or counts.get(n) != expected[n]])}): "
            "it is damaged, or was written by a version with another order of samples; load an older state, or install "
            "that version"
        )
    return int(consumed)


def _start_state(state: Mapping[str, Any], plan: Plan) -> FloatArray:
    weights = state["start_state"]
    if not isinstance(weights, list) or not all(map(is_finite_number, weights)):
        raise StateError(f"the state's start_state is {shown(weights)}, not a list of numbers: the state is damaged")
    try:
        return validate_mix(weights, plan.space.names)
    except MixError as error:
        raise StateError(f"the state's start_state is not a mix: {error}") from error


def _policy_state(
    state: Mapping[str, Any], decider: Decider, *, are_data_changed: bool, replaced: list[str]
) -> Mapping[str, Any] | None:
    """The saved state as a copy of the policy loads it; None: it is another policy, or has no state.

    The policy itself then finds nothing in it to warn of again.

    Args:
        state: The saved state.
        decider: Decider of this run.
        are_data_changed: Whether the run continues with other data.
        replaced: Domains that have kept their names, but no row.

    Raises:
        StateError: The policy cannot load it.
    """
    saved, policy = state.get(_POLICY_STATE), decider.policy
    if saved is None or state["policy"] != decider.policy_name or not isinstance(policy, InformedPolicy):
        return None
    reason = f"no row is left of {shown(replaced)}" if replaced else None
    trial = copy.deepcopy(policy)
    try:
        trial.load_state_dict(saved)
    except DomainError as error:
        if not are_data_changed:
            raise
        reason = str(error)
    if reason is None:
        return trial.state_dict()
    logger.warning(
        "the evidence of policy %r is not about all domains of this run (%s): it is collected again before the "
        "next decision",
        decider.policy_name,
        reason,
    )
    return None


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
