"""Reads rows of tar shards, MDS folders, and Megatron's tokens, each by the reader of its format."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from dmagent_loader._tasks import Advance
from dmagent_loader._validation import shown
from dmagent_loader.errors import (
    HOW_TO_RESUME,
    DamagedShardError,
    DecodeError,
    EmptyShardError,
    ShardError,
    ShardLayoutError,
    require_extra,
)
from dmagent_loader.shards.collection import ShardCollection
from dmagent_loader.shards.decode import Decoder, RawSample
from dmagent_loader.shards.inputs.kinds import Input
from dmagent_loader.shards.inputs.options import ReadOptions
from dmagent_loader.shards.inputs.records import Record, Rejected, rejected
from dmagent_loader.shards.inputs.text import missing_column, stored_file
from dmagent_loader.shards.sources.urls import display_url, local_path

logger = logging.getLogger(__name__)

_SAFE_MDS = frozenset(("str", "json", "int", "bytes", "str_int", "str_float", "str_decimal"))


def read_tar(
    source: Input, start: int, stop: int | None, options: ReadOptions, advance: Advance
) -> Iterator[Record | Rejected]:
    """Reads one member of each row of a tar shard: a text, or a row in JSON.

    Raises:
        ShardError: The shard is damaged.
    """
    name, member = display_url(source.url), options.tar_member or "txt"
    collection = _opened(source, name, options)
    if collection is None:
        return
    (rows,) = collection.shard_rows(0)
    decode = Decoder()
    for number in range(rows):
        yield _tar_record(name, collection.read(0, 0, number), member, decode)
        advance(source.size // rows)


def _opened(source: Input, name: str, options: ReadOptions) -> ShardCollection | None:
    """The rows of a tar shard; None if it has none, as the last of many that several processes wrote may have.

    The messages of a collection are for those who train on it.
    """
    try:
        return ShardCollection.open({name: [source.url]}, progress=False, key_ends_at=options.key_ends_at)
    except EmptyShardError:
        logger.warning("%s holds no sample, which is a file with an extension, such as 0001.txt", name)
        return None
    except DamagedShardError as error:
        raise ShardError(
            f"{name} is damaged, so rows may be missing (`dmagent index {name}` lists where): fetch or write it again"
        ) from error
    except ShardLayoutError as error:
        raise ShardLayoutError(str(error).removesuffix(f"; {HOW_TO_RESUME}")) from error


def _tar_record(name: str, sample: RawSample, member: str, decode: Decoder) -> Record | Rejected:
    place = f"{name}, row {sample.key!r}"
    if member not in sample.members:
        fault = (
            f"has no member {member!r}, only {shown(sorted(sample.members))}: name another (--tar-member, tar_member=)"
        )
        if any(found.endswith(f".{member}") for found in sample.members):
            fault += ", or, if the names of files have dots before it, pass --key-ends-at last-dot (key_ends_at=)"
        return rejected(place, fault, None)
    try:
        value = decode(sample._replace(members={member: sample.members[member]}))[member]
    except DecodeError as error:
        return rejected(place, f"cannot be decoded ({error}): repair or leave out the row", None)
    if isinstance(value, (str, dict)):
        return Record(place, value)
    fault = f"has no text in its member {member!r}: name a text, or a row in JSON (--tar-member, tar_member=)"
    return rejected(place, fault, value)


def read_mds(source: Input, start: int, stop: int | None, options: ReadOptions, advance: Advance) -> Iterator[Record]:
    """Reads an MDS folder, by the reader of mosaicml-streaming.

    Raises:
        ShardError: The folder is damaged, compressed, or has columns whose encoding can execute code.
        MissingExtraError: The package is not installed.
    """
    folder, name = local_path(source.url), display_url(source.url)
    try:
        with stored_file(os.path.join(folder, "index.json")) as file:
            for shard in json.load(file)["shards"]:
                _check_mds(folder, name, shard, options)
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(f"the index.json of {name} cannot be read ({error!r}): fetch or write it again") from error
    rows: Any = require_extra("streaming", "mds").LocalDataset(folder)
    for number in range(len(rows)):
        try:
            row = rows[number]
        except (OSError, ValueError, IndexError, RuntimeError) as error:
            raise ShardError(f"{name}, row {number + 1} cannot be read ({error}): fetch the folder again") from error
        yield Record(f"{name}, row {number + 1}", {column: row[column] for column in options.columns(list(row))})
        advance(source.size // len(rows))


def _check_mds(folder: str, name: str, shard: dict[str, Any], options: ReadOptions) -> None:
    """Raises ShardError if a shard of an MDS folder must not or cannot be read."""
    encodings = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
    unsafe = {column: encoding for column, encoding in encodings.items() if encoding not in _SAFE_MDS}
    if unsafe:
        raise ShardError(
            f"{name} has columns of the encodings {unsafe}, and reading 'pkl' can execute code: write the folder again "
            f"with text columns only ({', '.join(sorted(_SAFE_MDS))})"
        )
    if options.document_key not in encodings:
        raise ShardError(missing_column(name, sorted(encodings), options))
    if shard.get("compression"):
        raise ShardError(f"{name} is compressed ({shard['compression']}): unpack its shards, or write it without")
    stored, size = os.path.join(folder, os.path.basename(shard["raw_data"]["basename"])), shard["raw_data"]["bytes"]
    if not os.path.isfile(stored) or os.path.getsize(stored) != size:  # the reader takes texts that were cut
        raise ShardError(f"{stored} is missing, or does not have the {size} bytes that its index says: fetch it again")


def read_megatron(
    source: Input, start: int, stop: int | None, options: ReadOptions, advance: Advance
) -> Iterator[Record]:
    """Reads the documents of a Megatron ``.bin``/``.idx``, as tokens, by the reader of megatron-core.

    Raises:
        ShardError: The files cannot be read.
        MissingExtraError: The package is not installed.
    """
    library = require_extra("megatron.core.datasets.indexed_dataset", "megatron")
    name = display_url(source.url)
    try:
        rows = library.IndexedDataset(os.path.splitext(local_path(source.url))[0], mmap=True)
    except Exception as error:  # asserts, struct and numpy errors
        raise ShardError(f"{name} and its .idx cannot be read ({error}): fetch both again") from error
    lengths, ends = rows.sequence_lengths, rows.document_indices
    stored = int(lengths.sum(dtype=np.int64)) * rows.index.dtype_size
    if stored != os.path.getsize(local_path(source.url)):
        raise ShardError(
            f"{name} has {os.path.getsize(local_path(source.url))} bytes, but its .idx describes {stored}: fetch both "
            "again"
        )
    for number, (first, end) in enumerate(pairwise(ends), start=1):
        sequences = [np.asarray(rows[int(sequence)]) for sequence in range(first, end)]
        if sequences:
            tokens = np.concatenate(sequences)
            yield Record(f"{name}, document {number}", tokens)
            advance(tokens.nbytes)
