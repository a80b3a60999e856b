"""The environment under a real two-process torchrun (gloo): the numbers of one process, on every rank, and no hang."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from launching import REPOSITORY, environment, python

WORKER = """
import json, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from dmagent_loader.environment import Environment
from dmagent_loader.environment.scoring import Scorer, scoring_state


class Bytes(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.dropout, self.head = nn.Embedding(256, 8), nn.Dropout(0.5), nn.Linear(8, 256)
        self.fails, self.calls = False, 0

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask):
        self.calls += 1
        if self.fails:
            raise MemoryError("no room on this rank")
        return self.head(self.dropout(self.embedding(input_ids).cumsum(dim=1)))


sys.stderr.isatty = lambda: True  # bars are shown on a terminal only
distributed = "RANK" in os.environ
if distributed:
    dist.init_process_group("gloo")
rank = dist.get_rank() if distributed else 0
model = Bytes().train()
# Ranks that train have different random states and modes; DDP's forward would communicate and so hang in unequal calls.
parallel = nn.parallel.DistributedDataParallel(model) if distributed else model
torch.manual_seed(100 + rank)
pairs = {"a": [("why " * (i % 5), "because " * (i * i % 7) + str(i)) for i in range(21)], "one": [("q", "a")]}
environment = Environment.from_pairs(
    pairs, lambda text: list(text.encode()), batch_size=3, prefix_token_id=0, progress=True
)
report = {"feedback": environment.evaluate(parallel), "calls": model.calls}
report["sums"] = environment.log_likelihoods(parallel)["a"].sums.tolist()
# Tensor-parallel ranks hold parts of one model: all score everything, and nothing may be counted twice.
report["replicas"] = environment.evaluate(model, rank=0, world_size=1)
few = Environment.from_pairs({"one": [("q", "a")]}, lambda text: list(text.encode()), progress=False)
report["few"] = few.evaluate(model)
model.fails = rank == 1
try:
    environment.evaluate(model)
    report["error"] = None
except Exception as error:
    report["error"] = f"{type(error).__name__}: {error}"
# Weights that lie on several ranks are gathered in the model's own forward, and only then.
sharded = Bytes()
if distributed:
    fully_shard(sharded)
with scoring_state(sharded):
    report["taken over"] = Scorer(sharded).take_over_output_layer(
        [window for listed in environment._windows_of(sharded).values() for window in listed]
    )
report["sharded"] = environment.evaluate(sharded)
report["training"] = all(module.training for module in parallel.modules())
with open(f"{sys.argv[1]}/rank{rank}.json", "w") as file:
    json.dump(report, file)
if distributed:
    dist.barrier()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def launch(folder: Path, world_size: int) -> tuple[list[dict], str]:
    """Reports of all ranks, and what they wrote to stderr; one rank runs as a plain program without a process group."""
    folder.mkdir()
    program = folder / "worker.py"
    program.write_text(WORKER)
    done = subprocess.run(
        [*python(world_size), program, folder],
        env=environment(PYTHONPATH=str(REPOSITORY)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)], done.stderr


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict:
    return launch(tmp_path_factory.mktemp("single") / "run", 1)[0][0]


@pytest.fixture(scope="module")
def double(tmp_path_factory) -> tuple[list[dict], str]:
    return launch(tmp_path_factory.mktemp("double") / "run", 2)


def test_two_ranks_return_the_numbers_of_one_process_and_agree_exactly(single, double):
    """Catches: a mean of the ranks' means (the shares are unequal), and pairs scored twice to fill up the last rank."""
    ranks, _ = double

    assert ranks[0]["feedback"] == ranks[1]["feedback"]
    assert ranks[0]["sums"] == ranks[1]["sums"]
    assert ranks[0]["feedback"] == pytest.approx(single["feedback"], abs=1e-5)
    assert ranks[0]["sums"] == pytest.approx(single["sums"], abs=1e-4)


def test_ranks_share_the_work_in_equally_many_calls(single, double):
    ranks, _ = double

    assert ranks[0]["calls"] == ranks[1]["calls"] < single["calls"]


def test_more_ranks_than_questions_is_fine(single, double):
    assert [rank["few"] for rank in double[0]] == [pytest.approx(single["few"], abs=1e-6)] * 2


def test_ranks_that_hold_parts_of_one_model_count_once(single, double):
    assert [rank["replicas"] for rank in double[0]] == [pytest.approx(single["feedback"], abs=1e-5)] * 2


def test_a_sharded_model_gives_the_numbers_of_a_whole_one(single, double):
    """Catches an output layer that is applied while its weights are not there, or in unequal numbers of collectives."""
    for rank in double[0]:
        assert rank["taken over"] is True
        assert rank["sharded"] == pytest.approx(single["feedback"], abs=1e-5)


def test_failure_on_one_rank_is_an_error_on_all_instead_of_a_hang(double):
    (first, second), _ = double

    assert first["error"] == (
        "RankError: evaluating the model failed on 1 of 2 ranks; rank 1: MemoryError: no room on this rank"
    )
    assert second["error"] == "MemoryError: no room on this rank"
    assert first["training"] is second["training"] is True


def test_only_rank_0_shows_a_progress_bar(double):
    _, stderr = double
    # Each bar starts with an empty one; five evaluations of rank 0 show a bar.
    assert stderr.count("environment:   0%") == 5
