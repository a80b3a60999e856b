"""Shards, ways to damage them, and what a reader makes of it: the parts of the campaign in `campaign.py`."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import webdataset

BLOCK = tarfile.BLOCKSIZE
Row = tuple[str, dict[str, bytes]]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A whole shard, and what is where in it.

    Attributes:
        data: The file.
        rows: Key and members of each row, in order.
        headers: (start, end) of all blocks that a checksum protects: headers of members and of extended headers.
        payloads: (start, end) of the bytes of all members.
        end: Where the end marker begins.
    """

    data: bytes
    rows: tuple[Row, ...]
    headers: tuple[tuple[int, int], ...]
    payloads: tuple[tuple[int, int], ...]
    end: int


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """What is left of a shard; `data` None: the file is gone."""

    data: bytes | None

    def touches_headers(self, shard: Shard) -> bool:
        """Whether a byte that a checksum protects is another one, or has moved."""
        if self.data is None or len(self.data) != len(shard.data):
            return True
        return any(self.data[start:end] != shard.data[start:end] for start, end in shard.headers)

    def is_a_whole_tar(self) -> bool:
        """Whether every byte is what a tar that was written so would have there, as far as Python's `tarfile` tells.

        Each header has its checksum and is followed by the next, no member has two extended headers of one kind, and
        the end is a marker with the padding of some blocking factor up to 20.
        """
        if self.data is None or len(self.data) % BLOCK:
            return False
        position, members, announced = 0, 0, set[bytes]()
        while any(self.data[position : position + BLOCK]):
            try:
                header = tarfile.TarInfo.frombuf(self.data[position : position + BLOCK], "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                return False
            if header.isreg():
                members += 1
                announced.clear()
            elif header.type in announced:
                return False
            else:
                announced.add(header.type)
            position += BLOCK + -(-header.size // BLOCK) * BLOCK
        blocks = len(self.data) // BLOCK
        factor = max(factor for factor in range(1, 21) if blocks % factor == 0)
        zeros = len(self.data) - position
        if announced or any(self.data[position:]) or not 2 * BLOCK <= zeros < (2 + factor) * BLOCK:
            return False
        with tarfile.open(fileobj=io.BytesIO(self.data)) as tar:
            return len(tar.getmembers()) == members

    def zeros_at_the_end(self) -> int:
        """Length of the run of zeros that the file ends with."""
        return 0 if self.data is None else len(self.data) - len(self.data.rstrip(b"\0"))


def _text(rng: random.Random, low: int, high: int) -> bytes:
    return bytes(rng.choices(b"abcdefghijklmnopqrstuvwxyz \n", k=rng.randrange(low, high)))


def _npy(rng: random.Random, tokens: int) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([rng.randrange(1 << 16) for _ in range(tokens)], np.uint16))
    return stream.getvalue()


def _with_tarfile(rows: list[Row], format: int, pax: dict[str, str] | None = None) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for key, members in rows:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                info.pax_headers = dict(pax or {})
                tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def _with_webdataset(rows: list[Row]) -> bytes:
    stream = io.BytesIO()
    with webdataset.TarWriter(stream, encoder=False) as writer:
        for key, members in rows:
            writer.write({"__key__": key, **members})
    return stream.getvalue()


def _unpadded(data: bytes) -> bytes:
    used = len(data.rstrip(b"\0"))
    return data[: -(-used // BLOCK) * BLOCK + 2 * BLOCK]


LAYOUTS: dict[str, Callable[[random.Random], tuple[list[Row], bytes]]] = {}


def _layout(name: str) -> Callable[[Callable[[random.Random], tuple[list[Row], bytes]]], None]:
    def register(make: Callable[[random.Random], tuple[list[Row], bytes]]) -> None:
        LAYOUTS[name] = make

    return register


@_layout("text, pax (dmagent shard)")
def _text_pax(rng: random.Random) -> tuple[list[Row], bytes]:
    rows: list[Row] = [(f"{i:09d}", {"txt": _text(rng, 100, 3000)}) for i in range(rng.randrange(3, 40))]
    return rows, _with_tarfile(rows, tarfile.PAX_FORMAT)


@_layout("packed rows (dmagent shard)")
def _packed(rng: random.Random) -> tuple[list[Row], bytes]:
    rows: list[Row] = [(f"{i:09d}", {"input_ids.npy": _npy(rng, 512)}) for i in range(rng.randrange(3, 40))]
    return rows, _with_tarfile(rows, tarfile.PAX_FORMAT)


@_layout("two members, webdataset's writer")
def _pairs(rng: random.Random) -> tuple[list[Row], bytes]:
    rows: list[Row] = [
        (f"shard/{i:06d}", {"txt": _text(rng, 10, 900), "json": b'{"n": %d}' % i}) for i in range(rng.randrange(3, 30))
    ]
    return rows, _with_webdataset(rows)


@_layout("one to three members, ustar")
def _mixed(rng: random.Random) -> tuple[list[Row], bytes]:
    rows: list[Row] = []
    for i in range(rng.randrange(4, 30)):
        members = {"txt": _text(rng, 10, 900), "cls": b"%d" % i, "json": b"[%d]" % i}
        rows.append((f"{i:05d}", dict(list(members.items())[: rng.randrange(1, 4)])))
    return rows, _with_tarfile(rows, tarfile.USTAR_FORMAT)


@_layout("long names, pax")
def _long_pax(rng: random.Random) -> tuple[list[Row], bytes]:
    rows: list[Row] = [(f"{'folder/' * 15}ü{i:04d}", {"txt": _text(rng, 10, 900)}) for i in range(rng.randrange(3, 30))]
    return rows, _with_tarfile(rows, tarfile.PAX_FORMAT, {"mtime": "1700000000.25"})


@_layout("long names, gnu")
def _long_gnu(rng: random.Random) -> tuple[list[Row], bytes]:
    rows: list[Row] = [(f"{'folder/' * 15}{i:04d}", {"txt": _text(rng, 10, 900)}) for i in range(rng.randrange(3, 30))]
    return rows, _with_tarfile(rows, tarfile.GNU_FORMAT)


@_layout("no padding at the end (Go, Rust)")
def _no_padding(rng: random.Random) -> tuple[list[Row], bytes]:
    rows: list[Row] = [(f"{i:06d}", {"txt": _text(rng, 10, 1500)}) for i in range(rng.randrange(3, 40))]
    return rows, _unpadded(_with_tarfile(rows, tarfile.USTAR_FORMAT))


def make_shard(layout: str, rng: random.Random) -> Shard:
    """A whole shard of a layout."""
    rows, data = LAYOUTS[layout](rng)
    headers, payloads = [], []
    position = 0
    while any(data[position : position + BLOCK]):
        header = tarfile.TarInfo.frombuf(data[position : position + BLOCK], "utf-8", "surrogateescape")
        headers.append((position, position + BLOCK))
        start = position + BLOCK
        if header.isreg():
            payloads.append((start, start + header.size))
        position = start + -(-header.size // BLOCK) * BLOCK
    return Shard(data=data, rows=tuple(rows), headers=tuple(headers), payloads=tuple(payloads), end=position)


def _replaced(shard: Shard, start: int, new: bytes) -> Damaged:
    return Damaged(data=shard.data[:start] + new + shard.data[start + len(new) :])


def _a_header(shard: Shard, rng: random.Random) -> int:
    return rng.choice(shard.headers)[0]


def _a_payload_byte(shard: Shard, rng: random.Random) -> int:
    start, end = rng.choice([payload for payload in shard.payloads if payload[0] < payload[1]])
    return rng.randrange(start, end)


def _bit_flip(shard: Shard, rng: random.Random, place: int) -> Damaged:
    return _replaced(shard, place, bytes([shard.data[place] ^ 1 << rng.randrange(8)]))


def _cut_in_header(shard: Shard, rng: random.Random) -> Damaged:
    return Damaged(data=shard.data[: _a_header(shard, rng) + rng.randrange(1, BLOCK)])


def _zeroed_tail(shard: Shard, rng: random.Random) -> Damaged:
    start = rng.choice(shard.headers[-8:])[0]
    return _replaced(shard, start, bytes(len(shard.data) - start))


def _zeroed_pages(shard: Shard, rng: random.Random) -> Damaged:
    page = rng.choice((512, 4096))
    start = rng.randrange(shard.end // page + 1) * page
    return _replaced(shard, start, bytes(min(page * rng.randrange(1, 4), len(shard.data) - start)))


def _misplaced_write(shard: Shard, rng: random.Random) -> Damaged:
    page = rng.choice((512, 4096))
    source, start = (rng.randrange(shard.end // page + 1) * page for _ in range(2))
    return _replaced(shard, start, shard.data[source : source + page][: len(shard.data) - start])


def _bytes_missing(shard: Shard, rng: random.Random) -> Damaged:
    start = rng.randrange(shard.end)
    return Damaged(data=shard.data[:start] + shard.data[start + rng.randrange(1, 3000) :])


def _bytes_inserted(shard: Shard, rng: random.Random) -> Damaged:
    start = rng.randrange(shard.end)
    return Damaged(data=shard.data[:start] + rng.randbytes(rng.randrange(1, 3000)) + shard.data[start:])


def _other_shard(shard: Shard, rng: random.Random) -> Damaged:
    """Another shard of the same size: the same members with other bytes, in another order of keys."""
    changed = bytearray(shard.data)
    for start, end in shard.payloads:
        changed[start:end] = changed[start:end][::-1]
    return Damaged(data=bytes(changed))


KINDS: dict[str, Callable[[Shard, random.Random], Damaged]] = {
    "random header": lambda shard, rng: _replaced(shard, _a_header(shard, rng), rng.randbytes(BLOCK)),
    "zeroed header": lambda shard, rng: _replaced(shard, _a_header(shard, rng), bytes(BLOCK)),
    "cut at a record boundary": lambda shard, rng: Damaged(data=shard.data[: _a_header(shard, rng)]),
    "cut in a header": _cut_in_header,
    "cut in a payload": lambda shard, rng: Damaged(data=shard.data[: _a_payload_byte(shard, rng)]),
    "bit rot in a header": lambda shard, rng: _bit_flip(shard, rng, _a_header(shard, rng) + rng.randrange(BLOCK)),
    "bit rot in a payload": lambda shard, rng: _bit_flip(shard, rng, _a_payload_byte(shard, rng)),
    "bit rot anywhere": lambda shard, rng: _bit_flip(shard, rng, rng.randrange(shard.end)),
    "zeroed pages": _zeroed_pages,
    "zeroed tail": _zeroed_tail,
    "misplaced write": _misplaced_write,
    "bytes missing": _bytes_missing,
    "bytes inserted": _bytes_inserted,
    "replaced, same size": _other_shard,
    "empty file": lambda shard, rng: Damaged(data=b""),
    "file missing": lambda shard, rng: Damaged(data=None),
}
