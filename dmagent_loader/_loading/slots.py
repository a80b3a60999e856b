"""Batches from data workers through shared memory that is used again.

torch passes each tensor of a worker in new shared memory: a file is made, its descriptor goes through a socket, both
processes map it, and the kernel clears and maps every page of it anew. That takes longer than reading the rows. Here
each worker keeps a few blocks, its *slots*, and writes its batches into them in turn:

| step | by | |
|---|---|---|
| tensors are made in a free slot, or copied into it; it is marked as taken | worker | none is free: new memory |
| the memory of a new slot, later only its number and the layout | through torch's queue | |
| the tensors of the batch are views of the slot | main process | |
| the slot is marked as free | main process | when the last of these tensors is gone |

Nothing waits for a slot, so the order of batches, the prefetch of the loader and the work of the queue stay torch's.
Without a free slot, and for tensors that are not directly in a dict, new shared memory is taken, as torch does.

Without space for a new slot or for new memory, the bytes themselves go through the queue. torch would lose the batch,
for which the trainer would wait for ever, because it takes the memory in a thread that only prints its errors.
"""

from __future__ import annotations

import io
import itertools
import logging
import math
import os
import pickle
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
"""Bytes to which each tensor of a slot is aligned."""
_PLAIN = frozenset((type(None), bool, int, float, str, bytes))
"""Types without tensors: a list of these alone is not searched, because a batch may hold 100,000 of them."""

_Layout = tuple[tuple[str, int, torch.dtype, tuple[int, ...]], ...]
"""Name, first byte, type and shape of each tensor in a slot."""

Empty = Callable[..., torch.Tensor]
"""`torch.empty` of a shape and a `dtype`, or a function like it."""

_numbers = itertools.count()
_in_use: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()
"""The slots of this main process, by number."""


