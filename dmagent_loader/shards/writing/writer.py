"""Writes shards from the data that people have, as raw text or as tokenised and packed rows.

A job has two halves. First, pieces of the inputs become chunks of documents (`collecting`). Then the documents of a
domain, in their order, become shards (`assembling`). The bytes depend only on the documents and the settings, not on
the number of processes or on kills.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import posixpath
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dmagent_loader._files import only_writer, write_atomically
from dmagent_loader.errors import ConfigurationError, DomainError, EmptyShardError, ShardError
from dmagent_loader.shards.collection import ShardCollection
from dmagent_loader.shards.inputs.chat import load_template
from dmagent_loader.shards.inputs.finding import find_inputs
from dmagent_loader.shards.inputs.kinds import Input, Kind
from dmagent_loader.shards.inputs.pieces import PIECE_BYTES, divide
from dmagent_loader.shards.inputs.records import Advance
from dmagent_loader.shards.manifest import MANIFEST_NAME, DomainRecord, ShardRecord, load_manifest, manifest_text
from dmagent_loader.shards.sources.urls import display_url, is_local, local_path
from dmagent_loader.shards.writing.assembling import Assembly, plan_shards
from dmagent_loader.shards.writing.chunks import Counts, read_tensor
from dmagent_loader.shards.writing.collecting import CHUNK_BYTES, Collection, check_bad
from dmagent_loader.shards.writing.config import ShardingConfig
from dmagent_loader.shards.writing.job import Job
from dmagent_loader.shards.writing.packing import TextTokenizer
from dmagent_loader.shards.writing.tasks import run_tasks

REJECTS_NAME = "rejects.jsonl"
"""File beside the shards of a domain with the records that were left out: origin, reason and beginning of each."""

logger = logging.getLogger(__name__)

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
    from there. While it runs, a job needs about as much space again as its shards. Files that an earlier call did not
    write are never replaced or removed.

    Args:
        domains: Domain, such as ``"source/Science"`` -> files, globs, folders, fsspec URLs, or ``hf:`` and the name of
            a data set. The endings of files say how they are read; the guide lists them.
        output: Folder of the shards; created if missing.
        config: Settings; None: raw text with the defaults.
        append: Add shards to domains that the folder holds; False: such domains are an error. Inputs that were added
            with the same settings before are left out with a warning, so a call can be repeated.
        workers: Number of processes; 0: this one, in which the tokenizer uses all cores.
        progress: Show progress bars.

    Returns:
        A record of each domain, of all its shards.

    Raises:
        DomainError: A name is not ``field/domain``, or the folder already holds the domain.
        ConfigurationError: The folder cannot be written to, another process writes to it, it holds files of a domain
            that its manifest does not name, or rows of another kind: text beside packed rows, or packed rows of another
            length or tokenizer.
        ShardNotFoundError: A path matches no file.
        ShardError: An input cannot be used, or more of its records are bad than `config` allows.
        EmptyShardError: A domain has no rows.
        MissingExtraError: A kind of input needs a package that is not installed.
    """
    config = config or ShardingConfig()
    if workers < 0:
        raise ConfigurationError(f"workers={workers}: it must be at least 0, which is this process alone")
    root = Path(output)
    for domain in domains:
        if not _NAME.fullmatch(domain):
            raise DomainError(
                f"domain {domain!r} cannot be a folder: name it field/domain, such as 'source/Science', of letters, "
                "digits, '_', '-', '+' and, except at the beginning of a part, '.'; the domain may have spaces"
            )
    inputs = {domain: find_inputs(domain, paths, config.reading) for domain, paths in domains.items()}
    tokenizer = (
        TextTokenizer.load(config.tokenizer, config.eos_token, parse_special_tokens=config.parse_special_tokens)
        if config.tokenizer is not None
        else None
    )
    settings = _settings(config, tokenizer)
    _refuse_own_shards(root, inputs)
    with only_writer(root, "shards"):
        kept = _earlier_entries(root)
        earlier = {domain: kept[domain] for domain in domains if domain in kept}
        job = Job(root, inputs, config, {**settings, "piece_bytes": PIECE_BYTES})
        done = {domain: entry for domain, entry in earlier.items() if job.digests[domain] in entry.get("jobs", ())}
        if append or (len(done) == len(inputs) and job.folder.exists()):  # killed after it wrote the manifest
            if done:
                logger.warning(
                    "%s holds these inputs of %s already, with these settings: they are not added again",
                    root,
                    ", ".join(done),
                )
            inputs = {domain: items for domain, items in inputs.items() if domain not in done}
            if not inputs:
                job.remove()
                return {domain: _record(entry) for domain, entry in done.items()}
        elif earlier:
            raise DomainError(
                f"{str(root)!r} holds the domain(s) {list(earlier)} already: add to them (--append, append=True), "
                f"choose another folder, or remove them from the folder and its {MANIFEST_NAME}"
            )
        _refuse_other_rows(root, kept, settings, earlier)
        _refuse_other_files(root, [domain for domain in inputs if domain not in kept], job.published())
        job.announce()
        run = _Run(config, tokenizer, workers, progress)
        try:
            parts = run.write(job, inputs, earlier)
            _publish(root, job, parts, kept)
            records = {domain: _joined(kept.get(domain), job, domain, parts[domain], settings) for domain in parts}
            others = {domain: entry for domain, entry in kept.items() if domain not in records}
            write_atomically(root / MANIFEST_NAME, manifest_text(records, others).encode())
        except BaseException:
            if not job.has_work:
                job.remove()
            raise
        job.remove()
    return {domain: records[domain] if domain in records else _record(done[domain]) for domain in domains}


