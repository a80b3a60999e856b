"""Megatron-LM's pretrain(), where a checkout is at hand: it is not in any package.

Run with ``MEGATRON_LM=path pytest tests/trainers/megatron_lm``; a checkout of core_v0.16.1 goes with megatron-core
0.16.1. It must be able to import triton.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainers.conformance.launch import Launcher, Run

CHECKOUT = os.environ.get("MEGATRON_LM")
pytestmark = pytest.mark.skipif(CHECKOUT is None, reason="MEGATRON_LM names no checkout of Megatron-LM")


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("megatron_lm")
    start = Launcher(folder, Path(__file__).with_name("program.py"))
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (CHECKOUT, os.environ.get("PYTHONPATH")))))

    def run(*options: str, **settings) -> Run:
        return start(*options, "--base", str(folder / "base.json"), **settings)

    run.folder, run.replay = folder, start.replay
    run("--skip-train", "--steps", "1", check=False)
    yield run
    patch.undo()


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


def test_killed_and_resumed_is_as_if_nothing_had_happened(launch):
    common = ["--steps", "12", "--accumulation", "2", "--save-every", "5"]
    whole = launch(*common, processes=2)
    killed = launch(*common, "--kill-at", "8", processes=2, check=False)
    assert killed.returncode in (-signal.SIGKILL, 1), killed.printed[-2000:]
    resumed = launch(*common, "--resume", str(killed.out / "checkpoints"), processes=2)
    assert resumed.micro_batches() == whole.micro_batches()[10:]
    assert resumed.results[0]["ledger"] == whole.results[0]["ledger"]


def test_training_stops_cleanly_when_the_target_is_used_up(launch):
    run = launch("--steps", "500", "--accumulation", "2", processes=2, batch_size=4)
    consumed = run.results[0]["end"]
    assert 150 < consumed < 206
    assert sorted(run.indices()) == list(range(consumed))
