"""torchdata's StatefulDataLoader: without data workers its state is the run's state; with them it is refused."""

from __future__ import annotations

import io

import pytest
import torch

from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader.errors import StateError
from dmagent_loader.policies import LinearSchedule
from dmagent_loader.testing import write_toy_shards

StatefulDataLoader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

ROWS = {"source/a": 70, "target/x": 50}
CHANGES = {2: {"source/a": 0.9, "target/x": 0.1}, 5: {"source/a": 0.0, "target/x": 1.0}}
POLICY = LinearSchedule({"source/a": 0.9, "target/x": 0.1}, {"source/a": 0.4, "target/x": 0.6}, 3)

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("torchdata")


@pytest.fixture(scope="module")
def shards(folder):
    return write_toy_shards(folder / "shards", ROWS)


@pytest.fixture
def build(shards, folder):
    def build(**settings):
        return AgentWeightedSampler(
            shards,
            samples_per_reweight=16,
            reading=ReadingConfig(progress=False, cache_dir=folder / "cache"),
            **settings,
        )

    return build


def saved_and_loaded(state):
    """As a training program keeps it, with nothing in it that needs pickle."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def read(sampler, batches, start=0):
    """The batches that are left, with the mix changed by hand at some."""
    seen = []
    for number, batch in enumerate(batches, start=start):
        seen.append((batch["__index__"].tolist(), batch["__key__"]))
        if number in CHANGES:
            sampler.set_mix(CHANGES[number])
    return seen


@pytest.mark.parametrize("rank", [0, 1])
def test_restored_after_any_batch_the_rest_is_the_same(build, rank):
    """Catches a state of what was read ahead, a lost change of the mix, and a rank that takes another's share."""
    ranks = {"rank": rank, "world_size": 2}
    sampler = build(**ranks)
    loader, states = StatefulDataLoader(sampler, batch_size=4), []

    def remembering():
        for batch in loader:
            yield batch
            states.append(saved_and_loaded(loader.state_dict()))

    whole = read(sampler, remembering())
    assert len(whole) == len(states) > 10
    for done, state in enumerate(states, start=1):
        resumed = build(**ranks)
        rest = StatefulDataLoader(resumed, batch_size=4)
        rest.load_state_dict(state)
        if done == len(whole):
            # The state was taken before the loader noticed that there is no more.
            assert read(resumed, rest, start=done) == []
        else:
            assert read(resumed, rest, start=done) == whole[done:]
            assert list(resumed.ledger) == list(sampler.ledger)


def test_a_state_from_before_the_first_batch_is_the_beginning(build):
    state = saved_and_loaded(StatefulDataLoader(build(), batch_size=4).state_dict())
    sampler = build()
    loader = StatefulDataLoader(sampler, batch_size=4)
    loader.load_state_dict(state)
    whole = build()
    assert read(sampler, loader) == read(whole, StatefulDataLoader(whole, batch_size=4))


def train(sampler, loader, steps):
    """A loop in which the policy decides."""
    stream, seen = iter(loader), []
    consumed = sampler._feed.cursor.consumed
    for _ in range(steps):
        if sampler.reweight_due(consumed):
            sampler.reweight({"general": -1.0 - consumed / 100, "math": -2.0}, consumed=consumed)
        batch = next(stream)
        seen += zip(batch["__index__"].tolist(), batch["__key__"], strict=True)
        consumed += len(batch["__index__"])
    return seen


def test_what_the_policy_has_seen_is_part_of_the_state(build):
    sampler = build(policy=POLICY)
    whole = train(sampler, StatefulDataLoader(sampler, batch_size=4), 20)
    first = build(policy=POLICY)
    loader = StatefulDataLoader(first, batch_size=4)
    seen = train(first, loader, 10)
    resumed = build(policy=POLICY)
    rest = StatefulDataLoader(resumed, batch_size=4)
    rest.load_state_dict(saved_and_loaded(loader.state_dict()))
    assert seen + train(resumed, rest, 10) == whole
    assert list(resumed.ledger) == list(sampler.ledger)


def test_data_workers_are_refused(build):
    """Their states would restore their copies of the sampler, and not the process that decides."""
    with pytest.raises(StateError, match=r"(?s)made for a data worker.*works with num_workers=0"):
        iter(StatefulDataLoader(build(), batch_size=4, num_workers=2))


def test_a_state_of_another_run_is_refused(build):
    state = StatefulDataLoader(build(seed=1), batch_size=4).state_dict()
    loader = StatefulDataLoader(build(seed=2), batch_size=4)
    loader.load_state_dict(state)
    with pytest.raises(StateError, match="a run with seed 1"):
        iter(loader)
