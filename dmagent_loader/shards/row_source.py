"""What a run reads: the rows of domains, stored in shards or packed from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dmagent_loader.shards.array_rows import ArrayRows
from dmagent_loader.shards.decode import RawSample
from dmagent_loader.shards.sources.blocks import IntArray
from dmagent_loader.shards.sources.fetching import BlockFetcher


class RowSource(Protocol):
    """Rows that are read by (domain, shard, row). `ShardCollection` documents the members.

    Reading is safe from many threads and after a fork, and the object can be pickled.
    """

    @property
    def domains(self) -> tuple[str, ...]: ...
    @property
    def is_local(self) -> bool: ...
    @property
    def num_rows(self) -> NDArray[np.int64]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def packing(self) -> str | None:
        """All that determines the rows besides the shards; None: the rows are those of the shards."""

    @property
    def fetcher(self) -> BlockFetcher | None:
        """The blocks of remote shards; None if all are local."""

    def blocks_of(self, domain: IntArray, shard: IntArray, row: IntArray) -> tuple[IntArray, IntArray]: ...
    def shard_rows(self, domain: int) -> NDArray[np.int64]: ...
    def shard_contents(self, domain: int) -> NDArray[np.uint64]: ...
    def shard_names(self, domain: int) -> Sequence[str]: ...
    def read(self, domain: int, shard: int, row: int) -> RawSample: ...
    def missing_members(self, domain: int, shard: int, row: int) -> tuple[str, ...]: ...
    def array_rows(self, extension: str) -> ArrayRows | None: ...
    def display(self, domain: int, shard: int) -> str: ...
    def close(self) -> None: ...
