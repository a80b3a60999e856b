"""Rows to samples: decoded at once, or lazily when one of their values is asked for.

Lazy rows of one batch can be read together into one array, which `dmagent_loader.transforms.collate_packed` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dmagent_loader.errors import DecodeError
from dmagent_loader.shards import RawSample, ShardCollection, decode_npy_rows

Sample = dict[str, Any]
RowAddress = tuple[int, int, int, int, int]
"""(global index, domain, draw, shard, row) of a sample."""


class RowReader:
    """Reads and decodes the samples of one iterator.

    Args:
        collection: The shards.
        decode: From the bytes of a row to its values.
    """

    def __init__(self, collection: ShardCollection, decode: Callable[[RawSample], Sample]) -> None:
        self.collection, self._decode = collection, decode
        self.names = collection.domains

    def sample(self, address: RowAddress, raw: RawSample | None = None) -> Sample:
        """A sample with its tags.

        Args:
            address: Its domain, draw, shard and row.
            raw: Its bytes, if they were read already.

        Raises:
            DecodeError: It cannot be decoded; the message names domain and shard.
            DamagedShardError: The shard changed since it was indexed.
        """
        index, domain, _, shard, row = address
        if raw is None:
            raw = self.collection.read(domain, shard, row)
        try:
            values = self._decode(raw)
        except DecodeError as error:
            where = f"domain {self.names[domain]!r}, row {row} of shard {self.collection.display(domain, shard)}"
            raise DecodeError(f"{where}: {error}") from error
        return {"__key__": raw.key, "__domain__": self.names[domain], "__index__": index, **values}


class LazyRow(Mapping[str, Any]):
    """A sample that is read when one of its values is asked for; otherwise as any other sample, but read-only.

    Args:
        reader: Of its iterator.
        address: Its domain, draw, shard and row.
    """

    __slots__ = ("_address", "_reader", "_sample")

    def __init__(self, reader: RowReader, address: RowAddress) -> None:
        self._reader, self._address = reader, address
        self._sample: Sample | None = None

    def read(self) -> Sample:
        """The sample, read once."""
        if self._sample is None:
            self._sample = self._reader.sample(self._address)
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
        # Another process gets the values, not the files.
        return dict, (self.read(),)


def read_together(samples: Sequence[Mapping[str, Any]], member: str) -> tuple[Sample, np.ndarray[Any, Any]] | None:
    """The arrays of one member of a batch, read into one array.

    Args:
        samples: What a sampler gave.
        member: An npy member of one dimension.

    Returns:
        The tags as lists, and the values, (B, T). None: not all are lazy rows of one sampler, with this member alone,
        in local shards, with the same npy header, read for the first time; then each has to be read by itself.

    Raises:
        DamagedShardError: A shard changed since it was indexed.
    """
    reader = samples[0]._reader if samples and type(samples[0]) is LazyRow else None
    if reader is None:
        return None
    addresses = []
    for sample in samples:
        if type(sample) is not LazyRow or sample._reader is not reader or sample._sample is not None:
            return None
        addresses.append(sample._address)
    found = reader.collection.read_equal([(domain, shard, row) for _, domain, _, shard, row in addresses], member)
    if found is None:
        return None
    keys, data = found
    try:
        values = decode_npy_rows(data)
    except DecodeError:
        return None  # read by itself, the row is named in the error
    if values is None:
        return None
    names = reader.names
    tags = {
        "__key__": keys,
        "__domain__": [names[address[1]] for address in addresses],
        "__index__": [address[0] for address in addresses],
    }
    return tags, values
