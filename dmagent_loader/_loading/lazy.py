"""From rows to samples: decoded at once, or lazily on the first access to a value.

The lazy rows of one batch can be read together into one array: see `dmagent_loader.transforms.collate_packed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmagent_loader.errors import DecodeError
from dmagent_loader.mixture.simplex import IntArray
from dmagent_loader.shards import RawSample, RowSource
from dmagent_loader.shards.array_rows import ArrayRows, Buffers

Sample = dict[str, Any]
RowAddress = tuple[int, int, int, int, int]
"""(global index, domain, draw, shard, row) of a sample."""

TAGS = ("__index__", "__key__", "__domain__")
"""Entries of every sample besides its members; the number first, because accelerate takes the size of a batch from the
first entry, and cannot from strings."""


Substitute = Callable[[RowAddress, Exception, Callable[[RowAddress], Any]], Any]
"""From the address of a bad row, its error, and a function that makes samples, to a sample of another row."""


class RowReader:
    """Reads and decodes the samples of one iterator.

    Args:
        collection: The shards.
        decode: Function from the bytes of a row to its values.
        substitute: Function for bad rows; it raises the error again if these are not skipped.
        check_members: Whether a row is bad if it lacks a member that most rows of its shard have.
    """

    def __init__(
        self,
        collection: RowSource,
        decode: Callable[[RawSample], Sample],
        substitute: Substitute,
        *,
        check_members: bool = False,
    ) -> None:
        self.collection, self.substitute = collection, substitute
        self._decode, self._check_members = decode, check_members
        self.names = collection.domains
        self.buffers = Buffers()
        """Memory for rows that are read together."""
        self._array_rows: dict[str, ArrayRows | None] = {}

    def array_rows(self, member: str) -> ArrayRows | None:
        """The reader of many rows at a time, as `RowSource.array_rows`; it knows the format of rows read before."""
        if member not in self._array_rows:
            self._array_rows[member] = self.collection.array_rows(member)
        return self._array_rows[member]

    def sample(self, address: RowAddress, raw: RawSample | None = None) -> Sample:
        """A sample with its tags.

        Args:
            address: Address of the row.
            raw: Bytes of the row; None: they are read now.

        Raises:
            DecodeError: The row cannot be decoded, or lacks a member; the message names domain and shard.
            DamagedShardError: The shard changed since it was indexed.
        """
        index, domain, _, shard, row = address
        if raw is None:
            raw = self.collection.read(domain, shard, row)
        try:
            values = self._decode(raw)
            if self._check_members and (missing := self.collection.missing_members(domain, shard, row)):
                raise DecodeError(f"the row has no {' and no '.join(missing)}, which most rows of its shard have")
        except DecodeError as error:
            where = f"domain {self.names[domain]!r}, row {row} of shard {self.collection.display(domain, shard)}"
            raise DecodeError(f"{where}: {error}") from error
        return {"__index__": index, "__key__": raw.key, "__domain__": self.names[domain], **values}


class LazyRow(Mapping[str, Any]):
    """A read-only sample that is read from its shard on the first access to a value.

    Args:
        reader: Reader of the iterator that delivered it.
        address: Address of the row.
    """

    __slots__ = ("_address", "_reader", "_sample")

    def __init__(self, reader: RowReader, address: RowAddress) -> None:
        self._reader, self._address = reader, address
        self._sample: Sample | None = None

    def read(self) -> Sample:
        """The sample, read once."""
        if self._sample is None:
            try:
                self._sample = self._reader.sample(self._address)
            except Exception as error:
                self._sample = self._reader.substitute(self._address, error, self._reader.sample)
        return self._sample

    def __getitem__(self, name: str) -> Any:
        return self.read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.read())

    def __len__(self) -> int:
        return len(self.read())

    def __repr__(self) -> str:
        return f"LazyRow({self.read()!r})"

    def __reduce__(self) -> tuple[type[Sample], tuple[Sample]]:
        # Another process receives the values, not the open files.
        return dict, (self.read(),)


@dataclass(frozen=True)
class Columns:
    """A batch of rows with one array of the same shape each, read together.

    Attributes:
        index: (B,) int64 global indices.
        domain: Name of the domain of each row.
        values: (B, T) the arrays.
        keys: Function that returns the keys of the rows.
    """

    index: IntArray
    domain: list[str]
    values: np.ndarray[Any, Any]
    keys: Callable[[], list[str]]


def read_together(samples: Sequence[Mapping[str, Any]], member: str) -> Columns | None:
    """The arrays of one member of a batch, read into one array.

    Args:
        samples: B samples of a sampler.
        member: Name of an npy member of one dimension.

    Returns:
        None if each row has to be read separately: unless all are lazy rows of one sampler, not read before, with this
        member alone, whole, with the same npy header and, in remote shards, with their blocks at hand.
    """
    reader = samples[0]._reader if samples and type(samples[0]) is LazyRow else None
    rows = None if reader is None else reader.array_rows(member)
    if reader is None or rows is None:
        return None
    addresses = []
    for sample in samples:
        if type(sample) is not LazyRow or sample._reader is not reader or sample._sample is not None:
            return None
        addresses.append(sample._address)
    index, domain, _, shard, row = zip(*addresses, strict=True)
    spans = rows.find_few(domain, shard, row)
    values = rows.read(spans, reader.buffers)
    if values is None:
        return None
    names = [reader.names[number] for number in domain]
    return Columns(np.array(index, np.int64), names, values, lambda: rows.keys(spans))
