"""A safetensors file of numeric columns and texts, with a checksum over both. Reading it cannot execute code."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from dmagent_loader.shards.sources.checksum import crc32

Columns = dict[str, NDArray[Any]]

_CHECKSUM = "crc32"
_ALIGNMENT = 8
"""Bytes to a multiple of which safetensors pads its header."""


def write_columns(columns: Columns, metadata: dict[str, str]) -> bytes:
    """The bytes of a file with these columns and texts; equal ones give equal bytes."""
    columns = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    data: bytes = save_tensors(columns, {**metadata, _CHECKSUM: str(checksum_of(columns, metadata))})
    (length,) = struct.unpack_from("<Q", data)
    # safetensors writes the texts in random order.
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def read_metadata(data: bytes) -> dict[str, Any]:
    """The texts of a file, not yet verified.

    Raises:
        Exception: Of any kind, if the file is damaged.
    """
    (length,) = struct.unpack_from("<Q", data)
    metadata: dict[str, Any] = json.loads(data[8 : 8 + length])["__metadata__"]
    return metadata


def read_columns(data: bytes, metadata: dict[str, str]) -> Columns:
    """The columns of a file, after the checksum over columns and texts was verified.

    Args:
        data: The whole file.
        metadata: Its texts, from `read_metadata`.

    Raises:
        Exception: Of any kind, if the file is damaged.
    """
    columns: Columns = load_tensors(data)
    if str(checksum_of(columns, metadata)) != metadata[_CHECKSUM]:
        raise ValueError("its checksum is wrong")
    return columns


def checksum_of(columns: Columns, metadata: dict[str, str]) -> int:
    """The crc32 over all texts except the checksum, and all columns in the order of their names."""
    crc = crc32(json.dumps({name: text for name, text in sorted(metadata.items()) if name != _CHECKSUM}).encode())
    for name in sorted(columns):
        crc = crc32(columns[name].tobytes(), crc)
    return crc
