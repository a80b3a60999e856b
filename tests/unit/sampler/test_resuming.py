"""A restored run goes on with exactly the samples that were left; a state of another run is refused."""

from __future__ import annotations

import itertools
import json
import logging

import numpy as np
import pytest
from samplers import (
    ROWS,
    assert_an_iterator_stops_when_a_state_is_loaded,
    assert_ranks_may_change_at_a_restore,
    mixed_in_advance,
)

from dmagent_loader import MixingDataLoader, ReadingConfig
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.policies import StaticPolicy
from dmagent_loader.testing import assert_same_after_resume, sample_ids, write_toy_shards


def test_restored_at_every_sample_the_rest_is_exactly_the_same(build):
    assert_same_after_resume(lambda: mixed_in_advance(build()), 150)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (2, 3)])
def test_ranks_may_change_at_restore(build, before, after):
    assert_ranks_may_change_at_a_restore(build, before, after, workers=0)


def test_a_state_after_the_last_batch_which_is_smaller_holds_the_samples_of_all_ranks(build):
    """178 samples on 7 ranks are 8 global batches of 21, and one of 7; a world of one rank can train on the rest."""
    for rank in range(7):
        sampler = build(rank=rank, world_size=7)
        samples = sum(len(batch["__index__"]) for batch in MixingDataLoader(sampler, batch_size=3))
        assert 7 * samples == sampler.end == sampler.frontier == sum(sampler.achieved().values()) == 175
        assert sampler.state_dict()["consumed"] == 175
        assert not list(sampler), "a new pass after the end"
        assert sampler.end == sampler.state_dict()["consumed"] == 175
    resumed = build()
    resumed.load_state_dict(sampler.state_dict())
    assert [sample["__index__"] for sample in resumed] == [175, 176, 177]


def test_an_iterator_in_use_does_not_go_on_after_a_state_was_loaded(build):
    assert_an_iterator_stops_when_a_state_is_loaded(build, workers=0)


def test_the_history_is_that_of_the_state_that_was_loaded_last(build):
    """Counts that a decision remembers belong to one ledger."""

    def run(target):
        sampler = build(policy=StaticPolicy({"source/web": 1 - target, "target/math": target}))
        stream = iter(sampler)
        for step in range(4):
            sampler.reweight({"general": -2.0}, consumed=10 * step)
            list(itertools.islice(stream, 10))
        return sampler

    one, other = run(0.2), run(0.7)
    assert not np.array_equal(one._run.decider.history().mixes, other._run.decider.history().mixes)
    one.load_state_dict(other.state_dict())
    np.testing.assert_array_equal(one._run.decider.history().mixes, other._run.decider.history().mixes)


def test_the_state_is_small_json_and_does_not_grow_with_samples(build):
    sampler = build(exhausted="repeat")
    early = len(json.dumps(sampler.state_dict(consumed=10)))
    late = len(json.dumps(sampler.state_dict(consumed=10_000_000_000)))
    assert late < early + 100
    resumed = build(exhausted="repeat")
    resumed.load_state_dict(sampler.state_dict(consumed=10_000_000_000))
    assert next(iter(resumed))["__index__"] == 10_000_000_000


def test_a_state_ahead_of_what_was_handed_out_is_refused(build):
    sampler = build()
    sample_ids(sampler, 20)
    assert sampler.state_dict(20)["consumed"] == 20
    with pytest.raises(ConfigurationError, match="consumed is 21, but only 20 samples were handed out"):
        sampler.state_dict(21)