@dataclass
class _Part:
    """What a job has written of a domain."""

    folder: Path
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
        missing = self._missing_columns(counts)
        if missing:
            job.remove()
            raise ShardError(missing)
        assemblies: dict[str, list[Assembly]] = {}
        folders: dict[str, Path] = {}
        for domain, tasks in collections.items():
            chunks = [chunk for task in tasks for chunk in task.chunks()]
            first_shard, first_row = 0, 0
            if domain in earlier:
                first_shard = _next_shard(job, domain, earlier[domain])
                first_row = _next_row(job.output, earlier[domain])
            folders[domain] = job.shards(domain, first_shard, first_row)
            assemblies[domain] = plan_shards(
                folders[domain],
                domain.rpartition("/")[2],
                chunks,
                counts[domain],
                self.config,
                first_shard=first_shard,
                first_row=first_row,
                has_lengths=self.config.parse_special_tokens,
            )
            if not assemblies[domain]:
                job.remove()  # only other inputs or settings can help
                raise EmptyShardError(self._without_rows(domain, counts[domain]))
        shards = self._assemble(assemblies)
        return {
            domain: _Part(
                folders[domain],
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
        return counts

    def _missing_columns(self, counts: Mapping[str, Counts]) -> str:
        """The fault of columns to keep that no document has; ``""`` if there are none."""
        for domain, found in counts.items():
            missing = sorted({*self.config.keep_columns} - {*found.columns})
            if missing and found.documents:
                return (
                    f"no document of domain {domain!r} has the column(s) {missing} that are to be kept: correct "
                    "keep_columns"
                )
        return ""

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


def _next_shard(job: Job, domain: str, entry: Mapping[str, Any]) -> int:
    """One more than the largest number of a shard in the manifest and in the folder."""
    folder, published = job.output / domain, job.published()
    names = {posixpath.basename(shard["path"]) for shard in entry["shards"]}
    if folder.is_dir():
        names |= {path.name for path in folder.iterdir() if f"{domain}/{path.name}" not in published}
    pattern = re.compile(rf"{re.escape(posixpath.basename(domain))}-(\d+)\.tar")
    return max((int(found[1]) + 1 for found in map(pattern.fullmatch, names) if found), default=0)


def _next_row(root: Path, entry: Mapping[str, Any]) -> int:
    """A number above the keys of all rows; a manifest that was edited may count fewer rows than their last key."""
    last = root / max((shard["path"] for shard in entry["shards"]), default="")
    if not last.is_file():
        return int(entry["rows"])
    collection = ShardCollection.open({"source/shard": [str(last)]}, progress=False)
    (rows,) = collection.shard_rows(0)
    key = collection.read(0, 0, rows - 1).key
    return max(int(entry["rows"]), int(key) + 1 if key.isdecimal() else 0)


def _publish(root: Path, job: Job, parts: Mapping[str, _Part], kept: Mapping[str, Any]) -> None:
    """Moves shards to the output, where the manifest does not name them yet."""
    listed = {shard["path"] for entry in kept.values() for shard in entry["shards"]}
    for name in job.published() - listed:  # of a call that was killed before it wrote the manifest
        (root / name).unlink(missing_ok=True)
    moves = {
        f"{domain}/{shard.path}": part.folder / shard.path for domain, part in parts.items() for shard in part.shards
    }
    existing = sorted(name for name in moves if (root / name).exists())
    if existing:
        raise ConfigurationError(
            f"{str(root / existing[0])!r} has appeared since this job began, and would be replaced: move it away, and "
            "run the same command again"
        )
    new = {f"{domain}/{REJECTS_NAME}" for domain in parts if domain not in kept}
    job.publish({*moves, *new})
    for name, path in moves.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, root / name)
    for domain, part in parts.items():
        if part.rejects:
            rejects = root / domain / REJECTS_NAME
            before = rejects.read_bytes() if rejects.exists() else b""
            write_atomically(rejects, before.removesuffix(part.rejects) + part.rejects)


def _joined(
    earlier: Mapping[str, Any] | None, job: Job, domain: str, part: _Part, settings: Mapping[str, Any]
) -> DomainRecord:
    """The record of a domain, with the shards that it had before."""
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
        jobs=(job.digests[domain],),
        shards=tuple(replace(shard, path=f"{domain}/{shard.path}") for shard in part.shards),
    )
    if earlier is None:
        return record
    sums: dict[str, Any] = {
        name: None if getattr(record, name) is None else getattr(record, name) + (earlier.get(name) or 0)
        for name in _SUMMED
    }
    shards = tuple(ShardRecord(**shard) for shard in earlier["shards"])
    return replace(record, **sums, jobs=(*earlier.get("jobs", ()), *record.jobs), shards=shards + record.shards)


