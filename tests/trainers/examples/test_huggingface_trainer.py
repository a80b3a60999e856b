"""The complete script, as a user runs it: shards from the command line, a policy or an agent, a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def decisions(out: Path) -> list[dict[str, float]]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "env/math" in entry]


@pytest.mark.parametrize(
    "deciding",
    [
        (),
        pytest.param(("--agent", "dmagent-plus"), marks=pytest.mark.slow),
        pytest.param(("--agent", "dmagent-rl"), marks=pytest.mark.slow),
    ],
)
def test_the_script_runs_and_goes_on(train, deciding):
    first = decisions(train("huggingface_trainer.py", "--max-steps", "8", *deciding))
    assert [entry["step"] for entry in first] == [0, 4, 8]
    assert all(0 < entry["mix/target"] < 1 for entry in first)
    whole = decisions(train("huggingface_trainer.py", "--max-steps", "12", "--resume", *deciding))
    assert [entry["step"] for entry in whole] == [0, 4, 8, 12]
    assert [entry["mix/target"] for entry in whole[:3]] == [entry["mix/target"] for entry in first]
