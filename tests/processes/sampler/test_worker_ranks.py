"""Data workers of two ranks: each reads its own rank's share, however it was started."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from launching import environment, python

from dmagent_loader.mixture.hashing import stream_key
from dmagent_loader.mixture.sharding import StreamLayout
from dmagent_loader.testing import write_toy_shards

WORKER = """
import itertools, json, os, sys
import torch.distributed as dist
from dmagent_loader import AgentWeightedSampler, MixingDataLoader, ReadingConfig


def indices(samples):
    return [sample["__index__"] for sample in samples]


if __name__ == "__main__":
    folder, method = sys.argv[1:]
    with open(f"{folder}/shards.json") as file:
        shards = json.load(file)
    dist.init_process_group("gloo")
    reading = ReadingConfig(cache_dir=f"{folder}/cache", progress=False)
    sampler = AgentWeightedSampler(shards, samples_per_reweight=64, reading=reading)
    loader = MixingDataLoader(sampler, batch_size=4, num_workers=1, multiprocessing_context=method, collate_fn=indices)
    with open(f"{folder}/{method}{dist.get_rank()}.json", "w") as file:
        json.dump(list(itertools.islice(loader, 3)), file)
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_the_workers_of_each_rank_read_its_share(tmp_path: Path, method: str) -> None:
    """A spawned worker has no process group to ask for its rank: it took itself for rank 0 of 1."""
    shards = write_toy_shards(tmp_path / "shards", {"source/web": 40, "target/math": 40})
    (tmp_path / "shards.json").write_text(
        json.dumps({name: [str(path) for path in its] for name, its in shards.items()})
    )
    program = tmp_path / "program.py"
    program.write_text(WORKER)
    command = [*python(2), str(program), str(tmp_path), method]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        batches = json.loads((tmp_path / f"{method}{rank}.json").read_text())
        layout = StreamLayout(base=0, key=stream_key(0, "ranks"), rank=rank, world_size=2, batch_size=4)
        assert batches == [layout.indices(first, 4).tolist() for first in (0, 4, 8)]
