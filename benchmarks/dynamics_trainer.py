"""How late a new mix takes effect in training, and what decisions cost there; for `benchmarks/dynamics.py`.

Runs the Trainer example in each way of loading data: the stock Trainer or its mixin, 1 and 2 processes, 0 and 2 torch
workers, gradient accumulation 1 and 4. All figures are from the Trainer's own log history.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import say

EXAMPLE = Path(__file__).parent.parent / "examples" / "huggingface_trainer.py"
SAMPLES, BATCH_SIZE, QUESTIONS = 640, 8, 60
"""Samples of each run over all ranks, batch size of each process, questions of each field."""

DECISIONS = 5


def training_run(demo: Path, own_loader: bool, processes: int, workers: int, accumulation: int) -> dict[str, Any]:
    """One run of the example on the demo's data: staleness in samples, milliseconds and seconds of each decision."""
    with tempfile.TemporaryDirectory() as output:
        launch = [sys.executable]
        if processes > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        steps = SAMPLES // (BATCH_SIZE * accumulation * processes)
        files = [f"{field}={demo}/corpus/env/{field}.jsonl" for field in ("general", "code")]
        command = [*launch, str(EXAMPLE), "--shards", str(demo / "shards"), "--tokenizer", str(demo / "base_model")]
        command += ["--environment", *files, "--output", output, "--cpu", "--report-to", "none"]
        command += ["--exhausted", "repeat", "--batch-size", str(BATCH_SIZE), "--accumulation", str(accumulation)]
        command += ["--workers", str(workers), "--max-steps", str(steps), "--save-steps", "100000"]
        command += ["--samples-per-reweight", str(SAMPLES // DECISIONS), "--max-questions", str(QUESTIONS)]
        command += ["--zero-look-ahead"] if own_loader else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        history = json.loads((Path(output) / "trainer_state.json").read_text())["log_history"]
    # The decision before the first step is left out: nothing has been fetched then.
    logged = [entry for entry in history if "dmagent/staleness_samples" in entry][1:]
    return {
        "loader": "`DataMixingTrainerMixin`" if own_loader else "stock Trainer",
        "processes": processes,
        "workers": workers,
        "accumulation": accumulation,
        "step_samples": BATCH_SIZE * accumulation * processes,
        "staleness": [int(entry["dmagent/staleness_samples"]) for entry in logged],
        "decision_ms": [1000 * entry["dmagent/decision_seconds"] for entry in logged],
        "evaluation_seconds": [entry["dmagent/evaluation_seconds"] for entry in logged],
        "evaluation_share": logged[-1]["dmagent/evaluation_share"],
    }


def training_runs(demo: Path, own_loader: bool, quick: bool) -> list[dict[str, Any]] | None:
    """All ways of loading with the stock Trainer, or with the mixin's own loader; None without the demo's data."""
    if not (demo / "shards" / "manifest.json").exists():
        say(f"staleness under the Trainer left out: {demo} holds no shards; run `make demo` first, or pass --demo")
        return None
    found = []
    for processes, workers, accumulation in itertools.product((1, 2), (0, 2), (1, 4)):
        if not quick or (processes, accumulation) == (1, 1):
            found.append(training_run(demo, own_loader, processes, workers, accumulation))
            row = found[-1]
            say(f"{row['loader']}, {processes} processes, {workers} workers: {row['staleness']} samples late")
    return found
