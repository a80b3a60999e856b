"""Writes shards from documents, as raw text or as tokenised and packed rows.

The bytes depend only on the documents and the settings, so equal input gives equal shards.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dmagent_loader._files import locked, write_atomically
from dmagent_loader.errors import ConfigurationError, DomainError, EmptyShardError
from dmagent_loader.shards.manifest import MANIFEST_NAME, DomainRecord, ShardRecord, load_manifest, manifest_text
from dmagent_loader.shards.writing.documents import DocumentReader, encoded, find_files
from dmagent_loader.shards.writing.packing import PACKED_MEMBER, Packer, TextTokenizer, encode_npy
from dmagent_loader.shards.writing.tar_writer import TarWriter

_PARTIAL = ".partial"
_NAME = re.compile(r"[\w+-][\w+.-]*/[\w+-][\w+. -]*")


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """Settings of `shard_files`.

    Args:
        text_key: Column of a JSON line that holds the text.
        keep_columns: Other columns to keep, as a ``json`` member beside ``txt``; raw text only.
        tokenizer: A ``tokenizer.json``, a folder or a Hub name, for packed rows; None: raw text.
        eos_token: End-of-text token between packed documents; None: that of the tokenizer.
        parse_special_tokens: Whether text that spells a special token, such as ``<|endoftext|>``, becomes that token,
            as documents in a chat format need. False: it is text like any other.
        sequence_length: Tokens per packed row, at least 2.
        rows_per_shard: Largest number of rows in a shard; None: no limit.
        max_shard_bytes: Size in bytes at which a shard is closed.
    """

    text_key: str = "text"
    keep_columns: tuple[str, ...] = ()
    tokenizer: str | None = None
    eos_token: str | None = None
    parse_special_tokens: bool = False
    sequence_length: int | None = None
    rows_per_shard: int | None = None
    max_shard_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        if (self.tokenizer is None) != (self.sequence_length is None):
            raise ConfigurationError(
                f"tokenizer={self.tokenizer!r} with sequence_length={self.sequence_length!r}: packing needs both "
                "(--tokenizer, --sequence-length), raw text neither"
            )
        if self.tokenizer is not None and self.keep_columns:
            raise ConfigurationError(
                f"keep_columns={list(self.keep_columns)} with a tokenizer: packed rows mix documents, so there is no "
                "place for their columns; write raw text, or keep none"
            )
        if self.eos_token is not None and self.tokenizer is None:
            raise ConfigurationError(
                f"eos_token={self.eos_token!r} without a tokenizer has no effect: raw text has no tokens"
            )
        if self.parse_special_tokens and self.tokenizer is None:
            raise ConfigurationError(
                "parse_special_tokens=True without a tokenizer has no effect: raw text has no tokens"
            )
        if self.sequence_length == 1:
            raise ConfigurationError(
                "sequence_length=1: a row of one token has no next token to predict, so its loss is NaN; it must be "
                "at least 2"
            )
        for name in ("sequence_length", "rows_per_shard", "max_shard_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name}={value}: it must be at least 1")


class DomainWriter:
    """Writes the rows of one domain into numbered shards.

    Args:
        folder: Existing folder of the shards.
        name: Prefix of the file names.
        config: Limits on the size of a shard.

    Attributes:
        records: Records of the shards that are complete.
    """

    def __init__(self, folder: Path, name: str, config: ShardingConfig) -> None:
        self._folder = folder
        self._name = name
        self._config = config
        self._shard: TarWriter | None = None
        self._row = 0
        self.records: list[ShardRecord] = []

    def write(self, members: Mapping[str, bytes]) -> None:
        """Adds a row, given as extension -> bytes."""
        if self._shard is None:
            self._shard = TarWriter(self._folder / f"{self._name}-{len(self.records):06d}.tar")
        self._shard.add(f"{self._row:09d}", members)
        self._row += 1
        if self._shard.rows == self._config.rows_per_shard or self._shard.size >= self._config.max_shard_bytes:
            self.finish()

    def finish(self) -> None:
        """Completes the current shard."""
        if self._shard is not None:
            self.records.append(self._shard.close())
            self._shard = None

    def abandon(self) -> None:
        """Closes the current shard, if there is one; its file stays incomplete."""
        if self._shard is not None:
            self._shard.abandon()


def shard_files(
    domains: Mapping[str, Sequence[str | os.PathLike[str]]],
    output: str | os.PathLike[str],
    config: ShardingConfig | None = None,
    *,
    progress: bool = True,
) -> dict[str, DomainRecord]:
    """Writes shards for every domain: ``OUTPUT/<field>/<domain>/<domain>-000000.tar`` and ``OUTPUT/manifest.json``.

    Later calls can add domains to the same folder. A call that fails leaves the folder as it was.

    Args:
        domains: Domain, such as ``"source/Science"`` -> files, globs or folders. A file named ``.jsonl``, ``.ndjson``,
            ``.jsonlines`` or ``.json`` holds one document per line; any other file is one document. ``.gz`` is
            unpacked.
        output: Folder of the shards; created if missing.
        config: Settings; None: raw text with the defaults.
        progress: Show a progress bar over the bytes of the input.

    Returns:
        A record of each domain.

    Raises:
        DomainError: A name is not ``field/domain``, or the folder already holds the domain.
        ConfigurationError: The folder cannot be written to, another process writes to it, or it holds rows of another
            kind: text beside packed rows, or packed rows of another length or tokenizer.
        ShardNotFoundError: A path matches no file.
        ShardError: An input file cannot be used.
        EmptyShardError: A domain has no rows.
    """
    config = config or ShardingConfig()
    root = Path(output)
    for domain in domains:
        if not _NAME.fullmatch(domain):
            raise DomainError(
                f"domain {domain!r} cannot be a folder: name it field/domain, such as 'source/Science', of letters, "
                "digits, '_', '-', '+', '.'"
            )
    files = {domain: find_files(domain, paths) for domain, paths in domains.items()}
    tokenizer = (
        TextTokenizer.load(config.tokenizer, config.eos_token, parse_special_tokens=config.parse_special_tokens)
        if config.tokenizer is not None
        else None
    )
    with _exclusive(root):
        kept = _earlier_entries(root, list(domains))
        _refuse_other_rows(root, kept, _settings(config, tokenizer))
        partial = root / _PARTIAL
        try:
            records = _write_domains(files, partial, config, tokenizer, progress)
            for domain in domains:
                final = root / domain
                if final.exists():
                    shutil.rmtree(final)  # from a call that was killed before it wrote the manifest
                final.parent.mkdir(exist_ok=True)
                os.replace(partial / domain, final)
            write_atomically(root / MANIFEST_NAME, manifest_text(records, kept).encode())
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return records


def _write_domains(
    files: Mapping[str, list[Path]],
    folder: Path,
    config: ShardingConfig,
    tokenizer: TextTokenizer | None,
    progress: bool,
) -> dict[str, DomainRecord]:
    total = sum(path.stat().st_size for paths in files.values() for path in paths)
    stop = threading.Event()
    threads = min(len(files), os.cpu_count() or 1)
    with (
        tqdm(
            total=total, unit="B", unit_scale=True, desc=f"sharding {len(files)} domains", disable=not progress
        ) as bar,
        ThreadPoolExecutor(max_workers=threads, thread_name_prefix="dmagent-shard") as pool,
    ):

        def advance(size: int) -> None:
            if stop.is_set():
                raise InterruptedError("another domain failed")
            bar.update(size)

        futures = {}
        try:
            for domain, paths in files.items():
                reader = DocumentReader(paths, config.text_key, config.keep_columns, advance)
                futures[domain] = pool.submit(_write_domain, domain, reader, folder / domain, config, tokenizer)
            return {domain: future.result() for domain, future in futures.items()}
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            failures = [future.exception() for future in futures.values() if future.done() and not future.cancelled()]
            cause = next((error for error in failures if error and not isinstance(error, InterruptedError)), None)
            if cause is not None:
                raise cause from None
            raise


def _write_domain(
    domain: str, reader: DocumentReader, folder: Path, config: ShardingConfig, tokenizer: TextTokenizer | None
) -> DomainRecord:
    folder.mkdir(parents=True)
    writer = DomainWriter(folder, folder.name, config)
    packer = Packer(tokenizer, config.sequence_length) if tokenizer and config.sequence_length else None
    try:
        if packer is not None:
            for row in packer.rows(reader):
                writer.write({PACKED_MEMBER: encode_npy(row)})
        else:
            for document in reader:
                members = {"txt": document.text.encode()}
                if config.keep_columns:
                    columns = json.dumps(document.columns, ensure_ascii=False)
                    members["json"] = encoded(columns, f"a column to keep in {document.origin}")
                writer.write(members)
        writer.finish()
    finally:
        writer.abandon()
    rows = sum(record.rows for record in writer.records)
    if not rows:
        tokens = f", {packer.num_dropped} tokens, fewer than one row of {config.sequence_length}" if packer else ""
        raise EmptyShardError(
            f"domain {domain!r} would have no rows: {reader.num_documents} documents with text, {reader.num_empty} "
            f"empty{tokens}; "
            "give it more text" + (" or choose a smaller sequence_length" if packer else "")
        )
    return DomainRecord(
        rows=rows,
        documents=reader.num_documents,
        empty_documents=reader.num_empty,
        tokens=rows * config.sequence_length if config.sequence_length else None,
        dropped_tokens=packer.num_dropped if packer else None,
        special_token_documents=packer.num_spelling_special_tokens if packer else None,
        settings=_settings(config, tokenizer),
        shards=tuple(
            ShardRecord(path=f"{domain}/{record.path}", rows=record.rows, bytes=record.bytes, sha256=record.sha256)
            for record in writer.records
        ),
    )


def _settings(config: ShardingConfig, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {"format": "text", "text_key": config.text_key, "keep_columns": list(config.keep_columns)}
    return {
        "format": "packed",
        "text_key": config.text_key,
        "tokenizer": os.path.basename(os.path.normpath(config.tokenizer or "")),
        "vocabulary": tokenizer.vocabulary,
        "eos_id": tokenizer.eos_id,
        "parse_special_tokens": config.parse_special_tokens,
        "sequence_length": config.sequence_length,
        "dtype": tokenizer.dtype.name,
    }


@contextlib.contextmanager
def _exclusive(root: Path) -> Iterator[None]:
    """Admits one writer per folder at a time, and removes the partial shards of a killed one."""
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(root / ".lock"))
        except TimeoutError as error:
            raise ConfigurationError(f"another process is writing shards to {str(root)!r}: wait for it") from error
        except OSError as error:
            raise ConfigurationError(
                f"shards cannot be written to {str(root)!r}: {error}; choose a folder that can be written to, on a "
                "file system with locks"
            ) from error
        shutil.rmtree(root / _PARTIAL, ignore_errors=True)
        yield


def _earlier_entries(root: Path, domains: Sequence[str]) -> dict[str, Any]:
    path = root / MANIFEST_NAME
    if not path.exists():
        return {}
    present = load_manifest(path)
    again = [domain for domain in domains if domain in present]
    if again:
        raise DomainError(
            f"{str(root)!r} holds the domain(s) {again} already: choose another folder, or remove them from the "
            f"folder and its {MANIFEST_NAME}"
        )
    entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["domains"]
    return entries


def _refuse_other_rows(root: Path, kept: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises ConfigurationError if the folder holds rows of another kind: a batch of both fails only in training."""
    for domain, entry in kept.items():
        earlier = entry.get("settings") or {}
        identity = "vocabulary" if "vocabulary" in earlier else "tokenizer"
        for name in ("format", "sequence_length", identity, "eos_id"):
            if name in earlier and earlier[name] != settings.get(name):
                raise ConfigurationError(
                    f"{str(root)!r} holds domain {domain!r} with {name} {earlier[name]!r}, but these rows would have "
                    f"{settings.get(name)!r}: write all domains alike, or into another folder"
                )
