"""The place of a run is kept for one iterator at a time, and counted once."""

from __future__ import annotations

import itertools
import time

import pytest
from reading import quiet
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dmagent_loader import AgentWeightedSampler, MixingDataLoader, ReadingConfig
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.policies import StaticPolicy
from dmagent_loader.testing import write_toy_shards

ROWS = {"source/web": 400, "target/math": 400}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_toy_shards(tmp_path_factory.mktemp("shards"), ROWS)


@pytest.fixture
def build(shards, tmp_path):
    def build(sampler_class=AgentWeightedSampler, **settings):
        settings = {
            "samples_per_reweight": 40,
            "exhausted": "repeat",
            "initial_mix": dict.fromkeys(ROWS, 0.5),
            **settings,
        }
        reading = quiet(tmp_path / "cache", settings.pop("reading", None))
        return sampler_class(shards, reading=reading, **settings)

    return build


def indices(samples):
    return [sample["__index__"] for sample in samples]


@pytest.mark.parametrize("look", [iter, lambda sampler: iter(DataLoader(sampler, batch_size=4, collate_fn=indices))])
def test_a_look_at_a_batch_does_not_move_a_run_in_silence(build, look):
    """The state would stand still where the look ended, and a new mix begin before samples given under the old one."""
    sampler = build()
    stream = iter(sampler)
    for _ in range(10):
        next(stream)
    next(look(sampler))
    with pytest.raises(StateError, match="another iterator over this sampler"):
        next(stream)


