"""Runs of the training program, alone or under torchrun, and what they trained on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dmagent_loader import AgentWeightedSampler
from dmagent_loader.ledger import Ledger
from dmagent_loader.testing import write_toy_shards

PROGRAM = Path(__file__).with_name("program.py")


@dataclass
class Run:
    """What one run of the program left behind."""

    out: Path
    returncode: int
    stderr: str
    world_size: int
    batch_size: int
    results: list[dict[str, Any]] = field(default_factory=list)

    def micro_batches(self) -> list[list[list[int]]]:
        """For each micro-batch, the global indices of each rank."""
        ranks = [self._seen(rank, "indices") for rank in range(self.world_size)]
        assert len({len(seen) for seen in ranks}) == 1, "a rank has a batch more than another"
        return [list(batches) for batches in zip(*ranks, strict=True)]

    def keys(self) -> dict[int, int]:
        """Global index -> crc32 of the row's key."""
        found: dict[int, int] = {}
        for rank in range(self.world_size):
            for indices, keys in zip(self._seen(rank, "indices"), self._seen(rank, "keys"), strict=True):
                for index, key in zip(indices, keys, strict=True):
                    assert index not in found, f"sample {index} was trained on twice"
                    found[index] = key
        return found

    def decisions(self) -> list[dict[str, Any]]:
        """Log entries of the decisions."""
        return [entry for entry in self.results[0]["log_history"] if "dmagent/staleness_samples" in entry]

    def _seen(self, rank: int, what: str) -> list[list[int]]:
        lines = (self.out / f"seen-{rank}.jsonl").read_text().splitlines()
        return [json.loads(line)[what] for line in lines]


class Launcher:
    """Starts the program on one set of shards."""

    def __init__(self, folder: Path, shards: dict[str, list[str]]) -> None:
        self.folder, self.shards = folder, shards
        self.number = 0
        (folder / "shards.json").write_text(json.dumps(shards))

    def __call__(self, *options: str, processes: int = 1, batch_size: int = 2, check: bool = True) -> Run:
        out = self.folder / f"run-{self.number}"
        self.number += 1
        launch = [sys.executable]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            launch += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
            launch += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        command = [*launch, str(PROGRAM), "--shards", str(self.folder / "shards.json"), "--out", str(out)]
        command += ["--batch-size", str(batch_size), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        run = Run(out, done.returncode, done.stderr, processes, batch_size)
        if check:
            assert done.returncode == 0, done.stderr[-4000:]
            run.results = [json.loads((out / f"result-{rank}.json").read_text()) for rank in range(processes)]
        return run

    def replay(self, run: Run, indices: list[int]) -> dict[int, int]:
        """Global index -> crc32 of the key, from the run's ledger alone."""
        sampler = AgentWeightedSampler(
            self.shards, samples_per_reweight=1, seed=3, progress=False, cache_dir=self.folder / "cache"
        )
        for entry in Ledger.from_json(sampler.space.names, run.results[0]["ledger"]):
            sampler.plan.append(entry)
        located = sampler.plan.locate(indices)
        rows = zip(located.domain, located.shard, located.row, strict=True)
        keys = [sampler.collection.read(int(d), int(s), int(r)).key for d, s, r in rows]
        return {index: zlib.crc32(key.encode()) for index, key in zip(indices, keys, strict=True)}


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    folder = tmp_path_factory.mktemp("trainer")
    rows = {"source/Science": 60, "source/News": 50, "target/Science": 64, "target/Finance": 32}
    return Launcher(folder, write_toy_shards(folder / "shards", rows, tokens=16))
