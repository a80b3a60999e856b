"""Decoding of rows by an allow-list of formats that cannot execute code.

| extension | value |
|---|---|
| txt, text, transcript | str |
| json, jsn | result of `json.loads` |
| jsonl | list, one value per line |
| npy | array; writable, shares the row's memory |
| npz, safetensors | dict of arrays (npz: stored or deflated, as numpy writes it) |
| cls, cls2, index, inx, id | int |
| anything else | bytes, as stored |

The whole extension is looked up first, then its last part: ``input_ids.npy`` is an ``npy``. A trailing ``.gz`` is
unpacked (at most `MAX_UNPACKED_BYTES`). Names and rules are those of webdataset, except that formats that can execute
code, or have no decoder here, are errors.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy_format
from safetensors.numpy import load as load_safetensors

from dmagent_loader.errors import ConfigurationError, DecodeError

MAX_UNPACKED_BYTES = 1 << 30
MAX_NPY_HEADERS = 1024
MAX_RESOLVED = 4096
MAX_DIGITS = 100

Buffer = bytes | bytearray | memoryview


class RawSample(NamedTuple):
    """A row as it is stored.

    Attributes:
        key: Common part of the names of its members.
        members: Extension -> bytes, in the order of the shard; views of memory that only this row uses.
    """

    key: str
    members: dict[str, memoryview]


MemberDecoder = Callable[[bytes], Any]
SampleDecoder = Callable[[RawSample], dict[str, Any]]


class Decoder:
    """Decodes the members of a row.

    Args:
        overrides: Extension -> function from bytes to a value; these come before the allow-list. This is how to read
            formats that can execute code, if you trust the author of the shards.

    Example:
        >>> Decoder()(RawSample("a", {"txt": memoryview(b"hello"), "cls": memoryview(b"3")}))
        {'txt': 'hello', 'cls': 3}
    """

    def __init__(self, overrides: Mapping[str, MemberDecoder] | None = None) -> None:
        self._overrides = {extension.lower().lstrip("."): decode for extension, decode in (overrides or {}).items()}
        self._resolved: dict[str, Callable[[memoryview], Any]] = {}

    def __call__(self, sample: RawSample) -> dict[str, Any]:
        """Decodes all members of a row.

        Raises:
            DecodeError: A member is malformed, or its format is refused.
        """
        values = {}
        for extension, data in sample.members.items():
            decode = self._resolved.get(extension)
            if decode is None:
                if len(self._resolved) >= MAX_RESOLVED:
                    self._resolved.clear()
                decode = self._resolved[extension] = self._resolve(extension)
            try:
                values[extension] = decode(data)
            except Exception as error:
                raise DecodeError(
                    f"member {extension!r} of sample {sample.key!r} cannot be decoded: {error}"
                ) from error
        return values

    def _resolve(self, extension: str) -> Callable[[memoryview], Any]:
        last = extension.rpartition(".")[2]
        for name in (extension, last):
            if name in self._overrides:
                override = self._overrides[name]
                return lambda data: override(bytes(data))
        if last == "gz":
            packed = extension.rpartition(".")[0]
            if packed.endswith(".gz") or packed == "gz":
                return _refuse("it is compressed more than once, as bombs are; unpack it when the shard is written")
            inner = self._resolve(packed)
            return lambda data: inner(memoryview(_gunzip(data)))
        if last in _UNSAFE:
            return _refuse(
                f"{last!r} files can execute code when they are read, so they are not read by default; if you trust "
                f"the author of the shards, pass decode={{{last!r}: your_function}} (bytes to value), else store .npy "
                "or .safetensors"
            )
        if last in _NOT_INCLUDED:
            return _refuse(
                f"there is no built-in decoder for {last!r}; pass decode={{{last!r}: your_function}} (bytes to value)"
            )
        return _DECODERS.get(last, bytes)

    def __getstate__(self) -> dict[str, MemberDecoder]:
        return self._overrides

    def __setstate__(self, state: dict[str, MemberDecoder]) -> None:
        self.__init__(state)  # type: ignore[misc]


def raw_bytes(sample: RawSample) -> dict[str, Any]:
    """Returns every member as `bytes`, without decoding."""
    return {extension: bytes(data) for extension, data in sample.members.items()}


def make_decoder(decode: str | Mapping[str, MemberDecoder] | SampleDecoder | None = "default") -> SampleDecoder:
    """Makes a decoder from the ``decode`` argument of a sampler.

    Args:
        decode: ``"default"``: the allow-list. None: no decoding. A mapping of extension -> function from bytes to a
            value: these first, then the allow-list. A function that takes a `RawSample` and returns a dict.

    Raises:
        ConfigurationError: `decode` is none of these.
    """
    if decode is None:
        return raw_bytes
    if isinstance(decode, str):
        if decode == "default":
            return Decoder()
    elif isinstance(decode, Mapping):
        return Decoder(decode)
    elif callable(decode):
        return decode
    raise ConfigurationError(
        f"decode={decode!r} is no decoder: pass 'default', 'lazy', None (bytes), a dict from extension to function, or "
        "a function of a RawSample"
    )


def is_default_decoder(decode: SampleDecoder) -> bool:
    """Whether a decoder is that of ``"default"``, so that ``.npy`` members are arrays as numpy stores them."""
    return isinstance(decode, Decoder) and not decode.__getstate__()


def decode_npy(data: Buffer) -> np.ndarray[Any, Any]:
    """Decodes a npy file in memory without a copy; the array is writable if `data` is.

    Parsed headers are cached, because most rows of a shard have the same one.

    Raises:
        DecodeError: The data is not a npy file, holds Python objects, or has another size than its header declares.
    """
    view = memoryview(data)
    parsed = _npy_headers.get(bytes(view[:_USUAL_NPY_HEADER]))
    if parsed is None:
        parsed = _read_npy_header(view)
    dtype, shape, order, count, first, size = parsed
    if len(view) != first + size:
        raise DecodeError(
            f"the npy header declares shape {shape} of {dtype} ({size} bytes), but {len(view) - first} bytes follow it"
        )
    try:
        array = np.frombuffer(view, dtype, count, first)
        return array if len(shape) == 1 else array.reshape(shape, order=order)
    except ValueError as error:
        raise DecodeError(f"the npy header declares shape {shape} of {dtype}, which is no array: {error}") from error


_NpyHeader = tuple[np.dtype[Any], tuple[int, ...], Any, int, int, int]
"""dtype, shape, order, number of elements, bytes of the header, bytes of the elements."""

_USUAL_NPY_HEADER = 128
"""Bytes of nearly every header: numpy pads it to a multiple of 64."""

_npy_headers: dict[bytes, _NpyHeader] = {}
"""Parsed headers of exactly `_USUAL_NPY_HEADER` bytes, by these bytes."""


def _read_npy_header(view: memoryview) -> _NpyHeader:
    major = view[6] if len(view) >= 10 else 0
    prefix = 10 if major == 1 else 12
    length = int.from_bytes(view[8:prefix], "little")
    header = bytes(view[: prefix + length])
    parsed = _parse_npy_header(header)
    if len(header) == _USUAL_NPY_HEADER:
        if len(_npy_headers) >= MAX_NPY_HEADERS:
            _npy_headers.clear()
        _npy_headers[header] = parsed
    return parsed


_MAX_EXTENT = 1 << 62
_NPY_READERS = {
    (1, 0): npy_format.read_array_header_1_0,
    (2, 0): npy_format.read_array_header_2_0,
    (3, 0): npy_format.read_array_header_2_0,
}


def _parse_npy_header(header: bytes) -> _NpyHeader:
    stream = io.BytesIO(header)
    try:
        version = npy_format.read_magic(stream)
        if version not in _NPY_READERS or (version == (3, 0) and not header[12:].isascii()):
            raise ValueError(f"version {version}, or names in it that are not ASCII")
        reader = _NPY_READERS[version]
        shape, fortran, dtype = reader(stream)
    except Exception as error:
        raise DecodeError(f"not a npy file: {error}") from error
    if dtype.hasobject:
        raise DecodeError(
            "the array holds Python objects, and reading them can execute code: store numbers or text instead, or "
            "pass a decoder of your own"
        )
    if dtype.subdtype is not None:
        raise DecodeError(f"the npy header declares elements that are arrays themselves ({dtype}): numpy writes none")
    count = math.prod(shape)
    if (
        any(extent < 0 for extent in shape)
        or max(shape, default=0) > _MAX_EXTENT
        or count * dtype.itemsize > _MAX_EXTENT
    ):
        raise DecodeError("the npy header declares a shape that is negative or larger than any file")
    return dtype, shape, "F" if fortran else "C", count, len(header), count * dtype.itemsize


def _text(data: memoryview) -> str:
    return str(data, "utf-8")


def _json(data: memoryview) -> Any:
    return json.loads(str(data, "utf-8"))


def _json_lines(data: memoryview) -> list[Any]:
    return [json.loads(line) for line in str(data, "utf-8").split("\n") if line.strip()]


def _integer(data: memoryview) -> int:
    if len(data) > MAX_DIGITS:
        raise DecodeError(f"{len(data)} characters are no integer that a model trains on (at most {MAX_DIGITS})")
    return int(bytes(data))


def _npz(data: memoryview) -> dict[str, Any]:
    """Like `numpy.load`, which however allocates the memory that a header declares and unpacks some methods at once."""
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        declared = sum(entry.file_size for entry in entries)
        if declared > MAX_UNPACKED_BYTES:
            raise DecodeError(f"unpacks to {declared} bytes, more than {MAX_UNPACKED_BYTES}")
        for entry in entries:
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DecodeError(f"{entry.filename!r} is compressed by a method that numpy does not write")
            name = entry.filename.removesuffix(".npy")
            if name in arrays or name == entry.filename:
                raise DecodeError(f"{entry.filename!r} comes twice, or is no .npy file")
            with archive.open(entry) as file:
                arrays[name] = decode_npy(bytearray(file.read(entry.file_size + 1)))
    return arrays


def _safetensors(data: memoryview) -> dict[str, Any]:
    return dict(load_safetensors(bytes(data)))


def _gunzip(data: memoryview) -> bytes:
    stream = zlib.decompressobj(wbits=31)
    unpacked = stream.decompress(data, MAX_UNPACKED_BYTES)
    if not stream.eof:
        raise DecodeError(f"cut short, or unpacks to more than {MAX_UNPACKED_BYTES} bytes")
    if stream.unused_data.rstrip(b"\0"):  # files one after the other, as bgzip and `cat` write them, are one
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            unpacked = file.read(MAX_UNPACKED_BYTES + 1)
        if len(unpacked) > MAX_UNPACKED_BYTES:
            raise DecodeError(f"unpacks to more than {MAX_UNPACKED_BYTES} bytes")
    return unpacked


def _refuse(message: str) -> Callable[[memoryview], Any]:
    def refuse(data: memoryview) -> Any:
        raise DecodeError(message)

    return refuse


_UNSAFE = frozenset(("pkl", "pickle", "pyd", "pth", "pt", "ckpt", "joblib", "dill"))
_NOT_INCLUDED = frozenset(("ten", "tb", "mp", "msg", "cbor"))
_DECODERS: dict[str, Callable[[memoryview], Any]] = {
    **dict.fromkeys(("txt", "text", "transcript"), _text),
    **dict.fromkeys(("json", "jsn"), _json),
    **dict.fromkeys(("cls", "cls2", "index", "inx", "id"), _integer),
    "jsonl": _json_lines,
    "npy": decode_npy,
    "npz": _npz,
    "safetensors": _safetensors,
}