def _record(entry: Mapping[str, Any]) -> DomainRecord:
    """The record of a domain that `shard_files` wrote, as it stands in the manifest."""
    shards = tuple(ShardRecord(**shard) for shard in entry["shards"])
    return DomainRecord(**{**entry, "jobs": tuple(entry["jobs"]), "shards": shards})


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
    load_template.cache_clear()  # the file may have changed since the last call
    template = load_template(config.chat_template).sha256 if config.chat_template is not None else None
    order = {
        "text_key": config.reading.document_key,
        "chat_template": template,
        "shuffle_seed": config.shuffle_seed,
    }
    if tokenizer is None:
        return {"format": "text", **order, "keep_columns": list(config.keep_columns)}
    return {
        "format": "packed",
        **order,
        "tokenizer": os.path.basename(os.path.normpath(config.tokenizer or "")),
        "tokenizer_sha256": tokenizer.sha256,
        "eos_id": tokenizer.eos_id,
        "parse_special_tokens": config.parse_special_tokens,
        "sequence_length": config.sequence_length,
        "dtype": tokenizer.dtype.name,
    }


def _earlier_entries(root: Path) -> dict[str, Any]:
    """The domains of the folder's manifest, as they stand in the file."""
    path = root / MANIFEST_NAME
    if not path.exists():
        return {}
    load_manifest(path)  # checks it
    entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["domains"]
    return entries


def _refuse_own_shards(root: Path, inputs: Mapping[str, Sequence[Input]]) -> None:
    """Raises ConfigurationError if an input lies where the shards of a domain are written."""
    folders = {os.path.realpath(root / domain): domain for domain in inputs}
    for domain, items in inputs.items():
        for item in items:
            if item.kind is Kind.DATASET or not is_local(item.url):
                continue
            path = os.path.realpath(local_path(item.url))
            for folder, target in folders.items():
                if path == folder or path.startswith(folder + os.sep):
                    raise ConfigurationError(
                        f"domain {domain!r}: {display_url(item.url)} lies in {folder!r}, where the shards of "
                        f"{target!r} would be written: choose another folder (--output, output=)"
                    )


def _refuse_other_files(root: Path, domains: Sequence[str], published: Set[str]) -> None:
    """Raises ConfigurationError if the folder of a new domain holds what this job did not put there."""
    for domain in domains:
        folder = root / domain
        found = sorted(folder.iterdir()) if folder.is_dir() else [folder] if folder.exists() else []
        others = [path for path in found if path.relative_to(root).as_posix() not in published]
        if others:
            raise ConfigurationError(
                f"{str(folder)!r} holds files that {str(root / MANIFEST_NAME)!r} does not name, such as "
                f"{others[0].name!r}: move them away, or choose another folder (--output, output=)"
            )


def _refuse_other_rows(
    root: Path, kept: Mapping[str, Any], settings: Mapping[str, Any], appended: Container[str]
) -> None:
    """Raises ConfigurationError if the folder holds rows of another kind: a batch of both fails only in training.

    Inside a domain, rows are also made in the same way.
    """
    for domain, entry in kept.items():
        earlier = entry.get("settings") or {}
        identity = "tokenizer_sha256" if "tokenizer_sha256" in earlier else "tokenizer"
        same: tuple[str, ...] = ("format", "sequence_length", identity, "eos_id")
        if domain in appended:
            same += ("parse_special_tokens", "keep_columns", "chat_template")
        for name in same:
            if name not in earlier or earlier[name] == settings.get(name):
                continue
            had, has = repr(earlier[name]), repr(settings.get(name))
            if name == "tokenizer_sha256":
                had, has = (f"{of.get('tokenizer')!r} ({str(of[name])[:12]})" for of in (earlier, settings))
            raise ConfigurationError(
                f"{str(root)!r} holds domain {domain!r} with {name} {had}, but these rows would have {has}: write "
                f"{'all rows of a domain' if name not in same[:4] else 'all domains'} alike, or into another folder"
            )
