"""The rows of text shards whose documents are packed when they are read.

Row r of a shard is the tokens from r * length up to (r + 1) * length of its documents, joined. The token counts of the
documents so determine how many rows a shard has and which documents a row needs, and a plan over these rows is as exact
as one over stored rows: there is no state of the packing to save or to carry from one mix to the next.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmagent_loader.errors import HOW_TO_RESUME, DecodeError, EmptyShardError, ShardError
from dmagent_loader.shards.bounded_cache import BoundedCache
from dmagent_loader.shards.collection import ShardCollection
from dmagent_loader.shards.decode import RawSample
from dmagent_loader.shards.packed.config import PackText
from dmagent_loader.shards.packed.counts import Counts, TokenCounts
from dmagent_loader.shards.packed.encoder import DocumentEncoder
from dmagent_loader.shards.sources.blocks import IntArray
from dmagent_loader.shards.sources.checksum import crc32
from dmagent_loader.shards.sources.fetching import BlockFetcher
from dmagent_loader.shards.writing.packing import LENGTHS_MEMBER, PACKED_MEMBER, TokenArray, encode_npy

_MAX_DOCUMENT_BYTES, _MAX_ENDS_BYTES = 128 << 20, 256 << 20
"""Memory, in each process, for the tokens of documents read lately and for the positions of documents."""
_DOCUMENT_BYTES = 300
"""Memory of a cached document besides its tokens."""
_LARGE_REMAINDER = 0.01
"""Share of the tokens of a domain in no row, above which a warning says so."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PackingAccount:
    """The tokens of one domain: ``tokens == rows * length + remainder``.

    Attributes:
        documents: Documents with tokens.
        tokens: Their tokens, with end-of-text tokens.
        rows: Rows of the domain.
        remainder: Tokens at the ends of shards that fill no row.
        bad_documents: Rows of the shards that cannot be packed and are left out.
    """

    documents: int
    tokens: int
    rows: int
    remainder: int
    bad_documents: int


