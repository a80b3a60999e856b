"""Megatron-LM's pretrain(): the one in the megatron-core package, since 0.17, or that of a checkout.

``make test-megatron`` runs it on megatron-core 0.19.2 and Python 3.12. ``MEGATRON_LM=path pytest
tests/trainers/megatron_lm`` runs it on a checkout of core_v0.16.1, which goes with megatron-core 0.16.1 on Python 3.11;
triton must be installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("MEGATRON_LM")
if CHECKOUT is None and (not importlib.util.find_spec("megatron") or not importlib.util.find_spec("megatron.training")):
    pytest.skip("megatron.training is not installed, and MEGATRON_LM names no checkout", allow_module_level=True)

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from trainers.conformance.launch import Launcher, Run  # noqa: E402

HERE = Path(__file__).parent
RECORDED = HERE / "logged-0.16.1.json"
RUN = ["--steps", "12", "--accumulation", "2", "--save-every", "5"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("megatron_lm")
    start = Launcher(folder, HERE / "program.py")
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (CHECKOUT, os.environ.get("PYTHONPATH")))))

    def run(*options: str, **settings) -> Run:
        return start(*options, "--base", str(folder / "base.json"), **settings)

    run.folder, run.replay = folder, start.replay
    run("--skip-train", "--steps", "1", check=False)
    yield run
    patch.undo()


def logged(run: Run) -> dict[str, dict[str, float]]:
    """Scalar -> step -> value of all that the run learnt and decided, without its times."""
    events = EventAccumulator(str(run.out / "logs"), size_guidance={"scalars": 0}).Reload()
    named = [tag for tag in events.Tags()["scalars"] if tag.split("/")[0] in ("env", "mix", "achieved")]
    return {tag: {str(e.step): e.value for e in events.Scalars(tag)} for tag in ["lm loss", "grad-norm", *named]}


@pytest.mark.parametrize("processes", [1, 2])
def test_pretrain_trains_on_the_plan_and_decides_at_its_evaluations(launch, processes):
    base = json.loads((launch.folder / "base.json").read_text())["feedback"]
    run = launch("--steps", "12", "--accumulation", "2", processes=processes)
    size = 2 * processes
    assert run.indices() == list(range(12 * 2 * size)) or sorted(run.indices()) == list(range(12 * 2 * size))
    keys = run.keys()
    assert keys == launch.replay(run, sorted(keys))
    ledgers = [result["ledger"] for result in run.results]
    assert all(ledger == ledgers[0] for ledger in ledgers)
    assert ledgers[0][0]["feedback"] == base
    assert [entry["decided_at"] for entry in ledgers[0]] == list(range(0, 12 * 2 * size + 1, 16))
    assert [entry["start"] for entry in ledgers[0]] == [entry["decided_at"] for entry in ledgers[0]]


def test_metrics_are_in_megatrons_event_file(launch):
    run = launch("--steps", "8", "--accumulation", "2")
    events = EventAccumulator(str(run.out / "logs")).Reload()
    assert {"env/general", "mix/target/Science", "lm loss"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("env/math")] == [4, 8]


def test_all_versions_log_the_same_values(launch):
    """Feedback, mixes, losses and gradients of Megatron-LM 0.16.1; written where the file does not exist."""
    values = logged(launch(*RUN))
    if not RECORDED.exists():
        RECORDED.write_text(json.dumps(values, indent=1) + "\n")
    expected = json.loads(RECORDED.read_text())
    assert values.keys() == expected.keys()
    for tag, by_step in expected.items():
        assert values[tag] == pytest.approx(by_step, rel=1e-5, abs=1e-6), tag


def test_killed_and_resumed_is_as_if_nothing_had_happened(launch):
    """With dropout: Megatron-LM's checkpoints hold the random states."""
    common = [*RUN, "--dropout", "0.1"]
    whole = launch(*common, processes=2)
    killed = launch(*common, "--kill-at", "8", processes=2, check=False)
    assert killed.returncode in (-signal.SIGKILL, 1), killed.printed[-2000:]
    resumed = launch(*common, "--resume", str(killed.out / "checkpoints"), processes=2)
    assert resumed.micro_batches() == whole.micro_batches()[10:]
    assert resumed.results[0]["ledger"] == whole.results[0]["ledger"]
    expected = {
        tag: {step: value for step, value in by_step.items() if int(step) > 5} for tag, by_step in logged(whole).items()
    }
    assert len(expected["lm loss"]) == 7
    assert logged(resumed) == expected


