"""What the sampler promises: order, live changes, exact state, clear refusals."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import pickle
import re
import tarfile
import time

import numpy as np
import pytest
import torch
from reading import quiet
from torch.utils.data import DataLoader

from dmagent_loader import AgentWeightedSampler, DecisionConfig, MixingAgent, MixingDataLoader, ReadingConfig
from dmagent_loader.agent import AgentConfig
from dmagent_loader.errors import (
    CheckpointError,
    ConfigurationError,
    DomainError,
    EmptyShardError,
    ExhaustedError,
    FeedbackError,
    MixError,
    ShardNotFoundError,
    StateError,
)
from dmagent_loader.mixture.history import FeedbackStatistics, History
from dmagent_loader.policies import GuardConfig, StaticPolicy
from dmagent_loader.testing import assert_same_after_resume, sample_ids, write_toy_shards

ROWS = {"source/web": 70, "source/books": 40, "target/math": 50, "target/proofs": 20}
CHANGES = [
    {"source/web": 0.1, "source/books": 0.2, "target/math": 0.6, "target/proofs": 0.1},
    {"source/web": 0.5, "source/books": 0.0, "target/math": 0.3, "target/proofs": 0.2},
    {"source/web": 0.0, "source/books": 0.9, "target/math": 0.1, "target/proofs": 0.0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sampler")


@pytest.fixture(scope="module")
def shards(folder):
    return write_toy_shards(folder / "shards", ROWS)


@pytest.fixture
def build(shards, folder):
    def build(**settings):
        settings = {"samples_per_reweight": 32, **settings}
        reading = quiet(folder / "cache", settings.pop("reading", None))
        return AgentWeightedSampler(settings.pop("shards", shards), reading=reading, **settings)

    return build


def mixed_in_advance(sampler):
    """Three mix changes at 30, 60 and 90, written into the ledger as a run would have."""
    from dmagent_loader.mixture.ledger import LedgerEntry

    for number, weights in enumerate(CHANGES, start=1):
        mix = tuple(sampler.space.mix(weights).tolist())
        sampler.plan.append(LedgerEntry(start=30 * number, mix=mix, decided_by="test", decided_at=30 * number))
    return sampler


def test_samples_carry_tags_and_decoded_members(build):
    sample = next(iter(build()))
    assert sample["__index__"] == 0
    assert sample["__domain__"] in ROWS
    row = int(sample["__key__"].rsplit("_", 1)[1])
    assert sample["txt"] == f"row {row} of {sample['__domain__']}"


def test_a_transform_may_drop_the_tags_and_they_come_back(build):
    sample = next(iter(build(transform=lambda sample: {"length": len(sample["txt"])})))
    assert set(sample) == {"__key__", "__domain__", "__index__", "length"}


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_global_batches_do_not_depend_on_world_size(build, world_size):
    """Catches ranks that each sample on their own: their union then has another mix and other rows."""
    whole = sample_ids(mixed_in_advance(build()))
    ranks = [sample_ids(mixed_in_advance(build(rank=r, world_size=world_size))) for r in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1, "a rank has more samples than another"
    merged = [sample for group in zip(*ranks, strict=True) for sample in group]
    assert merged == whole[: len(merged)]
    assert len(whole) - len(merged) < world_size


def test_ranks_may_be_told_after_the_sampler_was_built(build):
    told = build()
    told.bind(rank=1, world_size=3)
    assert sample_ids(told, 20) == sample_ids(build(rank=1, world_size=3), 20)
    with pytest.raises(ConfigurationError, match="181 is larger than the 180 rows"):
        told.bind(rank=0, world_size=181)


@pytest.mark.parametrize("num_workers", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_do_not_depend_on_torch_workers(build, num_workers, world_size):
    """Catches workers that take samples in turn: torch takes whole batches in turn, so the order would change."""

    def batches(workers):
        sampler = mixed_in_advance(build(rank=world_size - 1, world_size=world_size))
        loader = MixingDataLoader(sampler, batch_size=4, num_workers=workers)
        return [list(zip(b["__index__"].tolist(), b["__key__"], strict=True)) for b in loader]

    assert batches(num_workers) == batches(0)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_without_a_loader_batch_deal_single_samples(build):
    loader = MixingDataLoader(build(), batch_size=None, num_workers=2)
    assert [sample["__index__"] for sample in loader] == list(range(len(build())))


def test_restored_at_every_sample_the_rest_is_exactly_the_same(build):
    assert_same_after_resume(lambda: mixed_in_advance(build()), 150)


@pytest.mark.parametrize(("before", "after", "workers"), [(1, 4, 0), (4, 2, 2), (2, 1, 2), (2, 3, 0)])
def test_ranks_and_workers_may_change_at_restore(build, before, after, workers):
    whole = sample_ids(mixed_in_advance(build()))
    consumed = 48
    state = mixed_in_advance(build(rank=0, world_size=before)).state_dict(consumed=consumed)
    ranks = []
    for rank in range(after):
        sampler = build(rank=rank, world_size=after)
        sampler.load_state_dict(json.loads(json.dumps(state)))
        loader = MixingDataLoader(sampler, batch_size=3, num_workers=workers)
        ranks.append([i for batch in loader for i in batch["__index__"].tolist()])
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(itertools.chain(*ranks)) == [
        index for index, _, _ in whole[consumed : consumed + after * len(ranks[0])]
    ]


def test_iterating_again_goes_on_and_gives_nothing_twice(build):
    sampler = build()
    first = sample_ids(sampler, 20)
    second = sample_ids(sampler, 20)
    assert first + second == sample_ids(build(), 40)


def test_a_mix_set_by_hand_holds_from_the_very_next_sample(build):
    sampler = build()
    stream = iter(sampler)
    for weights in CHANGES:
        for _ in range(7):
            next(stream)
        sampler.set_mix(weights)
        assert sampler.mix == pytest.approx(weights)
        seen = [next(stream)["__domain__"] for _ in range(20)]
        for domain, weight in weights.items():
            assert abs(seen.count(domain) - 20 * weight) < 2.5
            assert weight > 0 or domain not in seen


def test_achieved_counts_what_was_given(build):
    sampler = build()
    seen = [domain for _, domain, _ in sample_ids(sampler, 90)]
    assert sampler.achieved() == {domain: seen.count(domain) for domain in ROWS}
    assert sampler.achieved(10, 30) == {domain: seen[10:30].count(domain) for domain in ROWS}


def test_live_changes_reach_running_workers_within_the_declared_bound(build):
    """Catches weights that workers copied when they were forked: the change would never arrive."""
    sampler = build(exhausted="repeat")
    loader = MixingDataLoader(sampler, batch_size=4, num_workers=2, prefetch_factor=2)
    stream, consumed, trained = iter(loader), 0, []
    for step in range(30):
        batch = next(stream)
        trained += list(zip(batch["__index__"].tolist(), batch["__domain__"], strict=True))
        consumed += 4
        if step == 9:
            sampler.reweight_due(consumed)
            entry = sampler.set_mix({"target/proofs": 1.0})
    assert [index for index, _ in trained] == list(range(120))
    assert entry.decided_at == 40
    assert 0 <= entry.staleness <= 2 * 2 * 4
    assert {domain for index, domain in trained if index >= entry.start} == {"target/proofs"}
    assert "source/web" in {domain for index, domain in trained if index >= entry.start - 8 and index < entry.start}


def test_one_worker_has_a_bound_too(build):
    """Catches a bound that is worked out from single samples: the change comes too late for the worker's batch."""
    sampler = build(exhausted="repeat")
    stream, starts = iter(MixingDataLoader(sampler, batch_size=8, num_workers=1)), []
    for step in range(1, 12):
        next(stream)
        sampler.reweight_due(8 * step)
        starts.append(sampler.set_mix(CHANGES[step % 3]).staleness)
    assert set(starts) == {2 * 8}


