"""The complete script, as a user runs it: two processes that Lightning starts, then a run that goes on alone."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

pytest.importorskip("lightning.pytorch")


def decisions(out: Path) -> list[tuple[int, float]]:
    """(step, weight of the target field), of the newest run."""
    newest = max((out / "logs").glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    with (newest / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row["mix/target"])) for row in csv.DictReader(file) if row.get("env/math")]


def test_the_script_runs_and_goes_on(train):
    first = decisions(train("lightning_trainer.py", "--max-steps", "8", "--devices", "2"))
    assert [step for step, _ in first] == [0, 2, 4, 6, 8]
    assert all(0 < target < 1 for _, target in first)
    out = train("lightning_trainer.py", "--max-steps", "16", "--resume")
    assert [step for step, _ in decisions(out)] == [12, 16]
    assert (out / "model" / "model.safetensors").exists()
