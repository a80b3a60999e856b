"""Megatron-core beyond the conformance suite: other ranks at a resume, feedback wherever the model lies, refusals."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from trainers.conformance.launch import Launcher

CONFORMANCE = Path(__file__).parent / "conformance"


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    return Launcher(tmp_path_factory.mktemp("megatron"), CONFORMANCE / "run_megatron.py")


@pytest.fixture(scope="module")
def whole(launch):
    return launch("--steps", "12", "--save-every", "5", batch_size=4)


@pytest.fixture(scope="module")
def odm(launch):
    return launch("--steps", "8", "--save-every", "5", "--policy", "odm", batch_size=4)


@pytest.mark.parametrize(
    ("options", "data_ranks", "batch_size"),
    [(["--tensor", "2"], 1, 4), (["--pipeline", "2"], 1, 4), ([], 2, 2)],
    ids=["tensor-parallel", "pipeline-parallel", "data-parallel"],
)
def test_a_checkpoint_of_one_process_goes_on_in_two(launch, whole, options, data_ranks, batch_size):
    """The same weights give the same feedback, wherever their parts lie; and the samples are those of the whole run.

    Catches logits of a part of the vocabulary taken for all, questions counted twice, and a stage that answers for
    another.
    """
    checkpoints = str(whole.out / "checkpoints")
    settings = {"processes": 2, "data_ranks": data_ranks, "batch_size": batch_size}
    run = launch("--steps", "12", "--resume", checkpoints, "--no-random", *options, **settings)
    steps = [sorted(chain(*ranks)) for ranks in whole.micro_batches()]
    assert [sorted(chain(*ranks)) for ranks in run.micro_batches()] == steps[10:]
    ledger, before = run.results[0]["ledger"], whole.results[0]["ledger"]
    assert len(ledger) == len(before) == 4
    for entry, expected in zip(ledger, before, strict=True):
        assert (entry["start"], entry["decided_at"]) == (expected["start"], expected["decided_at"])
        assert entry["feedback"] == pytest.approx(expected["feedback"], abs=1e-4)
        assert entry["mix"] == pytest.approx(expected["mix"], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "data_ranks", "batch_size"),
    [(["--tensor", "2"], 1, 4), (["--pipeline", "2"], 1, 4), ([], 2, 2)],
    ids=["tensor-parallel", "pipeline-parallel", "data-parallel"],
)
def test_losses_by_domain_are_those_of_one_process_wherever_the_model_lies(
    launch, odm, options, data_ranks, batch_size
):
    """Rows are shifted for Megatron; the same weights have the same losses, and the state of the policy is restored.

    Catches losses of a part of the rows or of the vocabulary, and a policy that begins anew.
    """
    checkpoints = str(odm.out / "checkpoints")
    settings = {"processes": 2, "data_ranks": data_ranks, "batch_size": batch_size}
    run = launch("--steps", "8", "--policy", "odm", "--resume", checkpoints, "--no-random", *options, **settings)
    metrics, expected = run.results[0]["metrics"], odm.results[0]["metrics"]
    for domain in ("source/Science", "target/Finance"):
        (measured,) = metrics[f"loss/{domain}"]  # of the decision after the resume
        assert measured == pytest.approx(expected[f"loss/{domain}"][-1], abs=1e-4)
        assert measured != expected[f"loss/{domain}"][0]
    for result in run.results:
        assert len(result["ledger"]) == len(odm.results[0]["ledger"]) == 3
        for entry, before in zip(result["ledger"], odm.results[0]["ledger"], strict=True):
            assert entry["mix"] == pytest.approx(before["mix"], abs=1e-4)


PROGRAM = """
import sys
import os, tempfile, torch
from dmagent_loader.testing.on_cpu import cuda_on_cpu
from megatron.core import parallel_state
from dmagent_loader import AgentWeightedSampler, Environment
from dmagent_loader.integrations.megatron import MegatronMixing, data_parallel_ranks
from dmagent_loader.testing import write_toy_shards

def refused(action):
    try:
        action()
    except Exception as error:
        print(type(error).__name__, error)
    else:
        print("accepted")

refused(data_parallel_ranks)
os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
torch.distributed.init_process_group("gloo")
with cuda_on_cpu():
    parallel_state.initialize_model_parallel(1, 1)
    shards = write_toy_shards(tempfile.mkdtemp(), {"source/web": 30, "target/math": 20}, tokens=8)
    build = lambda **ranks: AgentWeightedSampler(shards, samples_per_reweight=8, **ranks)
    mixing = lambda sampler, **sizes: MegatronMixing(sampler, max_length=8, **sizes)
{actions}
sys.stdout.flush(); os._exit(0)
"""
REFUSALS = """
    refused(lambda: mixing(build(rank=1, world_size=2), micro_batch_size=2, global_batch_size=4))
    refused(lambda: mixing(build(), micro_batch_size=3, global_batch_size=4))
    ready = mixing(build(**data_parallel_ranks()), micro_batch_size=2, global_batch_size=4)
    refused(lambda: ready.load_state_dict({"json": "{"}))
    state = ready.state_dict()
    next(ready.data_iterator)
    refused(lambda: ready.load_state_dict(state))
