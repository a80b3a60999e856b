"""Runs the two halves of a job, over all its domains."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dmagent_loader._tasks import Advance, Workers, run_tasks
from dmagent_loader.errors import EmptyShardError, ShardError
from dmagent_loader.shards.inputs.kinds import Input
from dmagent_loader.shards.inputs.pieces import divide
from dmagent_loader.shards.manifest import ShardRecord
from dmagent_loader.shards.writing.assembling import Assembly, TarSize, plan_shards, tar_size
from dmagent_loader.shards.writing.chunks import Counts, read_tensor
from dmagent_loader.shards.writing.collecting import CHUNK_BYTES, Collection, check_bad
from dmagent_loader.shards.writing.config import ShardingConfig
from dmagent_loader.shards.writing.job import Job
from dmagent_loader.shards.writing.output import Part, next_row, next_shard
from dmagent_loader.shards.writing.packing import TextTokenizer

_SMALL_BYTES = 1 << 20
"""Size of a domain below which nobody minds what headers take."""

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """How a job is run.

    Attributes:
        config: Settings.
        tokenizer: Tokenizer of packed rows; None: raw text.
        workers: See `shard_files`.
        progress: Show progress bars.
        piece_bytes: See `PIECE_BYTES`.
    """

    config: ShardingConfig
    tokenizer: TextTokenizer | None
    workers: Workers
    progress: bool
    piece_bytes: int

    def write(
        self, job: Job, inputs: Mapping[str, Sequence[Input]], earlier: Mapping[str, Any], *, may_be_empty: bool
    ) -> dict[str, Part]:
        """Writes the chunks and shards of all domains.

        Args:
            job: The job.
            inputs: Domain -> its inputs.
            earlier: Entries in the manifest of the domains that get more shards.
            may_be_empty: All of these domains may be left out, because others of the job are written already.

        Raises:
            ShardError: An input cannot be used, or no document has a column to keep.
            EmptyShardError: A domain has no rows, and is not to be left out; or none has.
        """
        chunks = {domain: job.chunks(domain, items) for domain, items in inputs.items()}
        collections = {
            domain: [
                Collection(
                    domain=domain,
                    number=number,
                    piece=piece,
                    folder=chunks[domain],
                    config=self.config,
                    chunk_bytes=CHUNK_BYTES,
                )
                for number, piece in enumerate(divide(items, self.piece_bytes))
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
            written = [chunk for task in tasks for chunk in task.chunks()]
            first_shard, first_row = 0, 0
            if domain in earlier:
                first_shard = next_shard(job, domain, earlier[domain])
                first_row = next_row(job.place, earlier[domain])
            folders[domain] = job.shards(domain, first_shard, first_row)
            if counts[domain].documents:
                self._report_overhead(domain, tar_size(written, counts[domain], self.config))
            assemblies[domain] = plan_shards(
                folders[domain],
                domain.rpartition("/")[2],
                written,
                counts[domain],
                self.config,
                first_shard=first_shard,
                first_row=first_row,
            )
        small = [domain for domain, tasks in assemblies.items() if not tasks]
        if small:
            fault = self._without_rows(small[0], counts[small[0]])
            if len(small) == len(inputs) and not may_be_empty:
                job.remove()  # only other inputs or settings can help
                raise EmptyShardError(fault)
            if not self.config.skip_small:
                others = f" (the same for {small[1:]})" if small[1:] else ""
                raise EmptyShardError(f"{fault}, or leave such domains out (--skip-small, skip_small=True){others}")
            logger.warning(
                "left out, because they have too little text for a row (--skip-small): %s",
                ", ".join(f"{domain} ({counts[domain].documents} documents)" for domain in small),
            )
        assemblies = {domain: tasks for domain, tasks in assemblies.items() if tasks}
        shards = self._assemble(assemblies)
        return {
            domain: Part(
                folders[domain],
                counts[domain],
                shards[domain],
                b"".join(read_tensor(c, "rejects").tobytes() for task in collections[domain] for c in task.chunks()),
            )
            for domain in assemblies
        }

    def _collect(self, collections: Mapping[str, Sequence[Collection]], size: int) -> dict[str, Counts]:
        counts = {domain: Counts() for domain in collections}
        tasks = [task for items in collections.values() for task in items]
        with self._bar(f"reading {len(collections)} domains", size, "B") as advance:
            for task, result in run_tasks(_collect, tasks, self.tokenizer, self.workers, advance):
                counts[task.domain] += result
                check_bad(task.domain, counts[task.domain].bad, result.last_reason, self.config.max_bad)
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

    def _report_overhead(self, domain: str, size: TarSize) -> None:
        if size.content >= size.total / 2 or size.total < _SMALL_BYTES:
            return
        logger.warning(
            "domain %r: %.0f%% of the bytes of its shards will be headers and padding of the tar, because its rows are "
            "short, %d bytes each: %s",
            domain,
            100 * (1 - size.content / size.total),
            round(size.content / max(1, size.rows)),
            "choose longer rows (--sequence-length), or write text and pack it when it is read (PackText)"
            if self.tokenizer
            else "pack its documents (--tokenizer, --sequence-length), or ignore it where space does not matter",
        )

    def _assemble(self, assemblies: Mapping[str, Sequence[Assembly]]) -> dict[str, list[ShardRecord]]:
        tasks = [task for items in assemblies.values() for task in items]
        records: dict[Path, ShardRecord] = {}
        with self._bar("writing shards", len(tasks), "shard") as advance:
            for task, record in run_tasks(_assemble, tasks, None, self.workers, advance):
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


def _assemble(task: Assembly, context: None, advance: Advance) -> ShardRecord:
    record = task.run()
    advance(1)
    return record
