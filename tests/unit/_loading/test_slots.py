"""Shared memory that is used again: a batch comes out as it went in, and stays so while anything refers to it."""

from __future__ import annotations

import gc
import pickle
import resource
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from samplers import logged

from dmagent_loader._loading import slots as slots_module
from dmagent_loader._loading.slots import Slots


def through(slots: Slots, batch: dict) -> dict:
    """The batch as the main process gets it, without the queue between."""
    filled = slots.filled(0, batch)
    if filled is batch:
        return batch
    function, address = filled.__reduce__()
    return function(*address)


def in_slot(slots: Slots, count: int) -> bool:
    """Whether a batch of some tokens goes through a slot."""
    batch = {"input_ids": torch.zeros(count)}
    return through(slots, batch) is not batch


def test_a_batch_comes_out_as_it_went_in():
    batch = {
        "__index__": torch.arange(3),
        "__key__": ["a", "b", "c"],
        "input_ids": torch.tensor([[1, 65_535], [3, 4], [5, 6]], dtype=torch.uint16),
        "labels": torch.arange(12).reshape(3, 4)[:, ::2],
        "mask": torch.tensor([True, False, True]),
        "nothing": torch.empty(0, 5),
        "number": torch.tensor(0.5),
        "other": None,
    }
    found = through(Slots(1, 1), batch)
    assert list(found) == list(batch)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)
            assert found[name].is_contiguous()
        else:
            assert found[name] is value


def test_a_slot_is_used_again_once_nothing_refers_to_its_batch():
    slots = Slots(1, 1)
    first = through(slots, {"a": torch.ones(4), "b": torch.ones(4)})
    place = first["a"].data_ptr()
    part = first["b"][2:].numpy()
    del first
    gc.collect()
    assert not in_slot(slots, 4), "part of the batch is still in use"
    assert part.tolist() == [1, 1]
    del part
    assert through(slots, {"a": torch.zeros(4)})["a"].data_ptr() == place


def test_without_a_free_slot_a_batch_gets_new_memory():
    slots = Slots(2, 2)
    kept = [through(slots, {"a": torch.full((4,), number)}) for number in range(5)]
    assert [batch["a"].tolist() for batch in kept] == [[number] * 4 for number in range(5)]
    del kept[1]
    assert in_slot(slots, 4)


def test_a_larger_batch_gets_a_larger_slot():
    slots = Slots(1, 1)
    small = through(slots, {"a": torch.ones(4)})["a"].clone()
    large = through(slots, {"a": torch.arange(10_000)})["a"]
    assert small.tolist() == [1] * 4
    assert torch.equal(large, torch.arange(10_000))
    del large
    assert in_slot(slots, 4)


def test_tensors_that_were_made_in_a_slot_stay_there():
    slots = Slots(1, 1)
    keys = torch.arange(3)

    def sent(change) -> tuple[dict, bool]:
        """A batch of two halves of one tensor, and whether it was made in the slot."""
        wide = slots.empty(0, (2, 3, 5), dtype=torch.int64)
        is_in_slot = wide.is_shared()
        wide[0], wide[1] = 7, 8
        return through(slots, {"keys": keys, **change(wide)}), is_in_slot

    def halves(wide):
        return {"a": wide[0], "b": wide[1]}

    def is_whole(batch) -> bool:
        return [batch[name].tolist() for name in batch] == [keys.tolist(), [[7] * 5] * 3, [[8] * 5] * 3]

    first, was_in_slot = sent(halves)
    assert is_whole(first)
    assert not was_in_slot, "there is no slot yet"
    second, was_in_slot = sent(halves)
    assert is_whole(second)
    assert not was_in_slot, "the slot is taken"
    del first, second
    for _ in range(2):
        batch, was_in_slot = sent(halves)
        assert is_whole(batch)
        assert was_in_slot
        del batch
    slots.empty(0, (2, 3, 5), dtype=torch.int64).fill_(1)  # of a batch that failed
    assert through(slots, {"keys": keys})["keys"].tolist() == keys.tolist()
    batch, was_in_slot = sent(lambda wide: {"a": wide[0].clone(), "b": wide[1].clone()})
    assert is_whole(batch)
    assert was_in_slot
    del batch
    mixed = slots.empty(0, (4, 6), dtype=torch.int64)
    mixed.copy_(torch.arange(24).view(4, 6))
    assert mixed.is_shared()
    assert torch.equal(through(slots, {"a": mixed.T})["a"], torch.arange(24).view(4, 6).T), "copied over itself"
    batch, was_in_slot = sent(lambda wide: {**halves(wide), "more": torch.ones(1000)})
    assert was_in_slot
    assert batch.pop("more").sum() == 1000, "a larger slot"
    assert is_whole(batch)


def test_without_space_for_shared_memory_the_bytes_are_sent(caplog):
    """torch would lose the batch, because it makes its shared memory in a thread whose errors nobody sees."""
    slots, limit = Slots(1, 1), resource.getrlimit(resource.RLIMIT_FSIZE)
    batch = {"__key__": ["a"], "a": torch.arange(5000), "b": torch.ones(3)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        for _ in range(2):
            found = pickle.loads(pickle.dumps(slots.filled(0, batch)))
            assert list(found) == list(batch)
            assert torch.equal(found["a"], batch["a"])
            found["b"] += 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert len(logged(caplog, "docker run --shm-size")) == 1
    assert in_slot(slots, 5000)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda batch: batch,
        lambda batch: [batch, "text"],
        lambda batch: [("row", batch)],
        lambda batch: {"rows": [batch], "index": torch.ones(2)},
    ],
    ids=["no free slot", "list", "pairs", "in a list in a dict"],
)
def test_without_space_a_batch_that_is_in_no_slot_is_sent_as_bytes(wrap):
    slots, limit = Slots(1, 1), resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = through(slots, {"a": torch.ones(3)})
    tensors = {
        "half": torch.ones(2, 4, dtype=torch.bfloat16)[:, ::2],
        "none": torch.empty(0, 3),
        "one": torch.tensor(5),
    }
    batch = wrap({"a": torch.arange(5000), **tensors, "narrow": torch.tensor([[65_535], [1]], dtype=torch.uint16)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        found = pickle.loads(ForkingPickler.dumps(slots.filled(0, batch)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert str(found) == str(batch)
    assert kept["a"].sum() == 3


def test_lists_of_numbers_are_not_searched_for_tensors(monkeypatch):
    """64 rows of 4,096 token ids took 0.1 s of each batch."""
    searched, search = [], slots_module._tensors_to_share
    monkeypatch.setattr(slots_module, "_tensors_to_share", lambda value: searched.append(value) or search(value))
    batch = {"__key__": ["a", "b"], "rows": [[1, 2, 3], [4.5, None]], "a": torch.ones(3)}
    assert through(Slots(1, 1), batch)["rows"] == batch["rows"]
    assert not any(isinstance(value, (int, float, str)) for value in searched)
    assert batch["rows"][0] in searched


@pytest.mark.parametrize(
    "batch",
    [[torch.ones(2)], {"text": ["a"]}, {"a": torch.ones(2, requires_grad=True)}, {"a": torch.eye(2).to_sparse()}],
    ids=["list", "no tensors", "gradient", "sparse"],
)
def test_other_batches_stay_as_they_are(batch):
    assert Slots(1, 1).filled(0, batch) is batch