@pytest.mark.parametrize("look_workers", [0, 1, 2])
def test_a_look_while_workers_read_stops_them(build, look_workers):
    sampler = build()
    stream = iter(MixingDataLoader(sampler, batch_size=4, num_workers=2, collate_fn=indices))
    next(stream)
    look = MixingDataLoader(sampler, batch_size=4, num_workers=look_workers, collate_fn=indices)
    assert list(itertools.islice(look, 3)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(StateError, match="use a separate sampler to look at samples"):
        list(itertools.islice(stream, 10))


def test_a_look_with_workers_stops_the_main_process(build):
    sampler = build()
    stream = iter(sampler)
    next(stream)
    next(iter(MixingDataLoader(sampler, batch_size=4, num_workers=1, collate_fn=indices)))
    with pytest.raises(StateError, match="use a separate sampler to look at samples"):
        next(stream)


class LateWorkers(AgentWeightedSampler):
    """Those of the first loaders begin when later loaders have long read."""

    loader_number = 0

    def __iter__(self):
        time.sleep(max(0.0, 0.4 * (2 - self.loader_number)) if get_worker_info() is not None else 0.0)
        return super().__iter__()


def test_late_workers_of_a_loader_that_was_replaced_do_not_stop_the_new_ones(build):
    """They would also overwrite how far those have come."""
    sampler = build(LateWorkers)
    replaced = []
    for sampler.loader_number in range(3):
        replaced.append(iter(MixingDataLoader(sampler, batch_size=4, num_workers=2, collate_fn=indices)))
    seen = []
    while len(seen) < 80:
        seen += next(replaced[-1])
        time.sleep(0.05)
        sampler.reweight_due(len(seen))
        assert sampler._feed.mailbox.frontier() >= len(seen)
    assert seen == list(range(80))
    with pytest.raises(StateError, match="another iterator"):
        next(replaced[0])


def test_an_iterator_that_is_done_makes_room_for_the_next(build):
    sampler = build()
    for first in (0, 8, 16):
        assert indices(itertools.islice(sampler, 8)) == list(range(first, first + 8))


class LateInLaterPasses(AgentWeightedSampler):
    passes = 0

    def __iter__(self):
        worker = get_worker_info()
        self.passes += 1
        if self.passes > 1 and worker is not None and worker.id == 1:
            time.sleep(0.5)
        return super().__iter__()


def test_a_persistent_worker_that_is_late_in_a_later_pass_begins_where_the_others_do(build):
    """It would find there what was consumed from the others by then: samples lost and samples twice."""
    sampler = build(LateInLaterPasses)
    loader = MixingDataLoader(sampler, batch_size=4, num_workers=2, persistent_workers=True, collate_fn=indices)
    seen = []
    for _ in range(3):
        for batch in itertools.islice(loader, 6):
            seen += batch
            sampler.reweight_due(len(seen))
    assert seen == list(range(72))


def test_persistent_workers_refuse_to_go_on_where_a_run_was_set_back(build):
    sampler = build()
    loader = MixingDataLoader(sampler, batch_size=4, num_workers=1, persistent_workers=True, collate_fn=indices)
    sampler.seek(40)
    assert next(iter(loader)) == [40, 41, 42, 43]
    sampler.seek(20)
    with pytest.raises(StateError, match="set back by seek"):
        next(iter(loader))
    again = MixingDataLoader(sampler, batch_size=4, num_workers=1, collate_fn=indices)
    assert next(iter(again)) == [20, 21, 22, 23]


class OwnBatches(IterableDataset):
    """As users of webdataset write it."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __iter__(self):
        stream = iter(self.sampler)
        while batch := indices(itertools.islice(stream, 8)):
            yield batch


def test_batches_made_between_loader_and_sampler_are_dealt_whole_to_the_workers(build):
    """The loader asks for one thing at a time, which is not one sample: what was consumed would be another set."""
    unknown = DataLoader(OwnBatches(build()), batch_size=None, num_workers=2)
    with pytest.raises(ConfigurationError, match="its batch size is unknown"):
        next(iter(unknown))
    loader = DataLoader(OwnBatches(build(reading=ReadingConfig(batch_size=8))), batch_size=None, num_workers=2)
    assert list(itertools.chain.from_iterable(itertools.islice(loader, 4))) == list(range(32))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_consumed_than_was_handed_out_is_refused(build, num_workers):
    """Counted once too often, a resumed run would leave out what nobody trained on."""
    sampler = build(policy=StaticPolicy(dict.fromkeys(ROWS, 0.5)))
    sampler.reweight({"general": -1.0}, consumed=0)
    stream = iter(MixingDataLoader(sampler, batch_size=4, num_workers=num_workers, collate_fn=indices))
    for _ in range(10):
        next(stream)
    for call in (sampler.state_dict, lambda consumed: sampler.reweight({"general": -1.0}, consumed=consumed)):
        with pytest.raises(ConfigurationError, match="count the samples of all ranks"):
            call(consumed=80)
    assert sampler.state_dict(consumed=40)["consumed"] == 40


def test_a_state_that_could_not_be_loaded_is_not_written(build):
    sampler = build(policy=StaticPolicy(dict.fromkeys(ROWS, 0.5)))
    sampler.reweight({"general": -1.0}, consumed=0)
    for _ in zip(range(40), sampler, strict=False):
        pass
    sampler.reweight({"general": -1.0}, consumed=40)
    with pytest.raises(StateError, match="consumed is 20, but a decision was made after 40 samples"):
        sampler.state_dict(consumed=20)
    build(policy=StaticPolicy(dict.fromkeys(ROWS, 0.5))).load_state_dict(sampler.state_dict(consumed=40))


def test_a_decision_that_no_sample_is_free_for_is_still_due(build):
    """Workers prefetch more than the sampler was told: nothing of the decision may be kept."""
    sampler = build(policy=StaticPolicy(dict.fromkeys(ROWS, 0.5)), reading=ReadingConfig(batch_size=4))
    sampler.reweight({"general": -1.0}, consumed=0)
    stream = iter(DataLoader(sampler, batch_size=4, num_workers=2, prefetch_factor=8, collate_fn=indices))
    for _ in range(10):
        next(stream)
    deadline = time.monotonic() + 60
    while sampler._feed.mailbox.frontier() < 80 and time.monotonic() < deadline:
        time.sleep(0.02)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="further than 40 consumed samples"):
            sampler.reweight({"general": -1.0}, consumed=40)
    assert sampler.reweight_due(40)
    assert len(sampler.ledger) == 1


def test_what_was_achieved_is_asked_for_by_indices_that_exist(build):
    sampler = build()
    for _ in zip(range(10), sampler, strict=False):
        pass
    assert sampler.achieved(4, 10) == {"source/web": 3, "target/math": 3}
    for start, stop in ((-90, 10), (0, -5), (8, 4), (2.5, 10)):
        with pytest.raises(ConfigurationError, match=r"st(art|op) is"):
            sampler.achieved(start, stop)


def test_a_world_without_a_rank_is_refused(build):
    """Every process would read the share of rank 0."""
    with pytest.raises(ConfigurationError, match=r"world_size=2 without rank.*pass rank="):
        build(world_size=2)
    assert indices(itertools.islice(build(rank=1, world_size=2), 3)) == [1, 3, 5]


def said(caplog, words):
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


def test_what_workers_fetched_ahead_is_no_miscount(build, caplog):
    """Right at the start they have handed out many times what was trained on."""
    sampler = build()
    stream = iter(MixingDataLoader(sampler, batch_size=4, num_workers=2, prefetch_factor=4, collate_fn=indices))
    next(stream)
    deadline = time.monotonic() + 60
    while sampler._feed.mailbox.frontier() < 20 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert sampler.state_dict(consumed=4)["consumed"] == 4
    assert not said(caplog, "were handed out")


def test_batches_counted_for_samples_are_warned_of(build, caplog):
    """A resumed run would train on most of it again."""
    sampler = build(policy=StaticPolicy(dict.fromkeys(ROWS, 0.5)))
    sampler.reweight({"general": -1.0}, consumed=0)
    stream = iter(DataLoader(sampler, batch_size=4, collate_fn=indices))
    for consumed in range(4, 44, 4):
        next(stream)
        sampler.state_dict(consumed=consumed)
    assert not said(caplog, "were handed out")
    for _ in range(2):
        sampler.state_dict(consumed=10)
    assert len(said(caplog, "consumed is 10, but 40 samples were handed out")) == 1
    assert len(said(caplog, "were handed out")) == 1


def test_ranks_without_a_process_group_are_warned_of(build, caplog, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    next(iter(build(rank=0, world_size=2)))
    assert not said(caplog, "WORLD_SIZE")
    next(iter(build()))
    assert said(caplog, "WORLD_SIZE is 2, but there is no process group")


def test_a_pass_after_the_end_of_the_data_is_warned_of(build, caplog):
    sampler = build(exhausted=None)
    assert len(list(sampler)) > 700
    assert not said(caplog, "data are used up")
    assert list(sampler) == []
    assert said(caplog, "a new pass has none")


def test_losses_in_the_place_of_log_probabilities_are_warned_of(build, caplog):
    build(policy=StaticPolicy(dict.fromkeys(ROWS, 0.5))).reweight({"general": 6.9}, consumed=0)
    assert said(caplog, "pass -loss")
