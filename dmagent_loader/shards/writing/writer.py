"""Writes shards from the data that people have, as raw text or as tokenised and packed rows.

A job has two halves. First, pieces of the inputs become chunks of documents (`collecting`). Then the documents of a
domain, in their order, become shards (`assembling`). The bytes depend only on the documents and the settings, not on
the number of processes or on kills.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dmagent_loader._files import locked, write_atomically
from dmagent_loader.errors import ConfigurationError, DomainError, EmptyShardError, ShardError
from dmagent_loader.shards.inputs.finding import find_inputs
from dmagent_loader.shards.inputs.kinds import Input
from dmagent_loader.shards.inputs.pieces import PIECE_BYTES, divide
from dmagent_loader.shards.inputs.records import Advance
from dmagent_loader.shards.manifest import MANIFEST_NAME, DomainRecord, ShardRecord, load_manifest, manifest_text
from dmagent_loader.shards.writing.assembling import Assembly, plan_shards
from dmagent_loader.shards.writing.chunks import Counts, read_tensor
from dmagent_loader.shards.writing.collecting import CHUNK_BYTES, Collection, check_bad
from dmagent_loader.shards.writing.config import ShardingConfig
from dmagent_loader.shards.writing.job import Job
from dmagent_loader.shards.writing.packing import TextTokenizer
from dmagent_loader.shards.writing.tasks import run_tasks

REJECTS_NAME = "rejects.jsonl"
"""File beside the shards of a domain with the records that were left out: origin, reason and beginning of each."""

_NAME = re.compile(r"[\w+-][\w+.-]*/[\w+-][\w+. -]*")


def shard_files(
    domains: Mapping[str, Sequence[str | os.PathLike[str]]],
    output: str | os.PathLike[str],
    config: ShardingConfig | None = None,
    *,
    append: bool = False,
    workers: int = 0,
    progress: bool = True,
) -> dict[str, DomainRecord]:
    """Writes shards for every domain: ``OUTPUT/<field>/<domain>/<domain>-000000.tar`` and ``OUTPUT/manifest.json``.

    Later calls can add domains to the same folder, or shards to its domains. A call that fails or is killed adds
    nothing; what it has done so far stays in ``OUTPUT/.partial``, and a call with the same inputs and settings goes on
    from there. While it runs, a job needs about as much space again as its shards.

    Args:
        domains: Domain, such as ``"source/Science"`` -> files, globs, folders, fsspec URLs, or ``hf:`` and the name of
            a data set. The endings of files say how they are read; the guide lists them.
        output: Folder of the shards; created if missing.
        config: Settings; None: raw text with the defaults.
        append: Add shards to domains that the folder holds; False: such domains are an error.
        workers: Number of processes; 0: this one, in which the tokenizer uses all cores.
        progress: Show progress bars.

    Returns:
        A record of each domain, of all its shards.

    Raises:
        DomainError: A name is not ``field/domain``, or the folder already holds the domain.
        ConfigurationError: The folder cannot be written to, another process writes to it, or it holds rows of another
            kind: text beside packed rows, or packed rows of another length or tokenizer.
        ShardNotFoundError: A path matches no file.
        ShardError: An input cannot be used, or more of its records are bad than `config` allows.
        EmptyShardError: A domain has no rows.
        MissingExtraError: A kind of input needs a package that is not installed.
    """
    config = config or ShardingConfig()
    root = Path(output)
    for domain in domains:
        if not _NAME.fullmatch(domain):
            raise DomainError(
                f"domain {domain!r} cannot be a folder: name it field/domain, such as 'source/Science', of letters, "
                "digits, '_', '-', '+', '.'"
            )
    inputs = {domain: find_inputs(domain, paths, config.reading) for domain, paths in domains.items()}
    tokenizer = (
        TextTokenizer.load(config.tokenizer, config.eos_token, parse_special_tokens=config.parse_special_tokens)
        if config.tokenizer is not None
        else None
    )
    settings = _settings(config, tokenizer)
    with _exclusive(root):
        kept = _earlier_entries(root)
        earlier = {domain: kept[domain] for domain in domains if domain in kept}
        if earlier and not append:
            raise DomainError(
                f"{str(root)!r} holds the domain(s) {list(earlier)} already: add to them (--append, append=True), "
                f"choose another folder, or remove them from the folder and its {MANIFEST_NAME}"
            )
        _refuse_other_rows(root, kept, settings)
        present = {domain: len(entry["shards"]) for domain, entry in earlier.items()}
        job = Job(root, inputs, config, {**settings, "present": present, "piece_bytes": PIECE_BYTES})
        run = _Run(config, tokenizer, workers, progress)
        try:
            parts = run.write(job, inputs, earlier)
            records = {domain: _published(root, job, domain, part, settings, kept) for domain, part in parts.items()}
            others = {domain: entry for domain, entry in kept.items() if domain not in records}
            write_atomically(root / MANIFEST_NAME, manifest_text(records, others).encode())
        except BaseException:
            if not job.has_work:
                job.remove()
            raise
        job.remove()
    return records


@dataclass
class _Part:
    """What a job has written of a domain."""

    counts: Counts
    shards: list[ShardRecord]
    rejects: bytes


@dataclass
class _Run:
    config: ShardingConfig
    tokenizer: TextTokenizer | None
    workers: int
    progress: bool

    def write(self, job: Job, inputs: Mapping[str, Sequence[Input]], earlier: Mapping[str, Any]) -> dict[str, _Part]:
        """Writes the chunks and shards of all domains."""
        collections = {
            domain: [
                Collection(
                    domain=domain,
                    number=number,
                    piece=piece,
                    folder=job.chunks(domain),
                    config=self.config,
                    chunk_bytes=CHUNK_BYTES,
                )
                for number, piece in enumerate(divide(items, PIECE_BYTES))
            ]
            for domain, items in inputs.items()
        }
        counts = self._collect(collections, sum(item.size for items in inputs.values() for item in items))
        assemblies: dict[str, list[Assembly]] = {}
        for domain, tasks in collections.items():
            chunks = [chunk for task in tasks for chunk in task.chunks()]
            entry = earlier.get(domain, {"shards": [], "rows": 0})
            assemblies[domain] = plan_shards(
                job.shards(domain),
                domain.rpartition("/")[2],
                chunks,
                counts[domain],
                self.config,
                first_shard=len(entry["shards"]),
                first_row=entry["rows"],
                has_lengths=self.config.parse_special_tokens,
            )
            if not assemblies[domain]:
                raise EmptyShardError(self._without_rows(domain, counts[domain]))
        shards = self._assemble(assemblies)
        return {
            domain: _Part(
                counts[domain],
                shards[domain],
                b"".join(read_tensor(c, "rejects").tobytes() for task in collections[domain] for c in task.chunks()),
            )
            for domain in inputs
        }

    def _collect(self, collections: Mapping[str, Sequence[Collection]], size: int) -> dict[str, Counts]:
        counts = {domain: Counts() for domain in collections}
        tasks = [task for items in collections.values() for task in items]
        with self._bar(f"reading {len(collections)} domains", size, "B") as advance:
            for task, result in run_tasks(_collect, tasks, self.config, self.tokenizer, self.workers, advance):
                counts[task.domain] += result
                check_bad(task.domain, counts[task.domain], self.config.max_bad)
        for domain, found in counts.items():
            missing = sorted({*self.config.keep_columns} - {*found.columns})
            if missing and found.documents:
                raise ShardError(
                    f"no document of domain {domain!r} has the column(s) {missing} that are to be kept: correct "
                    "keep_columns"
                )
        return counts

    def _assemble(self, assemblies: Mapping[str, Sequence[Assembly]]) -> dict[str, list[ShardRecord]]:
        tasks = [task for items in assemblies.values() for task in items]
        records: dict[Path, ShardRecord] = {}
        with self._bar("writing shards", len(tasks), "shard") as advance:
            for task, record in run_tasks(_assemble, tasks, self.config, self.tokenizer, self.workers, advance):
                records[task.path] = record
        return {domain: [records[task.path] for task in items] for domain, items in assemblies.items()}

    @contextlib.contextmanager
    def _bar(self, title: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        with tqdm(total=total, unit=unit, unit_scale=unit == "B", desc=title, disable=not self.progress) as bar:
            yield bar.update

    def _without_rows(self, domain: str, counts: Counts) -> str:
        tokens = (
            f", {counts.elements} tokens, fewer than one row of {self.config.sequence_length}" if self.tokenizer else ""
        )
        bad = f", {counts.bad} bad" if counts.bad else ""
        return (
            f"domain {domain!r} would have no rows: {counts.documents} documents with text, {counts.empty} empty{bad}"
            f"{tokens}; give it more text" + (" or choose a smaller sequence_length" if self.tokenizer else "")
        )


def _collect(task: Collection, tokenizer: TextTokenizer | None, advance: Advance) -> Counts:
    return task.run(tokenizer, advance)


def _assemble(task: Assembly, tokenizer: TextTokenizer | None, advance: Advance) -> ShardRecord:
    record = task.run()
    advance(1)
    return record


def _published(
    root: Path, job: Job, domain: str, part: _Part, settings: Mapping[str, Any], kept: Mapping[str, Any]
) -> DomainRecord:
    """Moves the shards of a domain to the output, where the manifest does not name them yet."""
    folder, final = job.shards(domain), root / domain
    earlier = kept.get(domain)
    if earlier is None and final.exists():
        shutil.rmtree(final)  # from a call that was killed before it wrote the manifest
    final.mkdir(parents=True, exist_ok=True)
    for shard in part.shards:
        os.replace(folder / shard.path, final / shard.path)
    rejects = final / REJECTS_NAME
    if part.rejects:
        before = rejects.read_bytes() if rejects.exists() else b""
        write_atomically(rejects, before.removesuffix(part.rejects) + part.rejects)
    counts, length = part.counts, settings.get("sequence_length")
    rows = sum(shard.rows for shard in part.shards)
    record = DomainRecord(
        rows=rows,
        documents=counts.documents,
        empty_documents=counts.empty,
        bad_records=counts.bad,
        tokens=rows * length if length else None,
        dropped_tokens=counts.elements - rows * length if length else None,
        special_token_documents=counts.special if length else None,
        settings=dict(settings),
        shards=tuple(replace(shard, path=f"{domain}/{shard.path}") for shard in part.shards),
    )
    return record if earlier is None else _joined(earlier, record)


def _joined(earlier: Mapping[str, Any], record: DomainRecord) -> DomainRecord:
    """The record of a domain after shards were added to it."""
    sums: dict[str, Any] = {
        name: None if getattr(record, name) is None else getattr(record, name) + (earlier.get(name) or 0)
        for name in _SUMMED
    }
    shards = tuple(ShardRecord(**shard) for shard in earlier["shards"])
    return replace(record, **sums, shards=shards + record.shards)


_SUMMED = (
    "rows",
    "documents",
    "empty_documents",
    "bad_records",
    "tokens",
    "dropped_tokens",
    "special_token_documents",
)


def _settings(config: ShardingConfig, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    order = {"text_key": config.reading.document_key, "shuffle_seed": config.shuffle_seed}
    if tokenizer is None:
        return {"format": "text", **order, "keep_columns": list(config.keep_columns)}
    return {
        "format": "packed",
        **order,
        "tokenizer": os.path.basename(os.path.normpath(config.tokenizer or "")),
        "vocabulary": tokenizer.vocabulary,
        "eos_id": tokenizer.eos_id,
        "parse_special_tokens": config.parse_special_tokens,
        "sequence_length": config.sequence_length,
        "dtype": tokenizer.dtype.name,
    }


@contextlib.contextmanager
def _exclusive(root: Path) -> Iterator[None]:
    """Admits one writer per folder at a time."""
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
        yield


def _earlier_entries(root: Path) -> dict[str, Any]:
    """The domains of the folder's manifest, as they stand in the file."""
    path = root / MANIFEST_NAME
    if not path.exists():
        return {}
    load_manifest(path)  # checks it
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