class Slots:
    """The slots of all workers of a loader, in the main process or as a worker's copy.

    Args:
        num_workers: Data workers.
        per_worker: Slots of each. A worker needs one for each batch that it prepares ahead, and the trainer one for the
            batch that it uses and one for the next.
    """

    def __init__(self, num_workers: int, per_worker: int) -> None:
        self._number = next(_numbers)
        self._shared = torch.zeros((num_workers, per_worker), dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
        self._taken = self._shared.numpy()
        """Whether a slot of a worker is taken; single numbers of a tensor take ten times as long to read."""
        self._process = os.getpid()
        self._begun: tuple[int, int] | None = None
        """The slot of the last tensor that `empty` made, and its first byte behind that tensor."""
        self._blocks: dict[tuple[int, int], torch.Tensor] = {}
        self._lent: dict[tuple[int, int], weakref.ref[Any]] = {}
        self._is_full_reported = False
        _in_use[self._number] = self

    def __getstate__(self) -> dict[str, Any]:
        """For a spawned worker."""
        return {**self.__dict__, "_taken": None, "_blocks": {}, "_lent": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._taken = self._shared.numpy()

    # In a worker

    def empty(self, worker: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As `torch.empty`, for a tensor of the next batch: in a slot, so that `filled` need not copy it.

        Args:
            worker: Number of this worker.
            shape: Shape of the tensor.
            dtype: Its type.
        """
        slot, size = self._free(worker), math.prod(shape) * dtype.itemsize
        block = None if slot is None else self._blocks.get((worker, slot))
        if slot is None or block is None or len(block) < size:
            return torch.empty(shape, dtype=dtype)
        self._begun = slot, size
        return _view(block, 0, dtype, shape)

    def filled(self, worker: int, batch: Any) -> Any:
        """A batch in a slot or, if that is not possible, in new shared memory, to be put into a queue.

        Args:
            worker: Number of this worker.
            batch: Batch; the tensors in a dict are copied, whatever else is in it goes through the queue.
        """
        if type(batch) is not dict:
            return self._in_new_memory(batch)
        found = [(name, value) for name, value in batch.items() if _can_be_copied(value)]
        # The largest first, which `empty` puts at the beginning, too: all batches of one form are arranged alike.
        tensors = dict(sorted(found, key=lambda item: item[1].nbytes, reverse=True))
        if not any(tensor.nbytes for tensor in tensors.values()):
            return self._in_new_memory(batch)
        slot, end = self._begun or (self._free(worker), 0)
        self._begun = None
        if slot is None:
            return self._in_new_memory(batch)
        address = (worker, slot)
        block, new, is_shared = self._blocks.get(address), None, True
        layout, size = _arranged(tensors, block, end)
        if block is None or len(block) < size:
            layout, least = _arranged(tensors, None, 0)
            block = new = torch.empty(max(size, least), dtype=torch.uint8)
            is_shared = self._share(new)
        for (_, begin, dtype, shape), tensor in zip(layout, tensors.values(), strict=True):
            if block.data_ptr() + begin != tensor.data_ptr():
                _view(block, begin, dtype, shape).copy_(tensor)
        rest = self._in_new_memory({name: None if name in tensors else value for name, value in batch.items()})
        if not is_shared:
            return _Sent(_batch, block.numpy(), layout, rest)
        self._blocks[address], self._taken[address] = block, 1
        return _Sent(_from_slot, self._number, address, new, layout, rest)

    def _in_new_memory(self, batch: Any) -> Any:
        """A batch whose tensors are in shared memory, to be put into a queue; without space, as its bytes."""
        if all(map(self._share, _tensors_to_share(batch))):
            return batch
        data = io.BytesIO()
        _BytesPickler(data, pickle.HIGHEST_PROTOCOL).dump(batch)
        return _Sent(pickle.loads, data.getvalue())

    def _share(self, tensor: torch.Tensor) -> bool:
        """Moves the memory of a tensor to shared memory; False: there is no space for it."""
        try:
            tensor.share_memory_()  # type: ignore[no-untyped-call]
        except (RuntimeError, OSError) as error:
            if not self._is_full_reported:
                self._is_full_reported = True
                logger.warning(
                    "no space for a batch of %d bytes in shared memory (%s), so batches of data workers take longer: "
                    "give /dev/shm more space (docker run --shm-size), or use fewer workers or a smaller "
                    "prefetch_factor",
                    tensor.nbytes,
                    error,
                )
            return False
        return True

    def _free(self, worker: int) -> int | None:
        slot = self._taken[worker].tobytes().find(0)
        return None if slot < 0 else slot

    # In the main process

    def opened(self, slot: tuple[int, int], new: torch.Tensor | None, layout: _Layout, rest: dict[str, Any]) -> Any:
        """The batch in a slot. The slot is free again when all tensors of the batch are gone."""
        if new is not None:
            self._blocks[slot] = new
        lent = np.frombuffer(memoryview(self._blocks[slot].numpy()), np.uint8)  # type: ignore[arg-type]
        self._lent[slot] = weakref.ref(lent, self._release(slot))
        return _batch(lent, layout, rest)

    def _release(self, slot: tuple[int, int]) -> Callable[[Any], None]:
        taken, process = self._taken, self._process

        def release(_: Any) -> None:
            if os.getpid() == process:  # and not a process that was forked while the batch was in use
                taken[slot] = 0

        return release


class _Sent:
    """A batch on its way to the main process, where it arrives as the batch."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


class _BytesPickler(pickle.Pickler):
    """Writes the bytes of tensors, also of the types that torch's own way to pickle by value does not know."""

    def reducer_override(self, value: Any) -> Any:
        """How a value is made again; NotImplemented: as usual."""
        if not isinstance(value, torch.Tensor) or not _can_be_copied(value):
            return NotImplemented
        data = value.contiguous().view(-1).view(torch.uint8).numpy()
        return _from_bytes, (data, value.dtype, tuple(value.shape))


def _from_bytes(data: np.ndarray[Any, Any], dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(data).view(dtype).view(shape)


def _from_slot(number: int, *arguments: Any) -> Any:
    return _in_use[number].opened(*arguments)


def _batch(memory: np.ndarray[Any, Any], layout: _Layout, rest: dict[str, Any]) -> Any:
    whole = torch.from_numpy(memory)
    return rest | {name: _view(whole, begin, dtype, shape) for name, begin, dtype, shape in layout}


def _can_be_copied(value: Any) -> bool:
    if type(value) is not torch.Tensor or value.requires_grad:
        return False
    return value.device.type == "cpu" and value.layout == torch.strided


def _tensors_to_share(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in mappings, lists and tuples that torch would move to shared memory."""
    if isinstance(value, torch.Tensor):
        if _can_be_copied(value):
            yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors_to_share(one)
    elif isinstance(value, (list, tuple)) and not _PLAIN.issuperset(map(type, value)):
        for one in value:
            yield from _tensors_to_share(one)


def _arranged(tensors: dict[str, torch.Tensor], block: torch.Tensor | None, end: int) -> tuple[_Layout, int]:
    """Places for tensors in a block, and the bytes that they take.

    Args:
        tensors: The tensors.
        block: The block; None: a new one.
        end: Bytes from its beginning that may hold some of the tensors already, which stay there.
    """
    first, size, layout = 0 if block is None else block.data_ptr(), _aligned(end), []
    for name, tensor in tensors.items():
        begin = tensor.data_ptr() - first
        if not (0 <= begin < end and tensor.is_contiguous()):
            begin, size = size, size + _aligned(tensor.nbytes)
        layout.append((name, begin, tensor.dtype, tuple(tensor.shape)))
    return tuple(layout), size


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _view(block: torch.Tensor, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return block[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
