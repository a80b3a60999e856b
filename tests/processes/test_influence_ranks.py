"""Influence under a real two-process torchrun (gloo): DDP and FSDP 2 give the numbers of one process, on every rank."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from launching import REPOSITORY, environment, python

WORKER = """
import json, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from influence_steps import ROWS, byte_environment, train_step, whole


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(256, 8)
        self.middle, self.dropout, self.head = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 256)
        self.fails = False

    def forward(self, input_ids, attention_mask):
        if self.fails:
            raise ValueError("a broken rank")
        return self.head(torch.tanh(self.middle(self.dropout(self.embedding(input_ids).cumsum(dim=1)))))


distributed = "RANK" in os.environ
if distributed:
    dist.init_process_group("gloo")
rank = dist.get_rank() if distributed else 0
environment = byte_environment()
report = {}
for kind in ("ddp", "fsdp"):
    for way in ("gradient", "ghost", "reverse"):
        for knows in (True, False):
            model = Model().eval()
            if distributed and kind == "ddp":
                model = nn.parallel.DistributedDataParallel(model)
            elif distributed:
                fully_shard(model.middle)
                fully_shard(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            for seed in range(3):
                train_step(model, optimizer, seed)
            model.train()
            before = [whole(p) for p in model.parameters()]
            grads = [p.grad for p in model.parameters()]
            kept = [whole(g) for g in grads]
            torch.manual_seed(100 + rank)
            state = torch.get_rng_state()
            found = environment.influence(model, ROWS, optimizer=optimizer if knows else None, way=way)
            same = torch.equal(state, torch.get_rng_state()) and all(m.training for m in model.modules())
            same &= all(p.grad is g for p, g in zip(model.parameters(), grads))
            same &= all(torch.equal(whole(g), k) for g, k in zip(grads, kept))
            same &= all(torch.equal(whole(p), b) for p, b in zip(model.parameters(), before))
            model.eval()
            train_step(model, optimizer, 7)  # training goes on
            report[f"{kind} {way} {knows}"] = {
                "way": found.way, "notes": found.notes,
                "scores": found.values().tolist(), "errors": found.errors().tolist(), "same": same,
                "after": [whole(p).double().sum().item() for p in model.parameters()],
            }
plain = Model()
plain.fails = rank == 1
try:
    environment.influence(plain, ROWS)
    report["error"] = None
except Exception as error:
    report["error"] = f"{type(error).__name__}: {error}"
plain.fails = False
try:
    environment.influence(plain, {d: r[: 4 + rank] for d, r in ROWS.items()})
    report["differ"] = None
except Exception as error:
    report["differ"] = f"{type(error).__name__}: {error}"
with open(f"{sys.argv[1]}/rank{rank}.json", "w") as file:
    json.dump(report, file)
if distributed:
    dist.barrier()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    results = []
    for name, command in (
        ("one", [*python(), str(worker)]),
        ("two", [*python(2), str(worker)]),
    ):
        output = folder / name
        output.mkdir()
        done = subprocess.run(
            [*command, str(output)],
            env=environment(PYTHONPATH=str(REPOSITORY / "tests")),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results.append([json.loads(Path(file).read_text()) for file in sorted(output.glob("rank*.json"))])
    return results


KINDS = [
    f"{kind} {way} {knows}"
    for kind in ("ddp", "fsdp")
    for way in ("gradient", "ghost", "reverse")
    for knows in (True, False)
]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_measure_what_one_process_measures(reports, kind):
    (one,), (first, second) = reports
    assert first[kind]["scores"] == second[kind]["scores"]
    assert first[kind]["errors"] == second[kind]["errors"]
    scale = np.abs(one[kind]["scores"]).max()
    tolerance = 2e-2 if "reverse" in kind else 1e-4
    np.testing.assert_allclose(first[kind]["scores"], one[kind]["scores"], atol=tolerance * scale)


@pytest.mark.parametrize("knows", [True, False])
def test_the_ghost_method_gives_way_to_gradients_where_parameters_are_sharded(reports, knows):
    _, (first, second) = reports
    assert first[f"ddp ghost {knows}"]["way"] == "ghost"
    for report in (first, second):
        assert report[f"fsdp ghost {knows}"]["way"] == "gradient"
        assert "the parameters are sharded" in report[f"fsdp ghost {knows}"]["notes"][0]


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_as_if_nothing_had_been_measured(reports, kind):
    """Parameters, gradients, modes and random states are the same bits on both ranks, and the wrapper still works."""
    _, (first, second) = reports
    assert first[kind]["same"]
    assert second[kind]["same"]
    other = kind.replace("gradient", "reverse").replace("ghost", "reverse")
    np.testing.assert_allclose(first[kind]["after"], first[other]["after"], rtol=0, atol=0)


def test_a_rank_that_fails_or_differs_stops_all(reports):
    _, (first, second) = reports
    assert "a broken rank" in first["error"]
    assert second["error"].startswith("ValueError")
    assert "differ in the rows" in first["differ"]
    assert first["differ"].startswith("RankError")