"""
DECISIONS = """
    from dmagent_loader.policies import StaticPolicy
    ready = AgentWeightedSampler(
        shards, policy=StaticPolicy([0.5, 0.5]), decisions=5, exhausted="repeat", **data_parallel_ranks()
    )
    questions = Environment.from_pairs({"general": [("a", "b")]}, lambda text: [1] * len(text), progress=False)
    run = MegatronMixing(
        ready, questions, micro_batch_size=2, global_batch_size=4, max_length=8, train_iters=10
    )
    run.begin(None, base_feedback={"general": -4.0})
    print(ready.samples_per_reweight, ready.total_samples)
"""
WITHOUT_LOSSES = (
    DECISIONS.replace("StaticPolicy([0.5, 0.5])", "'odm'")
    + """
    print(ready.ledger.last.mix, ready.policy.base_losses)
"""
)
MOVED = """
    from dmagent_loader.transforms import ShiftedTokens
    rows = {"transform": ShiftedTokens(length=8), **data_parallel_ranks()}
    moved = build(**rows)
    moved.load_state_dict(build(**rows).state_dict(consumed=8))
    run = mixing(moved, micro_batch_size=4, global_batch_size=4)
    run.begin(None)
    print(next(run.data_iterator)["__index__"].tolist())
    run.step_end(None, iteration=1)
    print(run.consumed)
"""


def run(actions: str) -> subprocess.CompletedProcess[str]:
    code = PROGRAM.replace("{actions}", actions)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)


def test_decisions_are_spread_over_the_iterations():
    done = run(DECISIONS)
    assert done.stdout.splitlines()[-1:] == ["8 40"], done.stderr[-3000:]


def test_a_base_model_that_an_earlier_process_evaluated_has_no_losses():
    """Megatron-LM: catches its feedback taken for losses of the domains."""
    done = run(WITHOUT_LOSSES)
    assert done.stdout.splitlines()[-2:] == ["8 40", "(0.5, 0.5) None"], done.stderr[-3000:]
    assert "decides without the domains' losses: the base model was evaluated in an earlier process" in done.stderr


def test_a_run_of_another_trainer_goes_on_after_its_samples():
    """Its state is loaded into the sampler. Catches a count from 0, which the next checkpoint would save."""
    done = run(MOVED)
    assert done.stdout.splitlines()[-2:] == ["[8, 9, 10, 11]", "12"], done.stderr[-3000:]


def test_what_cannot_work_is_refused_with_the_remedy():
    done = run(REFUSALS)
    lines = [line for line in done.stdout.splitlines() if "Error" in line or line == "accepted"]
    assert len(lines) == 5, done.stderr[-3000:]
    assert "ConfigurationError" in lines[0]
    assert "initialize_model_parallel" in lines[0]
    assert "no process has data-parallel rank 0 of 2" in lines[1]
    assert "not a multiple of 3 rows" in lines[2]
    assert "StateError" in lines[3]
    assert "load it before the first step" in lines[4]


BRIDGE = """
import io, os, sys, tempfile, torch
from dmagent_loader.testing.on_cpu import cuda_on_cpu
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import RerunDataIterator, initialize_rerun_state_machine
from dmagent_loader import AgentWeightedSampler
from dmagent_loader.integrations.megatron import MegatronMixing, data_parallel_ranks
from dmagent_loader.integrations.megatron_lm import SavableIterator
from dmagent_loader.testing import write_toy_shards
from dmagent_loader.transforms import ShiftedTokens

os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
torch.distributed.init_process_group("gloo")
with cuda_on_cpu():
    parallel_state.initialize_model_parallel(1, 1)
    initialize_rerun_state_machine()
    shards = write_toy_shards(tempfile.mkdtemp(), {"source/web": 30, "target/math": 20}, tokens=8)

    def build():
        sampler = AgentWeightedSampler(
            shards, samples_per_reweight=8, transform=ShiftedTokens(length=8), **data_parallel_ranks()
        )
        mixing = MegatronMixing(sampler, micro_batch_size=2, global_batch_size=4, max_length=8)
        return RerunDataIterator(SavableIterator(mixing))

    saving, file = build(), io.BytesIO()
    before = [next(saving)["__index__"].tolist() for _ in range(4)]
    torch.save({"dataloader_state_dict": saving.iterable.save_state()}, file)
    left = [next(saving)["__index__"].tolist() for _ in range(4)]
    restored = build()
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)["dataloader_state_dict"]
    restored.iterable.restore_state(state)
    print(before, [next(restored)["__index__"].tolist() for _ in range(4)] == left)
    try:
        restored.iterable.restore_state(state)
    except Exception as error:
        print(type(error).__name__, error)
sys.stdout.flush(); os._exit(0)
"""


def test_the_iterator_is_saved_and_restored_as_megatron_bridge_does():
    """Without `restore_state`, Megatron-Bridge silently restarts the data."""
    done = subprocess.run([sys.executable, "-c", BRIDGE], capture_output=True, text=True, timeout=200)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("[[", "StateError"))]
    assert lines[0] == "[[0, 1], [2, 3], [4, 5], [6, 7]] True", done.stderr[-3000:]
    assert "load it before the first step" in lines[1]
