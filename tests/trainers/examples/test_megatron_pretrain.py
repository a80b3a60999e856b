"""The complete Megatron-core script, as a user runs it, on two processes; here on CPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from launching import REPOSITORY, environment, python
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLE = REPOSITORY / "examples" / "megatron_pretrain.py"


Metrics = dict[str, list[tuple[int, float]]]


def run(work: Path, out: str, *options: str) -> Metrics:
    command = [*python(2), "-m", "dmagent_loader.testing.on_cpu", str(EXAMPLE)]
    command += ["--shards", str(work / "shards"), "--tokenizer", str(work / "tokenizer.json")]
    command += ["--environment", f"general={work / 'general.jsonl'}", f"math={work / 'math.jsonl'}"]
    command += ["--output", str(work / out), "--sequence-length", "16", "--hidden-size", "16", "--layers", "2"]
    command += ["--micro-batch-size", "4", "--samples-per-reweight", "16", "--save-every", "4", *options]
    log = work / "log"
    with log.open("w") as written:  # into a file: the helpers of distributed checkpointing would hold a pipe open
        done = subprocess.run(command, env=environment(), stdout=written, stderr=written, timeout=280)
    assert done.returncode == 0, log.read_text()[-4000:]
    events = EventAccumulator(str(work / out / "logs")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def learnt(metrics: Metrics) -> Metrics:
    return {tag: values for tag, values in metrics.items() if tag.split("/")[0] in ("env", "mix", "achieved")}


def test_the_script_runs_and_goes_on(work):
    pipeline = ["--pipeline-parallel", "2", "--micro-batches", "2"]
    whole = run(work, "whole", "--steps", "12", *pipeline)
    first = run(work, "out", "--steps", "8", *pipeline)
    assert [step for step, _ in first["env/math"]] == [0, 2, 4, 6, 8]
    assert (work / "out" / "newest.txt").read_text() == "iter_0000008"
    resumed = run(work, "out", "--steps", "12", *pipeline)
    assert learnt(resumed) == learnt(whole)
    # Each rank's data-parallel world was one process; now two, with the model whole on each.
    again = run(work, "out", "--steps", "16")
    assert [step for step, _ in again["env/math"]] == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert (work / "out" / "newest.txt").read_text() == "iter_0000016"
