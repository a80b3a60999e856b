"""The samples of one process: its place among the ranks, the mixes that it takes over, and its checks of the loop."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from samplers import assert_more_consumed_than_handed_out_is_refused, indices, logged
from torch.utils.data import DataLoader

from dmagent_loader import ReadingConfig
from dmagent_loader._loading.config import LoaderSettings
from dmagent_loader._loading.feed import Feed, validated_ranks
from dmagent_loader._loading.mailbox import CAPACITY
from dmagent_loader._loading.stream import SampleStream
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.ledger import LedgerEntry
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.policies import StaticPolicy
from dmagent_loader.shards import ShardCollection
from dmagent_loader.testing import write_toy_shards

ROWS = {"source/web": 30, "target/math": 20}
MIXES = [np.array([0.25, 0.75]), np.array([0.75, 0.25])]


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> ShardCollection:
    folder = tmp_path_factory.mktemp("feed")
    return ShardCollection.open(write_toy_shards(folder, ROWS), cache_dir=folder / "cache", progress=False)


@pytest.fixture
def make(collection: ShardCollection) -> Callable[..., Feed]:
    def make(exhausted: str | None = "repeat", **settings) -> Feed:
        space = DomainSpace.from_names(collection.domains)
        rows = [collection.shard_rows(domain) for domain in range(len(space))]
        plan = Plan(space, rows, seed=0, exhausted=exhausted)
        plan.append(LedgerEntry(start=0, mix=(0.5, 0.5), decided_by="initial", decided_at=0))
        given = {"decode": "default", "transform": None, "reading": ReadingConfig(), "rank": 0, "world_size": 1}
        return Feed(collection, plan, **{**given, **settings})

    return make


def worker_of(feed: Feed) -> Feed:
    """The feed as a data worker has it: a copy that shares nothing but the mailbox."""
    worker = copy.deepcopy(feed)
    worker.mailbox = worker.cursor.mailbox = feed.mailbox
    return worker


# Mixes


def test_a_worker_takes_over_each_mix_that_was_published_since_its_last_sample(make):
    feed = make()
    worker = worker_of(feed)
    assert not worker.is_behind
    entries = []
    for consumed, mix in zip((8, 24), MIXES, strict=True):
        feed.cursor.consume(consumed)
        entries.append(feed.append(mix, decided_by="test", decided_at=consumed, feedback={"general": -1.0}))
    assert worker.is_behind
    before = worker.version
    worker.receive(frontier=8)
    assert not worker.is_behind
    assert worker.version == before + 2
    assert [(entry.start, entry.mix) for entry in worker.plan.ledger] == [
        (entry.start, entry.mix) for entry in feed.plan.ledger
    ]
    assert [entry.start for entry in entries] == [8, 24]
    assert (worker.plan.locate(np.arange(60)).domain == feed.plan.locate(np.arange(60)).domain).all()
    assert not feed.is_behind, "the main process has its own mixes"


def test_a_mix_that_comes_too_late_for_a_worker_is_refused_loudly(make):
    """A loader that prefetches more than declared must not silently train on another mix than the ledger says."""
    feed = make()
    worker = worker_of(feed)
    first = feed.append(MIXES[0], decided_by="test", decided_at=0)
    worker.receive(first.start)
    feed.cursor.consume(8)
    second = feed.append(MIXES[1], decided_by="test", decided_at=8)
    with pytest.raises(StateError, match=rf"from sample {second.start}.*up to {second.start + 1}.*prefetch_factor"):
        worker.receive(second.start + 1)


def test_a_worker_that_missed_mixes_is_told(make):
    feed = make()
    worker = worker_of(feed)
    for consumed in range(CAPACITY + 1):
        feed.cursor.consume(consumed)
        feed.append(MIXES[consumed % 2], decided_by="test", decided_at=consumed)
    with pytest.raises(StateError, match=f"only the last {CAPACITY} are kept"):
        worker.receive(frontier=0)


def test_the_mix_is_that_of_the_next_sample_and_a_domain_that_is_used_up_has_none(make):
    feed = make(exhausted=None)
    entry = feed.append(np.array([0.25, 0.75]), decided_by="test", decided_at=0)
    assert entry.start == 0
    assert feed.mix.tolist() == [0.25, 0.75]
    end = feed.plan.end
    feed.cursor.seek(end - 1)
    assert feed.mix.tolist() == [0.25, 0.75]
    feed.cursor.seek(end)
    assert feed.plan.used_up_at(end) == ("target/math",)
    assert feed.mix.tolist() == [0.0, 0.0]


# The place of this process


def test_a_rank_outside_the_world_and_more_ranks_than_rows_are_refused(make):
    feed, shares = make(), []
    for rank in range(3):
        feed.set_ranks(rank, 3)
        shares += feed.layout(base=0).indices(0, 3).tolist()
    assert sorted(shares) == list(range(9))
    with pytest.raises(ConfigurationError, match="rank 2 is outside a world of 2 processes"):
        make(rank=2, world_size=2)
    with pytest.raises(ConfigurationError, match="51 is larger than the 50 rows of all 2 domains"):
        feed.set_ranks(0, 51)


@pytest.mark.parametrize(
    ("rank", "world_size", "message"),
    [(None, 2, "world_size=2 without rank"), (-1, 2, "rank is -1"), (0, 0, "world_size is 0"), (1.5, 2, "rank is 1.5")],
)
def test_ranks_that_cannot_be_are_refused(rank, world_size, message):
    with pytest.raises(ConfigurationError, match=message):
        validated_ranks(rank, world_size)
    assert validated_ranks(None, None) == (None, None)
    assert validated_ranks(np.int64(1), 2) == (1, 2)


def test_the_loaders_batch_size_must_not_contradict_the_configs(make):
    feed = make(reading=ReadingConfig(batch_size=4))
    assert (feed.loader.batch_size, feed.loader.samples_per_fetch) == (4, 4)
    with pytest.raises(ConfigurationError, match=r"batch_size=4.*has batch size 8"):
        feed.set_loader(LoaderSettings(batch_size=8, samples_per_fetch=8))
    feed.set_loader(LoaderSettings(batch_size=4, samples_per_fetch=4, samples_per_step=8))
    assert feed.loader.samples_per_step == 8


def test_the_run_ends_with_whole_steps_on_all_ranks(make):
    """20 target rows at half of the mix last for 40 samples."""
    feed = make(exhausted=None, rank=1, world_size=3)
    feed.set_loader(LoaderSettings(batch_size=2, samples_per_fetch=2, samples_per_step=4))
    assert (feed.plan.end, feed.end, feed.length) == (40, 36, 12)
    assert not feed.finished(35)
    assert feed.finished(36)
    feed.keep_length()
    feed.append(np.array([0.75, 0.25]), decided_by="test", decided_at=0)
    assert feed.end == 72
    assert feed.length == 12, "kept, whatever mixes come"
    endless = make()
    assert (endless.end, endless.length, endless.finished(10**9)) == (None, None, False)


def test_a_spawned_worker_gets_the_place_of_the_run_and_not_its_iterator(make):
    feed = make()
    feed.cursor.seek(12)
    stream = feed.cursor.stream = SampleStream(feed, feed.cursor.begin_pass(None, feed.handed_out))
    assert indices(itertools.islice(stream, 5)) == [12, 13, 14, 15, 16]
    twin = pickle.loads(pickle.dumps(feed))
    assert (twin.cursor.position, twin.cursor.stream) == (17, None)
    assert next(stream)["__index__"] == 17, "the run itself goes on"
    assert twin.sample_at(0, 0, 3) == feed.sample_at(0, 0, 3)
    assert twin.plan.ledger.summary() == feed.plan.ledger.summary()


# Checks of the training loop


def test_more_consumed_than_was_handed_out_is_refused(build):
    assert_more_consumed_than_handed_out_is_refused(build, workers=0)


def test_batches_counted_for_samples_are_warned_of(build, caplog):
    """A resumed run would train on most of it again."""
    sampler = build(policy=StaticPolicy({"source/web": 0.5, "target/math": 0.5}))
    sampler.reweight({"general": -1.0}, consumed=0)
    stream = iter(DataLoader(sampler, batch_size=4, collate_fn=indices))
    for consumed in range(4, 44, 4):
        next(stream)
        sampler.state_dict(consumed=consumed)
    assert not logged(caplog, "were handed out")
    for _ in range(2):
        sampler.state_dict(consumed=10)
    assert len(logged(caplog, "consumed is 10, but 40 samples were handed out")) == 1
    assert len(logged(caplog, "were handed out")) == 1


def test_ranks_without_a_process_group_are_warned_of(build, caplog, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    next(iter(build(rank=0, world_size=2)))
    assert not logged(caplog, "WORLD_SIZE")
    next(iter(build()))
    assert logged(caplog, "WORLD_SIZE is 2, but there is no process group")


def test_a_pass_after_the_end_of_the_data_is_warned_of(build, caplog):
    sampler = build(exhausted=None)
    assert len(list(sampler)) > 700
    assert not logged(caplog, "data are used up")
    assert list(sampler) == []
    assert logged(caplog, "a new pass has none")
