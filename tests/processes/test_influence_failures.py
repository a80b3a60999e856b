"""One rank of two (torchrun, gloo) fails while influence is measured: all ranks go the same way, and none waits."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from launching import REPOSITORY, environment, python

WORKER = """
import json, os, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from dmagent_loader import _distributed
from dmagent_loader.errors import InfluenceError
from influence_steps import ROWS, byte_environment, train_step, whole


class Middle(nn.Module):
    # One layer of the model, inside which a rank fails.

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.place = self.error = None
        self.room = 0

    def fail(self, tensor):
        raise self.error("a layer without room")

    def forward(self, x):
        fails = self.error is not None and x.shape[0] * x.shape[1] > self.room
        if fails and self.place == "forward":
            self.fail(x)
        found = self.layer(x)
        if fails and self.place == "backward" and found.requires_grad:
            found.register_hook(self.fail)
        return found


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.first, self.middle = nn.Embedding(256, 8), nn.Linear(8, 8), Middle()
        self.last, self.head = nn.Linear(8, 8), nn.Linear(8, 256)

    def forward(self, input_ids, attention_mask):
        x = self.first(self.embedding(input_ids).cumsum(dim=1))
        return self.head(torch.tanh(self.last(torch.tanh(self.middle(torch.tanh(x))))))


# A rank that waits for one that has left ends with an error after this time.
dist.init_process_group("gloo", timeout=timedelta(seconds=40))
rank = dist.get_rank()
environment = byte_environment()
errors = {"memory": torch.OutOfMemoryError, "influence": InfluenceError, "other": ValueError}
report = {}
for kind in ("ddp", "fsdp"):
    for way in ("gradient", "reverse") if kind == "fsdp" else ("gradient", "ghost", "reverse"):
        for error, place, room in (
            (None, None, 0),
            ("memory", "forward", 40), ("memory", "backward", 40), ("memory", "forward", 0), ("memory", "backward", 0),
            ("influence", "forward", 0), ("influence", "backward", 0), ("other", "forward", 0),
        ):
            model = Model()
            if kind == "ddp":
                model = nn.parallel.DistributedDataParallel(model)
            else:
                for layer in (model.first, model.middle, model.last, model):
                    fully_shard(layer)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            train_step(model, optimizer, 0)
            middle = model.module.middle if kind == "ddp" else model.middle
            middle.place, middle.room, middle.error = place, room, errors.get(error) if rank == 1 else None
            started = time.monotonic()
            try:
                found = environment.influence(model, ROWS, optimizer=optimizer, way=way)
                result = {"scores": found.values().tolist(), "way": found.way, "notes": found.notes}
            except Exception as fault:
                result = {"error": f"{type(fault).__name__}: {fault}"}
            result["seconds"] = time.monotonic() - started
            middle.error = None
            train_step(model, optimizer, 1)  # training goes on
            result["after"] = [whole(p).double().sum().item() for p in model.parameters()]
            report[f"{kind} {way} {error} {place} {room}"] = result
try:
    with _distributed.together("a step", shared=(InfluenceError,)):
        if rank == 1:
            raise InfluenceError("one rank cannot read its rows")
except Exception as fault:
    report["shared"] = f"{type(fault).__name__}: {fault}"
try:
    with _distributed.together("a step", shared=(InfluenceError,)):
        raise (InfluenceError if rank == 1 else ValueError)(f"rank {rank}")
except Exception as fault:
    report["mixed"] = f"{type(fault).__name__}: {fault}"
with open(f"{sys.argv[1]}/rank{rank}.json", "w") as file:
    json.dump(report, file)
dist.barrier()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""

KINDS = ["ddp gradient", "ddp ghost", "ddp reverse", "fsdp gradient", "fsdp reverse"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures")
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    done = subprocess.run(
        [*python(2), str(worker), str(folder)],
        env=environment(PYTHONPATH=str(REPOSITORY / "tests")),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(file).read_text()) for file in sorted(folder.glob("rank*.json"))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_rank_short_of_memory_takes_all_to_smaller_calls(ranks, kind, place):
    for report in ranks:
        found, expected = report[f"{kind} memory {place} 40"], report[f"{kind} None None 0"]
        assert "short of memory" in found["notes"][-1]
        assert found["way"] == expected["way"]
        scale = np.abs(expected["scores"]).max()
        np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-2 * scale)
    first, second = (report[f"{kind} memory {place} 40"] for report in ranks)
    assert first["scores"] == second["scores"]
    assert first["notes"] == second["notes"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_rank_without_any_memory_ends_the_measurement_on_all_ranks_alike(ranks, kind, place):
    """The callbacks go on with the topics of the questions after an InfluenceError, and after no other."""
    first, second = (report[f"{kind} memory {place} 0"] for report in ranks)
    assert first["error"] == second["error"]
    assert first["error"].startswith("InfluenceError: the reverse method was short of memory")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_an_influence_error_of_one_rank_is_raised_by_all(ranks, kind, place):
    for report in ranks:
        error = report[f"{kind} influence {place} 0"].get("error")
        assert error == "InfluenceError: a layer without room"


@pytest.mark.parametrize("kind", KINDS)
def test_any_other_error_of_one_rank_stops_the_others_with_a_rank_error(ranks, kind):
    first, second = (report[f"{kind} other forward 0"]["error"] for report in ranks)
    assert first.startswith("RankError")
    assert "rank 1: ValueError: a layer without room" in first
    assert second == "ValueError: a layer without room"


@pytest.mark.parametrize("kind", KINDS)
def test_no_rank_waits_and_training_goes_on_after_every_failure(ranks, kind):
    names = [name for name in ranks[0] if name.startswith(f"{kind} ")]
    assert len(names) == 8
    for name in names:
        assert max(report[name]["seconds"] for report in ranks) < 30
        for report in ranks:
            np.testing.assert_array_equal(report[name]["after"], ranks[0][f"{kind} None None 0"]["after"])


def test_a_shared_error_is_raised_by_all_unless_a_rank_fails_otherwise(ranks):
    assert [report["shared"] for report in ranks] == ["InfluenceError: one rank cannot read its rows"] * 2
    assert ranks[0]["mixed"] == "ValueError: rank 0"
    assert ranks[1]["mixed"].startswith("RankError")