def test_a_state_that_could_not_be_loaded_is_not_written(build):
    sampler = build(policy=StaticPolicy({"source/web": 0.5, "target/math": 0.5}))
    sampler.reweight({"general": -1.0}, consumed=0)
    for _ in zip(range(40), sampler, strict=False):
        pass
    sampler.reweight({"general": -1.0}, consumed=40)
    with pytest.raises(StateError, match="consumed is 20, but a decision was made after 40 samples"):
        sampler.state_dict(consumed=20)
    build(policy=StaticPolicy({"source/web": 0.5, "target/math": 0.5})).load_state_dict(sampler.state_dict(consumed=40))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"schema": 99}, "schema 99"),
        ({"seed": 5}, r"seed 5, this run has 0"),
        ({"fingerprint": "0" * 64}, "another shard set"),
        ({"domains": ["source/a"]}, "domains"),
        ({"exhausted": ["stop"] * 4}, "exhausted"),
        ({"shuffle_window": 0}, "shuffle_window"),
        ({"shuffle_shards": "4"}, "shuffle_shards"),
        ({"consumed": -1}, "consumed"),
        ({"consumed": 1e300}, "consumed"),
        ({"counts": {}}, "counts"),
        ({"ledger": []}, "ledger"),
        ({"ledger": [{"start": 0}]}, "entry 0"),
        ({"ledger": None}, "ledger"),
        ({"measurements": [{"consumed": "x"}]}, "feedback"),
        ({"start_state": [1.0]}, "start_state"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(build, damage, message):
    sampler = build()
    state = json.loads(json.dumps({**sampler.state_dict(consumed=7), **damage}))
    sample_ids(sampler, 3)
    with pytest.raises(StateError, match=message):
        sampler.load_state_dict(state)
    assert next(iter(sampler))["__index__"] == 3


def test_a_state_with_a_missing_key_or_of_nothing_is_refused(build):
    state = build().state_dict(consumed=7)
    del state["ledger"]
    with pytest.raises(StateError, match=r"lacks \['ledger'\]"):
        build().load_state_dict(state)
    with pytest.raises(StateError, match="no 'schema'"):
        build().load_state_dict({})


def test_a_state_of_other_shards_is_refused_and_moved_shards_are_not(build, tmp_path):
    state = build().state_dict(consumed=7)
    other = write_toy_shards(tmp_path / "other", {**ROWS, "target/proofs": 21})
    with pytest.raises(StateError, match="another shard set"):
        build(shards=other).load_state_dict(state)
    moved = write_toy_shards(tmp_path / "elsewhere" / "moved", ROWS)
    sampler = build(shards=moved)
    try:
        sampler.load_state_dict(state)
    except StateError:
        pytest.fail("the same shards in another folder must be accepted")


def test_another_start_state_than_the_saved_one_is_warned_of(build, caplog):
    state = build(start_state={"source/web": 1.0}).state_dict()
    with caplog.at_level(logging.WARNING):
        build(start_state={"source/web": 1.0}).load_state_dict(state)
    assert "start_state" not in caplog.text
    with caplog.at_level(logging.WARNING):
        build(start_state={"target/math": 1.0}).load_state_dict(state)
    assert "another start_state" in caplog.text


@pytest.mark.parametrize("data", ["exact", "changed"])
def test_a_run_keeps_its_shuffle_if_none_is_chosen(build, data, caplog):
    """Catches a run that cannot go on without `own_shards`, for example on local disks or a single node."""
    far = build(reading=ReadingConfig(own_shards=True))
    assert far.plan.shuffle != build().plan.shuffle
    sample_ids(far, 40)
    state, rest = far.state_dict(), sample_ids(far)
    near = build()
    near.load_state_dict(state, data=data)
    assert near.plan.shuffle == far.plan.shuffle
    assert sample_ids(near) == rest
    assert "shuffle" not in caplog.text
    near.load_state_dict(build().state_dict(), data=data)
    assert near.plan.shuffle == build().plan.shuffle


@pytest.mark.parametrize(
    ("name", "other"), [("shuffle_window", "shuffle_shards"), ("shuffle_shards", "shuffle_window")]
)
def test_a_chosen_shuffle_is_compared_with_that_of_the_run(build, name, other):
    state = build(reading=ReadingConfig(shuffle_window=16, shuffle_shards=4)).state_dict()
    resumed = build(reading=ReadingConfig(**{name: 2}))
    with pytest.raises(StateError, match=f"{name} {state[name]}, this run has 2"):
        resumed.load_state_dict(state)
    resumed.load_state_dict(state, data="changed")
    loaded = {"shuffle_window": resumed.plan.shuffle.window, "shuffle_shards": resumed.plan.shuffle.shards}
    assert loaded == {name: 2, other: state[other]}
