"""The complete script, as a user runs it: two processes under torchrun, then a run that goes on alone to the end."""

from __future__ import annotations

import json
from pathlib import Path


def decisions(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_script_runs_and_goes_on_until_the_data_are_used_up(train):
    first = decisions(train("plain_loop.py", "--max-steps", "8", processes=2))
    assert [entry["step"] for entry in first] == [0, 2, 4, 6, 8]
    assert all(0 < entry["mix/target"] < 1 for entry in first)
    out = train("plain_loop.py", "--resume", "--accumulation", "2", "--workers", "1")
    whole = decisions(out)
    assert whole[: len(first)] == first
    consumed = [entry["dmagent/consumed_samples"] for entry in whole]
    assert consumed == [16.0 * number for number in range(len(whole))]
    assert len(whole) > len(first) + 2
    assert (out / "model" / "model.safetensors").exists()
