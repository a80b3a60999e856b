"""Columns of numbers in one safetensors file (nothing in it can execute), with a checksum over everything."""

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


def seal(columns: Columns, metadata: dict[str, str]) -> bytes:
    """The bytes of a file that holds these columns and texts."""
    columns = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    data: bytes = save_tensors(columns, {**metadata, "crc32": str(seal_of(columns, metadata))})
    return data


def metadata_in(data: bytes) -> dict[str, Any]:
    """The texts in a file of `seal`, which are not checked yet.

    Raises:
        Exception: Of any kind, if the file is damaged.
    """
    (length,) = struct.unpack_from("<Q", data)
    metadata: dict[str, Any] = json.loads(data[8 : 8 + length])["__metadata__"]
    return metadata


def columns_in(data: bytes, metadata: dict[str, str]) -> Columns:
    """The columns, after columns and texts were checked.

    Raises:
        Exception: Of any kind, if the file is damaged.
    """
    columns: Columns = load_tensors(data)
    if str(seal_of(columns, metadata)) != metadata["crc32"]:
        raise ValueError("its checksum is wrong")
    return columns


def seal_of(columns: Columns, metadata: dict[str, str]) -> int:
    """crc32 over all texts but the one named so, and all columns in the order of their names."""
    crc = crc32(json.dumps({name: text for name, text in sorted(metadata.items()) if name != "crc32"}).encode())
    for name in sorted(columns):
        crc = crc32(columns[name].tobytes(), crc)
    return crc
