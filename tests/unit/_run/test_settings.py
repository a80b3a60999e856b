"""Every setting of a run says what a restore does about another value, and the restore does it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from samplers import logged

from dmagent_loader._loading.config import LoaderSettings
from dmagent_loader._run.decisions import Decider, DecisionConfig
from dmagent_loader._run.segments import RunData, SegmentWriter
from dmagent_loader._run.settings import RESTORE, RunSettings
from dmagent_loader._run.state import RestoredState, read_state, write_state
from dmagent_loader.errors import StateError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.ledger import LedgerEntry
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.policies import GuardConfig, StaticPolicy

SETTINGS = RunSettings(
    seed=0,
    domains=("source/web", "target/math"),
    domain_fields=("source", "target"),
    exhausted=("repeat", "stop"),
    shuffle_window=8192,
    shuffle_shards=4,
    packing=None,
    fingerprint="ab" * 32,
    samples_per_reweight=32,
    policy="static",
    guard=GuardConfig(),
    shadow=False,
    history_mix="achieved",
    on_bad_row="raise",
    start_state="0123456789abcdef",
    own_shards=False,
    world_size=2,
    loader=LoaderSettings(batch_size=4, samples_per_fetch=4),
)
OTHER: dict[str, Any] = {
    "seed": 1,
    "domains": ("source/web", "target/code"),
    "domain_fields": ("source", "law"),
    "exhausted": ("repeat", "error"),
    "shuffle_window": 1,
    "shuffle_shards": 8,
    "packing": "rows of 16 tokens",
    "fingerprint": "cd" * 32,
    "samples_per_reweight": 64,
    "policy": "another",
    "guard": GuardConfig(max_change=0.1),
    "shadow": True,
    "history_mix": "requested",
    "on_bad_row": "skip",
    "start_state": "fedcba9876543210",
    "own_shards": True,
    "world_size": 4,
    "loader": LoaderSettings(batch_size=2, samples_per_fetch=2),
}
"""Another value of each setting."""
BY_RULE = {rule: [name for name, its in RESTORE.items() if its == rule] for rule in ("refuse", "warn", "free")}

Restore = Callable[[RunSettings], RestoredState]


@pytest.fixture
def restore() -> Restore:
    """Restores a run that was saved with `SETTINGS` with other settings."""
    plan = Plan(DomainSpace.from_names(SETTINGS.domains), [np.array([30]), np.array([20])], seed=0)
    plan.append(LedgerEntry(start=0, mix=(0.5, 0.5), decided_by="initial", decided_at=0))
    decider = Decider.configured(DecisionConfig(), StaticPolicy([0.5, 0.5]), plan, np.array([1.0, 0.0]))
    segments = {**SegmentWriter(plan, None).to_json(), "first_fingerprint": SETTINGS.fingerprint}
    bad_rows: dict[str, Any] = {"counts": {}, "replaced": []}
    state = json.loads(json.dumps(write_state(SETTINGS, decider, 12, segments, bad_rows)))
    present = RunData(space=plan.space, rules=plan.rules, shuffle=plan.shuffle, shards=plan.shards)
    return lambda settings: read_state(state, settings, decider, present)


def test_every_setting_has_a_rule_and_is_tried_here():
    assert set(OTHER) == set(RESTORE) == {entry.name for entry in dataclasses.fields(RunSettings)}
    assert sorted(name for names in BY_RULE.values() for name in names) == sorted(RESTORE)


def test_a_restore_with_the_same_settings_is_silent(restore: Restore, caplog: pytest.LogCaptureFixture) -> None:
    assert restore(SETTINGS).consumed == 12
    assert caplog.text == ""


@pytest.mark.parametrize("name", BY_RULE["refuse"])
def test_a_setting_that_changes_the_order_of_samples_is_refused(restore: Restore, name: str) -> None:
    with pytest.raises(StateError, match="another shard set" if name == "fingerprint" else name):
        restore(dataclasses.replace(SETTINGS, **{name: OTHER[name]}))


@pytest.mark.parametrize("name", BY_RULE["warn"])
def test_a_setting_that_changes_decisions_is_warned_of(
    restore: Restore, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert restore(dataclasses.replace(SETTINGS, **{name: OTHER[name]})).consumed == 12
    assert len(logged(caplog, f"{name} {getattr(SETTINGS, name)!r}, but this run has {OTHER[name]!r}")) == 1


@pytest.mark.parametrize("name", BY_RULE["free"])
def test_a_setting_that_is_free_may_change(restore: Restore, name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert restore(dataclasses.replace(SETTINGS, **{name: OTHER[name]})).consumed == 12
    assert caplog.text == ""


def test_a_state_carries_what_is_compared_at_a_restore_and_ranks_compare_everything():
    saved = SETTINGS.saved()
    assert set(saved) == {*BY_RULE["refuse"], *BY_RULE["warn"]}
    assert json.loads(json.dumps(saved)) == saved
    compared = SETTINGS.to_compare()
    assert len(compared) == len(RESTORE)
    for name, value in OTHER.items():
        other = dataclasses.replace(SETTINGS, **{name: value}).to_compare()
        assert sum(str(other[key]) != str(compared[key]) for key in compared) == 1, name