@pytest.mark.parametrize("persistent", [False, True])
def test_a_new_pass_of_workers_begins_after_what_was_consumed(build, persistent):
    """Catches persistent workers that each go on at a place of their own."""
    sampler = build(exhausted="repeat")
    loader = MixingDataLoader(sampler, batch_size=4, num_workers=2, persistent_workers=persistent)
    for first in (0, 20, 40):
        stream = iter(loader)
        seen = [next(stream)["__index__"].tolist() for _ in range(5)]
        assert [i for batch in seen for i in batch] == list(range(first, first + 20))
        sampler.reweight_due(first + 20)
        del stream


def start_second_worker_late(worker):
    time.sleep(1.0 * worker)


def test_a_worker_that_starts_late_begins_where_the_others_began(build):
    """Catches a worker that begins after what was consumed from the others before it had started."""
    sampler = build(exhausted="repeat")
    loader = MixingDataLoader(sampler, batch_size=4, num_workers=2, worker_init_fn=start_second_worker_late)
    seen = []
    for batch in itertools.islice(loader, 4):
        seen += batch["__index__"].tolist()
        sampler.reweight_due(len(seen))
    assert seen == list(range(16))


def test_persistent_workers_refuse_to_go_on_with_an_older_ledger(build):
    sampler = build(exhausted="repeat")
    loader = MixingDataLoader(sampler, batch_size=4, num_workers=1, persistent_workers=True)
    next(iter(loader))
    sampler.load_state_dict(sampler.state_dict(consumed=4))
    with pytest.raises(StateError, match="rebuild the DataLoader"):
        next(iter(loader))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_iterator_in_use_does_not_go_on_after_a_state_was_loaded(build, num_workers):
    """It would deliver what comes after its own place, and the state would never count it."""
    sampler = build(exhausted="repeat")
    stream = iter(MixingDataLoader(sampler, batch_size=4, num_workers=num_workers))
    for _ in range(3):
        next(stream)
    sampler.load_state_dict(sampler.state_dict(consumed=4))
    with pytest.raises(StateError, match="after load_state_dict"):
        list(itertools.islice(stream, 50))  # a worker has fetched some before
    assert next(iter(sampler))["__index__"] == 4


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"deciding": ReadingConfig()}, "must be a DecisionConfig"),
        ({"samples_per_reweight": "80"}, "samples_per_reweight is '80'"),
        ({"samples_per_reweight": True}, "samples_per_reweight is True"),
        ({"rank": 0, "world_size": 1.5}, "world_size is 1.5"),
        ({"transform": 5}, "transform is 5"),
        ({"policy": object()}, "with a method propose"),
        ({"policy": StaticPolicy}, "with a method propose"),
        ({"agent": 5}, "agent is 5"),
        ({"exhausted": ["stop"]}, "exhausted is"),
        ({"initial_mix": "half"}, "the mix is 'half'"),
        ({"initial_mix": {"source": "a", "target": 1.0}}, "not a list of numbers"),
        ({"initial_mix": {"source": 10**400}}, "not a list of numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_setting_of_another_type_is_refused_by_name(build, setting, message):
    with pytest.raises((ConfigurationError, MixError), match=re.escape(message)):
        build(**setting)


@pytest.mark.parametrize(
    ("config", "setting", "message"),
    [
        (ReadingConfig, {"shuffle_window": 1.5}, "shuffle_window is 1.5"),
        (ReadingConfig, {"shuffle_window": float("nan")}, "shuffle_window is nan"),
        (ReadingConfig, {"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        (ReadingConfig, {"num_threads": -1}, "num_threads is -1"),
        (ReadingConfig, {"num_rows": 0}, "num_rows is 0"),
        (ReadingConfig, {"on_damage": "ignore"}, "on_damage is 'ignore'"),
        (DecisionConfig, {"shadow": "no"}, "shadow is 'no'"),
        (DecisionConfig, {"history_mix": "asked"}, "history_mix is 'asked'"),
        (DecisionConfig, {"guard": {"floor": 0.1}}, "guard is"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_refuses_values_of_another_type_by_name(config, setting, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        config(**setting)


@pytest.mark.parametrize(
    "deciding",
    [
        DecisionConfig(shadow=True),
        DecisionConfig(guard=GuardConfig(max_change=0.1)),
        DecisionConfig(roles={"keep": "a", "acquire": "b"}),
        DecisionConfig(standardization="frozen"),
    ],
)
def test_settings_of_decisions_without_anybody_who_decides_are_refused(build, deciding):
    with pytest.raises(ConfigurationError, match="no effect"):
        build(deciding=deciding)


@pytest.mark.parametrize("consumed", [-1, 1.5, 2**63, True])
def test_an_impossible_number_of_consumed_samples_is_refused(build, consumed):
    sampler = build(policy=StaticPolicy({"source": 0.5, "target": 0.5}))
    for call in (
        lambda: sampler.seek(consumed),
        lambda: sampler.reweight_due(consumed),
        lambda: sampler.state_dict(consumed),
        lambda: sampler.reweight({"general": -4.0}, consumed=consumed),
    ):
        with pytest.raises((ConfigurationError, StateError), match="consumed"):
            call()
    assert len(sampler.ledger) == 1


def test_a_policy_needs_no_name(build):
    class Even:
        def propose(self, history):
            return np.full(len(history.domains), 1 / len(history.domains))

    class Broken:
        def propose(self, history):
            raise RuntimeError("no idea")

    assert build(policy=Even()).reweight({"general": -4.0}, consumed=0).entry.decided_by == "Even"
    assert not build(policy=Broken()).reweight({"general": -4.0}, consumed=0).in_force


def test_a_loader_that_prefetches_more_than_declared_is_refused_in_the_main_process(build):
    sampler = build(exhausted="repeat", reading=ReadingConfig(batch_size=4))
    stream = iter(DataLoader(sampler, batch_size=4, num_workers=1, prefetch_factor=8))
    next(stream)
    deadline = time.monotonic() + 20
    while sampler._feed.mailbox.frontier() < 36 and time.monotonic() < deadline:
        time.sleep(0.02)
    sampler.reweight_due(4)
    with pytest.raises(ConfigurationError, match="prefetch_factor"):
        sampler.set_mix(CHANGES[0])
    assert len(sampler.ledger) == 1


def test_another_batch_size_than_the_loaders_is_refused(build):
    with pytest.raises(ConfigurationError, match=r"batch_size=4.*has batch size 8"):
        MixingDataLoader(build(reading=ReadingConfig(batch_size=4)), batch_size=8)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_bare_loader_with_workers_must_name_its_batch_size(build, num_workers):
    """Unknown to the workers, it would decide the order of samples and how late a new mix holds."""
    with pytest.raises(ConfigurationError, match="use MixingDataLoader"):
        next(iter(DataLoader(build(), batch_size=4, num_workers=num_workers)))
    loader = DataLoader(build(reading=ReadingConfig(batch_size=4)), batch_size=4, num_workers=num_workers)
    assert [i for batch in itertools.islice(loader, 5) for i in batch["__index__"].tolist()] == list(range(20))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shuffle": True}, "does not take shuffle"),
        ({"drop_last": True}, "does not take drop_last"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_workers": 1.5}, "num_workers is 1.5"),
        ({"samples_per_step": 0}, "samples_per_step is 0"),
    ],
)
def test_a_loader_refuses_settings_that_contradict_the_order(build, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        MixingDataLoader(build(), **settings)
    with pytest.raises(ConfigurationError, match="must be an AgentWeightedSampler"):
        MixingDataLoader([1, 2])


def test_two_loaders_of_one_program_seed_their_workers_differently(build):
    """The workers of an older loader are told from those of a newer one by the seed."""
    seeds = {MixingDataLoader(build()).generator.initial_seed() for _ in range(3)}
    assert len(seeds) == 3


def test_after_workers_the_sampler_can_be_read_directly(build):
    sampler = build(exhausted="repeat")
    stream = iter(MixingDataLoader(sampler, batch_size=4, num_workers=2))
    for _ in range(10):
        next(stream)
    sampler.reweight_due(40)
    del stream
    assert [index for index, _, _ in sample_ids(sampler, 3)] == [40, 41, 42]
    assert sampler.set_mix(CHANGES[0]).start == 43
    assert sampler.state_dict()["consumed"] == 43


def test_an_ended_iterator_stays_ended(build):
    sampler = build()
    stream = iter(sampler)
    for _ in stream:
        pass
    sampler.set_mix(CHANGES[0])
    assert list(stream) == []


def test_numpy_integers_are_the_same_as_pythons(build):
    assert sample_ids(build(seed=np.int64(3)), 20) == sample_ids(build(seed=3), 20)
    assert json.dumps(build().state_dict(consumed=np.int64(7)))
    with pytest.raises(ConfigurationError, match="seed is 'x'"):
        build(seed="x")


def test_a_copy_for_workers_does_not_decide(build):
    with pytest.raises(StateError, match="kept by the original in the main process"):
        copy.deepcopy(build()).reweight({"a": 1.0}, consumed=0)


def test_a_mix_that_comes_too_late_for_a_worker_is_refused_loudly(build):
    """A loader that prefetches more than declared must not silently train on another mix than the ledger says."""
    sampler = build()
    worker = copy.deepcopy(sampler)._feed
    worker.mailbox = sampler._feed.mailbox
    entry = sampler.set_mix(CHANGES[0])
    worker.receive(entry.start)
    entry = sampler.set_mix(CHANGES[1])
    with pytest.raises(StateError, match=rf"from sample {entry.start}.*up to {entry.start + 1}.*prefetch_factor"):
        worker.receive(entry.start + 1)


def test_a_spawned_worker_reads_the_same(build):
    sampler = mixed_in_advance(build())
    copy = pickle.loads(pickle.dumps(sampler.collection))
    assert copy.fingerprint == sampler.collection.fingerprint
    loader = MixingDataLoader(sampler, batch_size=4, num_workers=1, multiprocessing_context="spawn")
    assert [i for b in itertools.islice(loader, 5) for i in b["__index__"].tolist()] == list(range(20))


def test_without_readahead_threads_the_samples_are_the_same(build):
    slow = sample_ids(build(reading=ReadingConfig(num_threads=0, num_rows=3)))
    assert slow == sample_ids(build(reading=ReadingConfig(num_threads=3, num_rows=50)))


def test_the_target_is_used_once_and_the_source_repeats(build):
    keys = [key for _, _, key in sample_ids(build(initial_mix={"source/web": 0.8, "target/math": 0.2}))]
    target = [key for key in keys if key.startswith("target")]
    assert len(target) == len(set(target)) == ROWS["target/math"] + ROWS["target/proofs"]
    source = [key for key in keys if key.startswith("source")]
    assert len(source) > len(set(source)) == ROWS["source/web"]


def test_exhaustion_error_comes_after_the_last_good_sample(build):
    sampler = build(exhausted="error", initial_mix={"source/web": 0.5, "target/proofs": 0.5})
    stream, seen = iter(sampler), []
    with pytest.raises(ExhaustedError, match="target/proofs"):
        seen.extend(next(stream) for _ in itertools.count())
    # islice-style counting: everything before the failing sample was delivered
    assert sampler.achieved()["target/proofs"] == ROWS["target/proofs"]


def test_length_is_known_only_if_the_run_ends(build):
    assert len(build(rank=0, world_size=2)) == len(build()) // 2
    with pytest.raises(TypeError, match="no length"):
        len(build(exhausted="repeat"))


# Decisions


class Scripted:
    """A policy that returns what it is told and remembers what it saw."""

    def __init__(self, *proposals):
        self.name, self.proposals, self.seen = "scripted", list(proposals), []

    def propose(self, history: History):
        self.seen.append(history)
        proposal = self.proposals.pop(0)
        if isinstance(proposal, Exception):
            raise proposal
        return proposal


def test_decisions_are_due_before_the_first_sample_and_every_interval(build):
    sampler = build(policy=StaticPolicy({"source/web": 0.5, "target/math": 0.5}))
    due = []
    for consumed in range(0, 100, 4):
        if sampler.reweight_due(consumed):
            due.append(consumed)
            list(itertools.islice(sampler, consumed - sampler.state_dict()["consumed"]))
            sampler.reweight({"general": -2.0, "math": -1.0}, consumed=consumed)
    assert due == [0, 32, 64, 96]


def test_fields_keep_their_order_where_json_is_sorted(build):
    """As the Trainer writes it: the agent reads the field to keep from the first column, by whatever name."""

    def run(sampler, steps):
        for consumed in steps:
            sample_ids(sampler, consumed - sampler.state_dict()["consumed"])
            sampler.reweight({"general": -2.0, "code": -5.0 + consumed / 100}, consumed=consumed)

    straight, resumed = Scripted(*[[0.25] * 4] * 4), Scripted(*[[0.25] * 4] * 4)
    run(build(policy=straight), (0, 32, 64))
    first, second = build(policy=resumed), build(policy=resumed)
    run(first, (0, 32))
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), sort_keys=True)))
    run(second, (64,))
    assert resumed.seen[-1].fields == straight.seen[-1].fields == ("general", "code")
    assert resumed.seen[-1].feedback.tolist() == straight.seen[-1].feedback.tolist()


def test_a_policy_that_is_never_asked_is_warned_of(build, caplog):
    """A forgotten callback, or loop without decisions, would train on the initial mix in silence."""
    policy = StaticPolicy({"source/web": 0.5, "target/math": 0.5})
    with caplog.at_level(logging.WARNING):
        sampler = build(policy=policy)
        sample_ids(sampler, 5)
        sample_ids(sampler, 5)
    assert caplog.text.count("before its first decision") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sampler = build(policy=policy)
        sampler.reweight({"general": -2.0}, consumed=0)
        sample_ids(sampler, 5)
        sample_ids(build(), 5)
    assert caplog.text == ""


def test_a_state_ahead_of_what_was_handed_out_is_refused(build):
    sampler = build()
    sample_ids(sampler, 20)
    assert sampler.state_dict(20)["consumed"] == 20
    with pytest.raises(ConfigurationError, match="consumed is 21, but only 20 samples were handed out"):
        sampler.state_dict(21)


def test_a_transform_that_returns_nothing_is_named(build):
    with pytest.raises(ConfigurationError, match="transform returned None; it must return a sample"):
        next(iter(build(transform=lambda sample: None)))


def test_one_shard_in_place_of_a_manifest_is_refused(build):
    with pytest.raises(
        ConfigurationError, match=r"is a shard or a pattern of shards, not a manifest.*map its domain to it, \{'source"
    ):
        build(shards="shards/web-000000.tar")


def test_feedback_that_names_no_fields_is_refused(build):
    with pytest.raises(FeedbackError, match="must map each field to a number"):
        build(policy=Scripted([0.25] * 4)).reweight([-2.0, -3.0], consumed=0)


def test_another_start_state_than_the_saved_one_is_warned_of(build, caplog):
    state = build(start_state={"source/web": 1.0}).state_dict()
    with caplog.at_level(logging.WARNING):
        build(start_state={"source/web": 1.0}).load_state_dict(state)
    assert "start_state" not in caplog.text
    with caplog.at_level(logging.WARNING):
        build(start_state={"target/math": 1.0}).load_state_dict(state)
    assert "another start_state" in caplog.text


def test_the_policy_sees_the_achieved_mixes_and_all_feedback(build):
    policy = Scripted([0.5, 0, 0.5, 0], [0, 0, 0, 1.0], [0.25] * 4)
    sampler = build(policy=policy, start_state={"source/web": 1.0}, exhausted="repeat")
    for consumed, feedback in ((0, -3.0), (32, -2.5), (64, -2.0)):
        sample_ids(sampler, consumed - sampler.state_dict()["consumed"])
        sampler.reweight({"general": feedback, "math": feedback - 1}, consumed=consumed)
    history = policy.seen[-1]
    assert history.fields == ("general", "math")
    assert history.mixes[0].tolist() == [1, 0, 0, 0]
    assert history.mixes[1].tolist() == [0.5, 0, 0.5, 0]
    assert history.mixes[2].tolist() == [0, 0, 0, 1]
    assert history.feedback.tolist() == [[-3.0, -4.0], [-2.5, -3.5], [-2.0, -3.0]]


def test_a_decision_asks_the_plan_only_for_counts_it_does_not_know(build, monkeypatch):
    """Asking for the counts of all steps anew makes the 80th decision take 160 times as long as the first."""
    sampler = build(policy=StaticPolicy({"source/web": 0.5, "target/math": 0.5}))
    asked, counts, stream = [], sampler.plan.counts, iter(sampler)
    monkeypatch.setattr(sampler.plan, "counts", lambda index: asked.append(index) or counts(index))
    for step in range(6):
        sampler.reweight({"general": -2.0}, consumed=4 * step)
        list(itertools.islice(stream, 4))
    assert max(asked.count(index) for index in asked) <= 2


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


def test_a_failing_policy_leaves_the_last_good_mix_and_says_so(build, caplog):
    good = {"source/web": 0.5, "target/math": 0.5}
    policy = Scripted([0.5, 0, 0.5, 0], [np.nan] * 4, RuntimeError("out of ideas"), [0.9, 0.9, 0, 0])
    sampler = build(policy=policy)
    for consumed in (0, 32, 64, 96):
        sample_ids(sampler, consumed - sampler.state_dict()["consumed"])
        decision = sampler.reweight({"general": -3.0, "math": -2.0}, consumed=consumed)
        assert decision.in_force == (consumed == 0)
        assert {d: w for d, w in sampler.mix.items() if w} == good
    assert [entry.accepted for entry in sampler.ledger] == [True, False, False, False]
    assert "out of ideas" in sampler.ledger[2].note
    assert caplog.text.count("the previous mix stays in force") == 3


def test_shadow_mode_logs_and_keeps_the_mix(build):
    sampler = build(policy=Scripted([0.0, 0.0, 1.0, 0.0]), deciding=DecisionConfig(shadow=True))
    before = sampler.mix
    decision = sampler.reweight({"general": -3.0, "math": -2.0}, consumed=0)
    assert decision.proposed["target/math"] == 1.0
    assert not decision.in_force
    assert sampler.mix == before
    assert len(sampler.ledger) == 1


def test_the_guard_limits_what_a_policy_may_do(build):
    guard = GuardConfig(floor={"source/web": 0.3}, max_change=0.2)
    sampler = build(
        policy=Scripted([0.0, 0.0, 1.0, 0.0]), initial_mix={"source/web": 1.0}, deciding=DecisionConfig(guard=guard)
    )
    sampler.reweight({"general": -3.0, "math": -2.0}, consumed=0)
    assert sampler.mix["source/web"] == pytest.approx(0.8)


def test_an_agent_decides_and_a_restored_run_decides_the_same(build):
    torch.manual_seed(0)
    agent = MixingAgent(AgentConfig(statistics=FeedbackStatistics(mean=(-3.0, -3.0), std=(0.5, 0.5), count=9)))

    def run(sampler, consumed, until):
        while consumed < until:
            if sampler.reweight_due(consumed):
                sampler.reweight({"general": -3 - 0.01 * consumed, "math": -4 + 0.02 * consumed}, consumed=consumed)
            sample_ids(sampler, 8)
            consumed += 8
        return sampler.ledger.to_json()

    whole = run(build(agent=agent), 0, 120)
    assert len({tuple(entry["mix"]) for entry in whole}) == 4
    half = build(agent=agent)
    run(half, 0, 56)
    resumed = build(agent=agent)
    resumed.load_state_dict(json.loads(json.dumps(half.state_dict())))
    assert run(resumed, 56, 120) == whole


# State


def test_the_state_is_small_json_and_does_not_grow_with_samples(build):
    sampler = build(exhausted="repeat")
    early = len(json.dumps(sampler.state_dict(consumed=10)))
    late = len(json.dumps(sampler.state_dict(consumed=10_000_000_000)))
    assert late < early + 100
    resumed = build(exhausted="repeat")
    resumed.load_state_dict(sampler.state_dict(consumed=10_000_000_000))
    assert next(iter(resumed))["__index__"] == 10_000_000_000


def test_with_workers_only_the_trainer_knows_what_was_consumed(build):
    sampler = build()
    stream = iter(MixingDataLoader(sampler, batch_size=4, num_workers=1))
    next(stream)
    with pytest.raises(StateError, match="pass consumed="):
        sampler.state_dict()
    assert sampler.state_dict(consumed=4)["consumed"] == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"schema": 99}, "schema 99"),
        ({"seed": 5}, r"seed 5, this run has 0"),
        ({"fingerprint": "0" * 64}, "another shard set"),
        ({"domains": ["source/a"]}, "domains"),
        ({"exhausted": ["stop"] * 4}, "exhausted"),
        ({"shuffle_window": 1}, "shuffle_window"),
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


def test_a_state_of_other_shards_is_refused_and_moved_shards_are_not(build, folder):
    state = build().state_dict(consumed=7)
    other = write_toy_shards(folder / "other", {**ROWS, "target/proofs": 21})
    with pytest.raises(StateError, match="another shard set"):
        build(shards=other).load_state_dict(state)
    moved = write_toy_shards(folder / "elsewhere" / "moved", ROWS)
    sampler = build(shards=moved)
    try:
        sampler.load_state_dict(state)
    except StateError:
        pytest.fail("the same shards in another folder must be accepted")


# Bad input


def test_bad_settings_are_refused_by_name(build, folder, shards):
    with pytest.raises(DomainError, match=r"'wiki' belongs to no field.*source/wiki"):
        build(shards={"wiki": shards["source/web"]})
    with pytest.raises(ShardNotFoundError, match="source/web"):
        build(shards={"source/web": str(folder / "nothing-{00..03}.tar")})
    with pytest.raises(DomainError, match="target/maths"):
        build(initial_mix={"target/maths": 1.0})
    with pytest.raises(MixError, match=r"sums to 0\.9"):
        build(initial_mix={"source/web": 0.9})
    with pytest.raises(ConfigurationError, match="larger than the 180 rows"):
        build(rank=0, world_size=181)
    with pytest.raises(ConfigurationError, match="rank 3"):
        build(rank=3, world_size=2)
    with pytest.raises(ConfigurationError, match="samples_per_reweight"):
        build(samples_per_reweight=0)
    with pytest.raises(ConfigurationError, match="only one can decide"):
        build(agent="x", policy=Scripted())
    with pytest.raises(CheckpointError, match="no-such-agent"):
        build(agent="no-such-agent")
    with pytest.raises(ConfigurationError, match="nonsense"):
        build(exhausted="nonsense")
    with pytest.raises(ConfigurationError, match="targets"):
        build(exhausted={"targets": "repeat"})


def test_a_domain_of_empty_shards_is_refused(build, shards, tmp_path):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(EmptyShardError, match="source/empty"):
        build(shards={**shards, "source/empty": str(tmp_path / "empty.tar")})


def test_bad_feedback_and_consumed_are_refused(build):
    sampler = build(policy=StaticPolicy({"source/web": 0.5, "target/math": 0.5}))
    with pytest.raises(FeedbackError, match=r"not finite.*math"):
        sampler.reweight({"general": -1.0, "math": float("nan")}, consumed=0)
    sampler.reweight({"general": -1.0, "math": -2.0}, consumed=0)
    sample_ids(sampler, 10)
    with pytest.raises(ConfigurationError, match="only 10 samples were handed out"):
        sampler.reweight({"general": -1.0, "math": -2.0}, consumed=11)
    with pytest.raises(FeedbackError, match=r"\['general', 'code'\]"):
        sampler.reweight({"general": -1.0, "code": -2.0}, consumed=10)
    with pytest.raises(ConfigurationError, match="train between"):
        sampler.reweight({"general": -1.0, "math": -2.0}, consumed=0)
    with pytest.raises(ConfigurationError, match="needs a policy"):
        build().reweight({"general": -1.0, "math": -2.0}, consumed=0)
    with pytest.raises(DomainError, match="target/x"):
        sampler.set_mix({"target/x": 1.0})
