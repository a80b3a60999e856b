"""Chunks: documents on their way from the inputs to the shards, in files that are whole or not there.

A chunk holds the documents of a part of a piece, sorted by their keys. The keys say where in the domain a document
belongs: random numbers for a shuffled order, its position otherwise. So the order of a domain depends neither on where
chunks end nor on which process wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from dmagent_loader._files import write_atomically

_RECORD_BITS = 40
"""Bits of a key for the number of a record in its piece."""


@dataclass
class Counts:
    """What a piece gave, up to the end of a chunk.

    Attributes:
        records: Records read, whatever became of them.
        documents: Documents with text.
        empty: Documents without text, which are left out.
        bad: Records that are no documents.
        special: Documents whose text spells a special token.
        elements: Tokens, or bytes of text and columns.
        tar_bytes: Size of the documents as rows of text in a tar.
        columns: Columns to keep that were found.
        last_reason: Reason of the last bad record.
    """

    records: int = 0
    documents: int = 0
    empty: int = 0
    bad: int = 0
    special: int = 0
    elements: int = 0
    tar_bytes: int = 0
    columns: list[str] = field(default_factory=list)
    last_reason: str = ""

    def __add__(self, other: Counts) -> Counts:
        sums = {
            name: value + getattr(other, name)
            for name, value in asdict(self).items()
            if name not in ("columns", "last_reason")
        }
        columns = sorted({*self.columns, *other.columns})
        return Counts(**sums, columns=columns, last_reason=other.last_reason or self.last_reason)


def keys_of(records: Sequence[int], piece: int, seed: int | None) -> NDArray[np.uint64]:
    """Keys of documents, (n,).

    Args:
        records: Numbers of their records in the piece.
        piece: Number of the piece in its domain.
        seed: Seed of the order; None: the order of the input.
    """
    positions = np.array(records, np.uint64) + np.uint64(piece << _RECORD_BITS)
    if seed is None:
        return positions
    # splitmix64 (Steele, Lea and Flood, 2014), a bijection: no two documents have the same key.
    step, first, second = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
    with np.errstate(over="ignore"):
        mixed = positions ^ np.uint64(int(np.random.default_rng(seed).integers(1 << 63)))
        mixed = mixed + step
        mixed = (mixed ^ (mixed >> np.uint64(30))) * first
        mixed = (mixed ^ (mixed >> np.uint64(27))) * second
        return mixed ^ (mixed >> np.uint64(31))


def write_chunk(
    path: Path,
    keys: NDArray[np.uint64],
    parts: Sequence[Sequence[NDArray[Any]]],
    rejects: bytes,
    counts: Counts,
    *,
    is_last: bool,
) -> None:
    """Writes a chunk.

    Args:
        path: Path of the file.
        keys: (n,) keys of the documents.
        parts: Arrays of each document, in one sequence of n for each part: its tokens, or its text and its columns.
        rejects: Lines of the rejects file.
        counts: Counts of the piece, up to here.
        is_last: Whether the piece ends here.
    """
    order = np.argsort(keys, kind="stable")
    tensors: dict[str, Any] = {"keys": keys[order], "rejects": np.frombuffer(rejects, np.uint8)}
    for number, arrays in enumerate(parts):
        inorder = [arrays[place] for place in order]
        tensors[f"ends{number}"] = np.cumsum([len(array) for array in inorder], dtype=np.int64)
        tensors[f"data{number}"] = np.concatenate(inorder or [np.zeros(0, np.uint8)])
    tensors = {name: tensor for name, tensor in tensors.items() if len(tensor)}  # empty ones cannot be sliced
    metadata = {"counts": json.dumps(asdict(counts)), "is_last": json.dumps(is_last)}
    write_atomically(path, save(tensors, metadata))


def read_counts(path: Path) -> tuple[Counts, bool]:
    """The counts of a piece at the end of a chunk, and whether it is the last one."""
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    return Counts(**json.loads(metadata["counts"])), json.loads(metadata["is_last"])


def read_tensor(path: Path, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
    """A part of one of the arrays of a chunk; empty if there is no such array."""
    with safe_open(path, "np") as file:
        if name not in file.keys():  # noqa: SIM118 (not a mapping)
            return np.zeros(0, np.uint64 if name == "keys" else np.uint8)
        tensor: NDArray[Any] = file.get_slice(name)[start:stop]
        return tensor
