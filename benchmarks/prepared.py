"""The prepared data that all loaders read, as they see it: shards per domain, a mix, and what each row contains.

Needs nothing but numpy, because it is used in every loader's own environment. benchmarks/data.py makes the data.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

ROW_TOKENS = 2048
TOKEN_DTYPE = np.dtype(np.uint16)
MEMBER = {"packed": "input_ids.npy", "text": "txt"}


class Prepared:
    """Shards of one kind of rows.

    Args:
        folder: Of the kind: ``bench_data/packed`` or ``bench_data/text``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kind = folder.name
        self.member = MEMBER[self.kind]
        self._meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())

    @property
    def stamp(self) -> str:
        """Tells one making of the data from another."""
        return str(self._meta["stamp"])

    @property
    def manifest(self) -> Path:
        """The manifest of the shards, as ``dmagent shard`` writes it."""
        return self.folder / "shards" / "manifest.json"

    @property
    def domains(self) -> list[str]:
        """Names of all domains, in order."""
        return list(self._meta["domains"])

    @property
    def mix(self) -> dict[str, float]:
        """The mix that every loader is asked for."""
        return {name: entry["weight"] for name, entry in self._meta["domains"].items()}

    @property
    def mean_row_bytes(self) -> float:
        """Bytes of a row under the mix, without tar headers."""
        return sum(entry["weight"] * entry["row_bytes"] for entry in self._meta["domains"].values())

    def tars(self, domain: str) -> list[str]:
        """Paths of a domain's shards."""
        return [str(self.folder / "shards" / path) for path in self._meta["domains"][domain]["shards"]]

    def num_rows(self, domain: str) -> int:
        """Rows of a domain."""
        return int(self._meta["domains"][domain]["rows"])

    def rows(self, domain: str) -> Iterator[Any]:
        """Rows of a domain in the order of its shards: (ROW_TOKENS,) uint16, or str."""
        for path in self.tars(domain):
            with tarfile.open(path) as tar:
                for info in tar:
                    file = tar.extractfile(info)
                    assert file is not None
                    yield decode(self.kind, file.read())

    @cached_property
    def domain_of_row(self) -> dict[bytes, int]:
        """Digest of a row's content -> number of its domain."""
        with np.load(self.folder / "contents.npz") as file:
            digests, domains = file["digests"], file["domains"]
        return {digest.tobytes(): int(domain) for digest, domain in zip(digests, domains, strict=True)}

    def count(self, rows: list[Any]) -> np.ndarray:
        """Rows of each domain among those delivered, recognised by their whole content.

        Raises:
            AssertionError: A row that is in no shard: not what was stored.
        """
        counts = np.zeros(len(self.domains), np.int64)
        for row in rows:
            number = self.domain_of_row.get(digest(row))
            assert number is not None, f"a delivered row is in no shard: {row!r}"
            counts[number] += 1
        return counts


def decode(kind: str, data: bytes) -> Any:
    """A row from the bytes of its member."""
    if kind == "text":
        return data.decode()
    # The header of a version 1 .npy file is 128 bytes for these arrays; np.load is many times slower.
    return np.frombuffer(data, TOKEN_DTYPE, ROW_TOKENS, offset=len(data) - ROW_TOKENS * TOKEN_DTYPE.itemsize)


def digest(row: Any) -> bytes:
    """Eight bytes that tell a row from others: of its tokens in their stored type, or of its text."""
    content = row.encode() if isinstance(row, str) else np.asarray(row).astype(TOKEN_DTYPE).tobytes()
    return hashlib.blake2b(content, digest_size=8).digest()
