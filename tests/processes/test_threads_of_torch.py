"""Batches are converted without torch's threads, which wait for each other where other processes use all cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dmagent_loader.shards.writing.packing import encode_npy
from dmagent_loader.shards.writing.tar_writer import TarWriter

PROGRAM = """
import os, sys, time, torch
from dmagent_loader import AgentWeightedSampler, MixingDataLoader, ReadingConfig
from dmagent_loader.transforms import ShiftedTokens, collate_packed, packed_tokens

def num_threads():
    # Once those that end have ended.
    counts = [-1, -2]
    while len(set(counts[-4:])) > 1:
        time.sleep(0.1)
        counts.append(len(os.listdir("/proc/self/task")))
    return counts[-1]

folder, kind = sys.argv[1:]
transform = {"collate_packed": None, "packed_tokens": packed_tokens, "ShiftedTokens": ShiftedTokens(length=2048)}[kind]
sampler = AgentWeightedSampler(
    {"source/a": folder},
    transform=transform,
    samples_per_reweight=1000,
    reading=ReadingConfig(cache_dir=folder, progress=False),
)
collate = collate_packed if transform is None else (lambda samples: samples)
batches = iter(MixingDataLoader(sampler, batch_size=64, collate_fn=collate))
before = num_threads()
next(batches)
print(num_threads() - before)
tokens = torch.zeros((64, 2048), dtype=torch.int32)
tokens.to(torch.int64)
print(num_threads() - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the number of threads is read from /proc")
@pytest.mark.parametrize("kind", ["collate_packed", "packed_tokens", "ShiftedTokens"])
def test_a_batch_of_packed_rows_starts_no_thread_of_torch(tmp_path: Path, kind: str) -> None:
    writer = TarWriter(tmp_path / "a.tar")
    for row in range(70):
        writer.add(f"{row:03d}", {"input_ids.npy": encode_npy(np.full(2049, row, np.uint16))})
    writer.close()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), kind],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "4"},
    )
    ours, of_torch = map(int, done.stdout.split())
    assert ours == 0, done.stderr
    assert of_torch > 0, "this build of torch converts in a single thread, so the test shows nothing"