def test_training_stops_cleanly_when_the_target_is_used_up(launch):
    run = launch("--steps", "500", "--accumulation", "2", processes=2, batch_size=4)
    consumed = run.results[0]["end"]
    assert 150 < consumed < 206
    assert sorted(run.indices()) == list(range(consumed))


REFUSALS = """
import os, sys, tempfile, torch
from types import SimpleNamespace
from dmagent_loader.testing.on_cpu import cuda_on_cpu
with cuda_on_cpu(available=True):
    from megatron.core import parallel_state
    from megatron.training.global_vars import set_args
    from dmagent_loader import AgentWeightedSampler, Environment, MixingAgent, ReadingConfig
    from dmagent_loader.agent import AgentConfig
    from dmagent_loader.integrations.megatron import MegatronMixing, data_parallel_ranks
    from dmagent_loader.integrations.megatron_lm import PretrainHooks
    from dmagent_loader.testing import write_toy_shards
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(1, 1)
    shards = write_toy_shards(tempfile.mkdtemp(), {"source/web": 30, "target/math": 20}, tokens=8)
    environment = Environment.from_pairs(
        {"general": [("a", "b")], "math": [("1", "2")]}, lambda text: [ord(c) for c in text], progress=False
    )
    fitting = {
        "dataloader_type": "external", "iteration": 0, "skip_train": True, "micro_batch_size": 2,
        "global_batch_size": 4, "eval_interval": 6, "eval_iters": 1, "train_iters": 100,
    }
    def provide(**changed):
        sampler = AgentWeightedSampler(
            shards, agent=MixingAgent(AgentConfig()), samples_per_reweight=24, reading=ReadingConfig(progress=False),
            **data_parallel_ranks(),
        )
        build = lambda: MegatronMixing(sampler, environment, micro_batch_size=2, global_batch_size=4, max_length=8)
        set_args(SimpleNamespace(**fitting | changed))
        hooks = PretrainHooks(build, base_feedback="base.json", validation=iter(()))
        try:
            hooks.datasets_provider(None)
        except Exception as error:
            print("ANSWER", type(error).__name__, error)
        else:
            print("ANSWER accepted")
    provide()
    provide(eval_interval=3)
    provide(dataloader_type="cyclic")
    provide(eval_interval=4)
    provide(eval_interval=1000)
    provide(eval_interval=None)
    provide(eval_iters=0)
    provide(micro_batch_size=1)
    provide(global_batch_size=8)
    provide(rampup_batch_size=[2, 2, 100])
sys.stdout.flush(); os._exit(0)
"""


def test_arguments_that_do_not_fit_the_sampler_are_refused_with_the_remedy(launch, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", REFUSALS], capture_output=True, text=True, timeout=200, cwd=tmp_path, env={**os.environ}
    )
    answers = [line.removeprefix("ANSWER ") for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert answers[:2] == ["accepted", "accepted"], done.stderr[-3000:]
    expected = [
        "needs --dataloader-type external",
        "samples_per_reweight is 24, but --eval-interval 4 evaluates every 16 samples (4 a step), and decisions are "
        "made in evaluations only: pass samples_per_reweight=16, or --eval-interval 6",
        "pass samples_per_reweight=4000, or --eval-interval 6",
        "--eval-interval is None and --eval-iters is 1, so pretrain() evaluates nothing",
        "--eval-iters is 0, so pretrain() evaluates nothing",
        "MegatronMixing has micro_batch_size=2, but --micro-batch-size is 1",
        "MegatronMixing has global_batch_size=4, but --global-batch-size is 8",
        "--rampup-batch-size changes the global batch size during the run",
    ]
    assert len(answers) == len(expected) + 2
    for answer, message in zip(answers[2:], expected, strict=True):
        assert answer.startswith("ConfigurationError")
        assert message in answer
