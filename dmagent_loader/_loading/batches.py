"""Whole batches: packed rows are read together and converted at once, and data workers pass them in `slots`.

The batches are those that `torch.utils.data.DataLoader` makes from the samples of a sampler, one by one. Wherever rows
cannot be read together, samples are taken one by one here, too: at the end of a run, and where a row is damaged, has
another length or a second member. So the errors and the replacements of bad rows are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, default_collate, get_worker_info
from torch.utils.data._utils.collate import collate, collate_tensor_fn, default_collate_fn_map

from dmagent_loader._loading.lazy import Columns
from dmagent_loader._loading.slots import Empty, Slots
from dmagent_loader._loading.stream import SampleStream
from dmagent_loader.errors import DecodeError


@dataclass(frozen=True)
class Conversion:
    """How the samples of a batch become the batch.

    Attributes:
        collate: Function from samples to a batch.
        of_columns: Function from rows that were read together, and `torch.empty` or a function like it for the tensors
            of the batch, to their batch, or, with `to_samples`, to samples. A `DecodeError` means that they have to be
            read one by one. None: all are read one by one.
        to_samples: Whether `of_columns` returns samples, to be collated.
    """

    collate: Callable[[list[Any]], Any]
    of_columns: Callable[[Columns, Empty], Any] | None = None
    to_samples: bool = False


class Batches(IterableDataset[Any]):
    """The batches of a sampler.

    Args:
        samples: The sampler.
        batch_size: B.
        conversion: How samples become a batch.
        slots: Shared memory in which data workers pass their batches.
    """

    def __init__(
        self, samples: IterableDataset[Any], batch_size: int, conversion: Conversion, slots: Slots | None = None
    ) -> None:
        super().__init__()
        self._samples, self._batch_size, self._conversion, self._slots = samples, batch_size, conversion, slots

    def __iter__(self) -> Iterator[Any]:
        return _BatchStream(iter(self._samples), self._batch_size, self._conversion, self._slots)


class _BatchStream(Iterator[Any]):
    """The batches of one iterator over a sampler, which goes on after an error as the iterator does."""

    def __init__(self, samples: Iterator[Any], batch_size: int, conversion: Conversion, slots: Slots | None) -> None:
        self._samples, self._batch_size, self._conversion = samples, batch_size, conversion
        self._stream = samples if isinstance(samples, SampleStream) else None
        self._slots, self._worker = slots, get_worker_info()
        self._empty: Empty = torch.empty
        if slots is not None and self._worker is not None:
            self._empty = partial(slots.empty, self._worker.id)
            if conversion.collate is default_collate:
                self._conversion = replace(conversion, collate=_default_collate)

    def __next__(self) -> Any:
        batch = self._batch()
        if self._slots is None or self._worker is None:
            return batch
        return self._slots.filled(self._worker.id, batch)

    def _batch(self) -> Any:
        conversion, stream = self._conversion, self._stream
        of_columns = conversion.of_columns
        if stream is not None and of_columns is not None and (columns := stream.columns(self._batch_size)) is not None:
            try:
                converted = of_columns(columns, self._empty)
            except DecodeError:
                pass  # reading the rows one by one gives an error that names the row
            else:
                stream.advance(self._batch_size)
                return conversion.collate(converted) if conversion.to_samples else converted
        samples = list(islice(self._samples, self._batch_size))
        if not samples:
            raise StopIteration
        return conversion.collate(samples)


def _default_collate(samples: list[Any]) -> Any:
    """As torch's function, but in memory of this worker: the tensors go through a slot, and torch would end the run if
    there is no space in shared memory."""
    return collate(samples, collate_fn_map={**default_collate_fn_map, torch.Tensor: _stacked})


def _stacked(tensors: Any, *, collate_fn_map: Any = None) -> torch.Tensor:
    if tensors[0].is_nested or tensors[0].layout != torch.strided:
        collate_tensor_fn(tensors, collate_fn_map=collate_fn_map)  # refuses them
    return torch.stack(tensors)