class PackedRows:
    """The packed rows of all domains, readable by (domain, shard, row) like a `ShardCollection`. Made by `open`."""

    def __init__(self, collection: ShardCollection, pack: PackText, counts: TokenCounts) -> None:
        self._collection, self._encoder, self._length = collection, pack.encoder, pack.length
        self.packing: str | None = pack.description
        self.accounts: dict[str, PackingAccount] = {}
        """Domain -> its tokens."""
        self._counts = counts
        self._rows: list[NDArray[np.int64]] = []
        self._contents: list[NDArray[np.uint64]] = []
        self._start()

    def _start(self) -> None:
        # The functions do not refer to this object: a cycle would keep its files open until the garbage collector runs.
        self._ends: BoundedCache[tuple[int, int], NDArray[np.int64]] = BoundedCache(
            partial(_ends_of, self._counts), _MAX_ENDS_BYTES, weigh=lambda ends: ends.nbytes
        )
        self._documents: BoundedCache[tuple[int, int, int], tuple[str, TokenArray]] = BoundedCache(
            partial(_tokenised, self._collection, self._encoder),
            _MAX_DOCUMENT_BYTES,
            weigh=lambda document: document[1].nbytes + _DOCUMENT_BYTES,
        )

    @classmethod
    def open(
        cls,
        collection: ShardCollection,
        pack: PackText,
        *,
        cache_dir: Path,
        counts: TokenCounts | None = None,
        progress: bool = True,
        max_bad: float = 0,
    ) -> PackedRows:
        """Counts the tokens of all documents that were not counted before.

        Args:
            collection: The text shards.
            pack: Settings of the rows.
            cache_dir: Folder of the shard indexes; counts are kept there, too.
            counts: Counts that several ranks have made together; None: those in `cache_dir`.
            progress: Whether to show a progress bar while tokens are counted.
            max_bad: Bad documents that are left out: their largest number in all domains, or, as a float, their largest
                share of each domain.

        Raises:
            DecodeError: There are more bad documents.
            EmptyShardError: No shard of a domain has enough tokens for a row.
        """
        rows = cls(collection, pack, counts or TokenCounts(collection, pack.encoder, cache_dir))
        rows._count(progress, max_bad)
        return rows

    def _count(self, progress: bool, max_bad: float) -> None:
        domains = len(self._collection.domains)
        tokens = [np.zeros(len(self._collection.shard_rows(d)), np.int64) for d in range(domains)]
        bad = [np.zeros_like(of_domain) for of_domain in tokens]
        self._contents = [np.zeros(len(of_domain), np.uint64) for of_domain in tokens]
        for domain, shard, counts in self._counts.all(progress):
            tokens[domain][shard] = counts.sum(dtype=np.int64)
            bad[domain][shard] = np.count_nonzero(counts == 0)
            if bad[domain][shard] and not max_bad:
                self._refuse(domain, shard, int(np.flatnonzero(counts == 0)[0]), int(bad[domain][shard]), max_bad)
            self._contents[domain][shard] = self._content(domain, shard, counts)
        self._rows = [of_domain // self._length for of_domain in tokens]
        found = 0
        for domain, name in enumerate(self._collection.domains):
            documents, left_out = int(self._collection.shard_rows(domain).sum()), int(bad[domain].sum())
            found, allowed = (
                (left_out, max_bad * documents) if isinstance(max_bad, float) else (found + left_out, max_bad)
            )
            if found > allowed:
                shard = int(np.flatnonzero(bad[domain])[0])
                row = int(np.flatnonzero(self._counts.of(domain, shard) == 0)[0])
                self._refuse(domain, shard, row, found, max_bad)
            total, rows = int(tokens[domain].sum()), int(self._rows[domain].sum())
            account = PackingAccount(
                documents=documents - left_out,
                tokens=total,
                rows=rows,
                remainder=total - rows * self._length,
                bad_documents=left_out,
            )
            self.accounts[name] = account
            self._report(name, account, tokens[domain])

    def _refuse(self, domain: int, shard: int, row: int, count: int, max_bad: float) -> None:
        where = (
            f"domain {self._collection.domains[domain]!r}, row {row} of shard {self._collection.display(domain, shard)}"
        )
        error = self._counts.fault(domain, shard, row)
        others = f" ({count} such rows)" if count > 1 else ""
        remedy = (
            f"more than max_bad_rows={max_bad} allows: raise it (ReadingConfig)"
            if max_bad
            else "pass on_bad_row='skip' to leave such documents out"
        )
        raise DecodeError(f"{where} cannot be packed{others}: {error}; {remedy}, or repair the shard; {HOW_TO_RESUME}")

    def _report(self, name: str, account: PackingAccount, tokens: NDArray[np.int64]) -> None:
        if not account.rows:
            raise EmptyShardError(
                f"domain {name!r} has {account.tokens} tokens in {len(tokens)} shard(s), the largest with "
                f"{tokens.max(initial=0)}, and a row needs {self._length} of one shard: pass a smaller length, or put "
                f"the documents into fewer shards; {HOW_TO_RESUME}"
            )
        share = account.remainder / account.tokens
        level = logging.WARNING if share > _LARGE_REMAINDER else logging.INFO
        logger.log(
            level,
            "packing: domain %r has %d documents with %d tokens in %d rows of %d; %d tokens (%.2f%%) at the ends of "
            "its %d shard(s) fill no row%s",
            name,
            account.documents,
            account.tokens,
            account.rows,
            self._length,
            account.remainder,
            100 * share,
            len(tokens),
            ": put the documents into fewer shards to lose less" if level == logging.WARNING else "",
        )
        if account.bad_documents:
            logger.warning("packing: domain %r: %d rows cannot be packed and are left out", name, account.bad_documents)

    def _content(self, domain: int, shard: int, counts: Counts) -> int:
        """64 bits that identify the rows of a shard: its content, the packing, and the tokens of each document."""
        stored = int(self._collection.shard_contents(domain)[shard])
        data = struct.pack("<QI", stored, crc32(counts.tobytes())) + str(self.packing).encode()
        return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")

    # The rows

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in the order of their numbers."""
        return self._collection.domains

    @property
    def is_local(self) -> bool:
        """Whether all shards are local files."""
        return self._collection.is_local

    @property
    def num_rows(self) -> NDArray[np.int64]:
        """(D,) number of rows of each domain."""
        return np.array([rows.sum() for rows in self._rows], np.int64)

    def shard_rows(self, domain: int) -> NDArray[np.int64]:
        """(S,) number of rows of each shard of a domain, in listed order."""
        return self._rows[domain]

    def shard_contents(self, domain: int) -> NDArray[np.uint64]:
        """(S,) 64 bits that identify the rows of each shard of a domain."""
        return self._contents[domain]

    def shard_names(self, domain: int) -> Sequence[str]:
        """File names of the shards of a domain, without folders."""
        return self._collection.shard_names(domain)

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over the fingerprint of the shards, the packing, and the tokens of all documents."""
        digest = hashlib.sha256(f"{self._collection.fingerprint} {self.packing}".encode())
        for contents in self._contents:
            digest.update(contents.tobytes())
        return digest.hexdigest()

    def read(self, domain: int, shard: int, row: int) -> RawSample:
        """Reads the documents of one row and packs them.

        The key of a row names the document in which it begins, and the number of that document's tokens before it.

        Args:
            domain: Number of the domain.
            shard: Number of the shard in the domain.
            row: Number of the row in the shard.

        Raises:
            IndexError: There is no such row.
            ShardError: A document has changed since its tokens were counted.
        """
        if not 0 <= row < self._rows[domain][shard]:
            raise IndexError(f"row {row} of shard {self.display(domain, shard)}, which has {self._rows[domain][shard]}")
        ends, begin, end = self._ends.get((domain, shard)), row * self._length, (row + 1) * self._length
        first, last = np.searchsorted(ends, begin, side="right"), np.searchsorted(ends, end, side="left")
        tokens = np.empty(self._length, self._encoder.dtype)
        key, lengths, filled = "", [], 0
        for document in range(int(first), int(last) + 1):
            size = int(ends[document] - (ends[document - 1] if document else 0))
            if not size:
                continue  # a bad row
            skipped = max(0, begin - int(ends[document]) + size)
            name, whole = self._documents.get((domain, shard, document))
            if len(whole) != size:
                raise ShardError(
                    f"document {name!r} of shard {self.display(domain, shard)} has {len(whole)} tokens, but {size} "
                    "were counted: the tokenizer behaves in another way than before; start the run again"
                )
            part = whole[skipped : skipped + self._length - filled]
            tokens[filled : filled + len(part)] = part
            key = key or f"{name}+{skipped}"
            filled += len(part)
            lengths.append(len(part))
        members = {PACKED_MEMBER: memoryview(encode_npy(tokens))}
        if not self._encoder.ends_are_certain:
            members[LENGTHS_MEMBER] = memoryview(encode_npy(np.array(lengths, np.uint32)))
        return RawSample(key, members)

    @property
    def fetcher(self) -> BlockFetcher | None:
        """The blocks of remote shards; None if all are local."""
        return self._collection.fetcher

    def blocks_of(self, domain: IntArray, shard: IntArray, row: IntArray) -> tuple[IntArray, IntArray]:
        """Keys of the blocks with the first and the last document of each row; see `ShardCollection.blocks_of`."""
        first, last = np.empty_like(row), np.empty_like(row)
        shards, of_row = np.unique(np.column_stack([domain, shard]), axis=0, return_inverse=True)
        for number, place in enumerate(shards.tolist()):
            chosen = np.flatnonzero(of_row == number)
            ends, begin = self._ends.get((place[0], place[1])), row[chosen] * self._length
            first[chosen] = np.searchsorted(ends, begin, side="right")
            last[chosen] = np.searchsorted(ends, begin + self._length, side="left")
        return (
            self._collection.blocks_of(domain, shard, first)[0],
            self._collection.blocks_of(domain, shard, last)[0],
        )

    def array_rows(self, extension: str) -> None:
        """None: packed rows are not stored, and each is read separately."""

    def missing_members(self, domain: int, shard: int, row: int) -> tuple[str, ...]:
        """Empty: all packed rows have the same members."""
        return ()

    def display(self, domain: int, shard: int) -> str:
        """The URL of a shard, for messages."""
        return self._collection.display(domain, shard)

    def close(self) -> None:
        """Closes the open files; a later read opens them again."""
        self._collection.close()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the caches."""
        return {**self.__dict__, "_ends": None, "_documents": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


def _ends_of(counts: TokenCounts, shard: tuple[int, int]) -> NDArray[np.int64]:
    """(R,) number of tokens of a shard up to the end of each document."""
    ends: NDArray[np.int64] = np.cumsum(counts.of(*shard), dtype=np.int64)
    return ends


def _tokenised(
    collection: ShardCollection, encoder: DocumentEncoder, address: tuple[int, int, int]
) -> tuple[str, TokenArray]:
    """Key and tokens of a document."""
    row = collection.read(*address)
    (tokens,) = encoder.tokens([row])
    if isinstance(tokens, DecodeError):
        raise tokens
    return row.key, tokens
