"""Starts training programs, alone or under torchrun, and reads what they leave behind; see `parts`."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import uuid
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from launching import environment, python

from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader.mixture.ledger import Ledger
from dmagent_loader.testing import write_toy_shards

ROWS = {"source/Science": 60, "source/News": 50, "target/Science": 64, "target/Finance": 32}
SEED = 3
DOMAINS = list(ROWS)
NEW_DOMAIN = "source/Law"
TIMEOUT_SECONDS = float(os.environ.get("CONFORMANCE_TIMEOUT", "280"))
"""Of one program; NeMo alone takes a minute to be imported on a busy machine."""


@dataclass
class Run:
    """What one run of a program left behind."""

    out: Path
    returncode: int
    printed: str
    processes: int
    data_ranks: int
    batch_size: int
    results: list[dict[str, Any]] = field(default_factory=list)

    def micro_batches(self) -> list[list[list[int]]]:
        """For each micro-batch, the global indices of each data-parallel rank."""
        ranks = [[line["indices"] for line in self.seen(rank)] for rank in range(self.data_ranks)]
        assert len({len(seen) for seen in ranks}) == 1, "a rank has a batch more than another"
        return [list(batches) for batches in zip(*ranks, strict=True)]

    def indices(self) -> list[int]:
        """Global indices of all that was trained on, micro-batch after micro-batch."""
        return [index for ranks in self.micro_batches() for indices in ranks for index in indices]

    def keys(self) -> dict[int, int]:
        """Global index -> crc32 of the row's key."""
        found: dict[int, int] = {}
        for rank in range(self.data_ranks):
            for line in self.seen(rank):
                for index, key in zip(line["indices"], line["keys"], strict=True):
                    assert index not in found, f"sample {index} was trained on twice"
                    found[index] = key
        return found

    def seen(self, rank: int) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / f"seen-{rank}.jsonl").read_text().splitlines()]


class Launcher:
    """Starts a program on one set of shards.

    Attributes:
        shards: Domain -> paths.
        changed_shards: The same without `lost_shard`, and with the domain `NEW_DOMAIN`.

    Args:
        folder: Of all runs.
        program: Path of the program.
    """

    def __init__(self, folder: Path, program: Path) -> None:
        self.folder, self.program = folder, program
        self.number = 0
        self.shards = write_toy_shards(folder / "shards", ROWS, tokens=16)
        self.lost_shard, *left = self.shards["source/News"]
        new = write_toy_shards(folder / "new", {NEW_DOMAIN: 40}, tokens=16)
        self.changed_shards = {**self.shards, "source/News": left, **new}

    def __call__(
        self,
        *options: str,
        processes: int = 1,
        data_ranks: int | None = None,
        batch_size: int = 2,
        check: bool = True,
        changed: bool = False,
    ) -> Run:
        """Runs the program to its end, on `shards` or on `changed_shards`."""
        out = self.folder / f"run-{self.number}"
        self.number += 1
        listed = self.folder / f"{out.name}-shards.json"
        listed.write_text(json.dumps(self.changed_shards if changed else self.shards))
        command = [*python(processes), str(self.program), "--shards", str(listed)]
        command += ["--out", str(out), "--batch-size", str(batch_size), *options]
        mark = {"CONFORMANCE_RUN": uuid.uuid4().hex}
        # Into a file: a process that a killed one leaves behind would hold a pipe open.
        with (self.folder / f"{out.name}.log").open("w+") as log:
            try:
                done = subprocess.run(command, env=environment(**mark), stdout=log, stderr=log, timeout=TIMEOUT_SECONDS)
            finally:
                _end_processes(mark)
            log.seek(0)
            printed = log.read()
        run = Run(out, done.returncode, printed, processes, data_ranks or processes, batch_size)
        if check:
            assert done.returncode == 0, printed[-5000:]
            run.results = [json.loads((out / f"result-{rank}.json").read_text()) for rank in range(processes)]
        return run

    def keys_of(self, shards: Iterable[str]) -> set[int]:
        """crc32 of the keys of all rows of some shards."""
        keys: set[int] = set()
        for path in shards:
            with tarfile.open(path) as tar:
                keys |= {zlib.crc32(name.split(".")[0].encode()) for name in tar.getnames()}
        return keys

    def replay(self, run: Run, indices: list[int]) -> dict[int, int]:
        """Global index -> crc32 of the key, from the run's ledger alone."""
        sampler = AgentWeightedSampler(
            self.shards,
            samples_per_reweight=1,
            seed=SEED,
            reading=ReadingConfig(progress=False, cache_dir=self.folder / "cache"),
        )
        for entry in Ledger.from_json(sampler.space.names, run.results[0]["ledger"]):
            sampler.plan.append(entry)
        located = sampler.plan.locate(indices)
        rows = zip(located.domain, located.shard, located.row, strict=True)
        keys = [sampler.collection.read(int(d), int(s), int(r)).key for d, s, r in rows]
        return {index: zlib.crc32(key.encode()) for index, key in zip(indices, keys, strict=True)}


def _end_processes(mark: dict[str, str]) -> None:
    """Ends what a killed run has left behind: data workers, and the helpers of distributed checkpointing."""
    (name, value), *_ = mark.items()
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value:
                process.kill()
        except psutil.Error:
            continue
