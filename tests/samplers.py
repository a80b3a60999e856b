"""Small samplers for tests, and promises that hold with and without data workers."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from reading import quiet
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dmagent_loader import AgentWeightedSampler, MixingDataLoader
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.ledger import LedgerEntry
from dmagent_loader.policies import StaticPolicy
from dmagent_loader.testing import sample_ids

Build = Callable[..., AgentWeightedSampler]

ROWS = {"source/web": 70, "source/books": 40, "target/math": 50, "target/proofs": 20}
CHANGES = [
    {"source/web": 0.1, "source/books": 0.2, "target/math": 0.6, "target/proofs": 0.1},
    {"source/web": 0.5, "source/books": 0.0, "target/math": 0.3, "target/proofs": 0.2},
    {"source/web": 0.0, "source/books": 0.9, "target/math": 0.1, "target/proofs": 0.0},
]
"""Mixes over the domains of `ROWS`."""


def builder(shards: Mapping[str, Sequence[str]], cache_dir: str | os.PathLike[str], **defaults: Any) -> Build:
    """A function that builds a sampler; it takes the sampler's arguments, and `kind` for a class derived from it."""

    def build(*, kind: type[AgentWeightedSampler] = AgentWeightedSampler, **settings: Any) -> AgentWeightedSampler:
        given = {"shards": shards, **defaults, **settings}
        return kind(given.pop("shards"), reading=quiet(cache_dir, given.pop("reading", None)), **given)

    return build


def mixed_in_advance(sampler: AgentWeightedSampler) -> AgentWeightedSampler:
    """Three mix changes at 30, 60 and 90, written into the ledger as a run would have."""
    for number, weights in enumerate(CHANGES, start=1):
        mix = tuple(sampler.space.mix(weights).tolist())
        sampler.plan.append(LedgerEntry(start=30 * number, mix=mix, decided_by="test", decided_at=30 * number))
    return sampler


def indices(samples: Iterable[Mapping[str, Any]]) -> list[int]:
    """The global indices of samples; also a collate function, whose batches are lists of them."""
    return [sample["__index__"] for sample in samples]


def logged(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    """The log messages that contain some words."""
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


def wait_until_fetched(sampler: AgentWeightedSampler, index: int) -> None:
    """Waits until the data workers have fetched all samples before a global index."""
    deadline = time.monotonic() + 60
    while sampler._feed.mailbox.frontier() < index:
        assert time.monotonic() < deadline, f"the workers have fetched {sampler._feed.mailbox.frontier()} samples only"
        time.sleep(0.02)


def stop_workers() -> None:
    """Stops all data workers of this process.

    An error of a worker holds its loader's iterator in a cycle of references. The garbage collector closes the queues
    to the workers before the iterator can tell them to stop, and then waits 5 s for each of them.
    """
    if multiprocessing.active_children():
        for found in gc.get_objects():
            if issubclass(type(found), _MultiProcessingDataLoaderIter):  # isinstance would wake up proxies
                found._shutdown_workers()


# Promises that hold with any number of data workers: tests/unit asks for none, tests/processes for some.


def assert_ranks_may_change_at_a_restore(build: Build, before: int, after: int, workers: int) -> None:
    """A state of `before` ranks goes on in `after` ranks with the samples that were left, each once."""
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


def assert_an_iterator_stops_when_a_state_is_loaded(build: Build, workers: int) -> None:
    """It would deliver what comes after its own place, and the state would never count it."""
    sampler = build(exhausted="repeat")
    stream = iter(MixingDataLoader(sampler, batch_size=4, num_workers=workers))
    for _ in range(3):
        next(stream)
    sampler.load_state_dict(sampler.state_dict(consumed=4))
    with pytest.raises(StateError, match="after load_state_dict"):
        list(itertools.islice(stream, 50))  # a worker has fetched some before
    assert next(iter(sampler))["__index__"] == 4


def assert_more_consumed_than_handed_out_is_refused(build: Build, workers: int) -> None:
    """Counted once too often, a resumed run would leave out samples that nobody trained on."""
    sampler = build(policy=StaticPolicy({"source/web": 0.5, "target/math": 0.5}))
    sampler.reweight({"general": -1.0}, consumed=0)
    stream = iter(MixingDataLoader(sampler, batch_size=4, num_workers=workers, collate_fn=indices))
    for _ in range(10):
        next(stream)
    for call in (sampler.state_dict, lambda consumed: sampler.reweight({"general": -1.0}, consumed=consumed)):
        with pytest.raises(ConfigurationError, match="count the samples of all ranks"):
            call(consumed=80)
    assert sampler.state_dict(consumed=40)["consumed"] == 40


def assert_lazy_rows_make_the_batches_of_eager_ones(
    build: Build, collate: Callable[[list[Any]], Mapping[str, Any]], workers: int
) -> None:
    """Also across a change of the mix, where the main process reads by itself."""
    batches: dict[str, list[Mapping[str, Any]]] = {"default": [], "lazy": []}
    for decode, found in batches.items():
        sampler = build(decode=decode, exhausted="repeat")
        loader = MixingDataLoader(sampler, batch_size=6, num_workers=workers, collate_fn=collate)
        for batch, number in zip(loader, range(12), strict=False):
            found.append(batch)
            if number == 5 and not workers:
                sampler.set_mix({"source/a": 0.9, "target/x": 0.1})
    for one, other in zip(batches["default"], batches["lazy"], strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
            assert same, name
