"""Batches of data workers: those of the main process, and nobody writes into one that is still in use."""

from __future__ import annotations

import functools
import gc
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from samplers import builder

from dmagent_loader import MixingDataLoader
from dmagent_loader._loading.slots import Slots
from dmagent_loader.testing import write_toy_shards
from dmagent_loader.transforms import ShiftedTokens, collate_packed, packed_tokens

LOADERS = {
    "collate_packed": {"collate_fn": collate_packed},
    "narrow": {"collate_fn": functools.partial(collate_packed, narrow=True)},
    "packed_tokens": {"transform": packed_tokens},
    "shifted": {"transform": ShiftedTokens(length=16)},
    "stored": {},
}


@pytest.fixture
def build(tmp_path: Path):
    shards = write_toy_shards(tmp_path, {"source/a": 40, "target/x": 40}, tokens=16)
    return builder(shards, tmp_path / "cache", samples_per_reweight=8)


def batches(build, workers: int, loader: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    """All batches, kept: with two batches ahead, far more than there are slots."""
    given = dict(loader)
    sampler = build(transform=given.pop("transform", None))
    return list(MixingDataLoader(sampler, batch_size=6, num_workers=workers, **given, **settings))


def assert_same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        assert list(first) == list(second)
        for name, value in first.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == second[name].dtype
                assert torch.equal(value, second[name]), name
            else:
                assert value == second[name], name


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_data_workers(build, loader, workers):
    assert_same(batches(build, 0, loader), batches(build, workers, loader))


def test_batches_of_spawned_workers(build):
    loader = LOADERS["collate_packed"]
    assert_same(batches(build, 0, loader), batches(build, 1, loader, multiprocessing_context="spawn"))


def test_a_batch_in_use_is_not_written_over(build):
    """Each batch is compared with a copy after several later ones have come; most others were given back by then."""
    loader = MixingDataLoader(build(exhausted="repeat"), batch_size=6, num_workers=2, collate_fn=collate_packed)
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    for number, batch in zip(range(60), loader, strict=False):
        if number % 7 == 0:
            held.append((batch["input_ids"][1:], batch["input_ids"][1:].clone()))
        if len(held) > 3:
            tokens, copy = held.pop(0)
            assert torch.equal(tokens, copy)
    assert len(held) == 3


def test_memory_is_used_again(build):
    loader = MixingDataLoader(build(exhausted="repeat"), batch_size=6, num_workers=1, collate_fn=collate_packed)
    places = {batch["input_ids"].data_ptr() for _, batch in zip(range(40), loader, strict=False)}
    assert len(places) <= 4


def without_space(_: int) -> None:
    """In a data worker: no file, and so no shared memory, may be larger than a batch."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def one_by_one(sample: Any) -> Any:
    """A transform of the user, with which rows are read one by one and collated by torch's function."""
    return packed_tokens(sample)


@pytest.mark.parametrize("loader", [LOADERS["collate_packed"], {"transform": one_by_one}], ids=["packed", "one by one"])
def test_batches_do_not_depend_on_space_for_shared_memory(build, loader):
    assert_same(batches(build, 0, loader), batches(build, 2, loader, worker_init_fn=without_space, timeout=60))


def test_a_batch_outlives_its_loader(build):
    loader = MixingDataLoader(build(), batch_size=6, num_workers=1, collate_fn=collate_packed)
    stream = iter(loader)
    held = [next(stream) for _ in range(3)]
    copies = [batch["input_ids"].clone() for batch in held]
    del loader, stream
    gc.collect()
    assert all(torch.equal(batch["input_ids"], copy) for batch, copy in zip(held, copies, strict=True))


def test_persistent_workers_use_their_slots_in_a_second_pass(build):
    sampler = build()
    loader = MixingDataLoader(
        sampler, batch_size=6, num_workers=2, persistent_workers=True, collate_fn=collate_packed, samples_per_step=6
    )
    first = [batch["__index__"].tolist() for _, batch in zip(range(3), loader, strict=False)]
    sampler.reweight_due(18)
    second = [batch["__index__"].tolist() for batch in loader]
    assert [index for batch in first + second for index in batch] == list(range(78))


def test_a_forked_process_does_not_give_a_batch_back():
    slots = Slots(1, 1)
    function, address = slots.filled(0, {"a": torch.ones(4)}).__reduce__()
    batch = function(*address)
    child = os.fork()
    if not child:
        del batch
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    other = {"a": torch.zeros(4)}
    assert slots.filled(0, other) is other
    assert batch["a"].tolist() == [1] * 4
