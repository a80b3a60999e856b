"""Trainings of `dmagent-plus` as a random factor."""

from __future__ import annotations

from pathlib import Path

from benchmarks.comparison import trainings
from benchmarks.comparison.tables import tables
from benchmarks.records import add
from dmagent_loader.agent.checkpoint import resolve
from dmagent_loader.training.tasks.spec import TaskSpec


def test_the_bundled_agent_is_one_of_the_ten() -> None:
    weights = {n: (trainings.FOLDER / str(n) / "model.safetensors").read_bytes() for n in trainings.numbers()}
    assert list(weights) == list(range(10))
    assert len(set(weights.values())) == 10
    assert weights[trainings.BUNDLED_NUMBER] == (resolve(trainings.BUNDLED) / "model.safetensors").read_bytes()
    assert len(trainings.entries()) == 9


def test_the_spread_is_over_the_runs_that_all_trainings_have(task: TaskSpec, tmp_path: Path) -> None:
    output = tmp_path / "comparison.jsonl"

    def write(policy: str, stream: int, gain: float) -> None:
        line = {"task": task.id, "policy": policy, "stream": stream, "spec": task.to_json(), "gains": [gain, gain]}
        add(output, line)

    for share, gain in (("0%", 0.0), ("30%", 0.5), ("100%", 1.0)):
        write(f"range {share}", 1000, gain)
    for stream in (0, 1):
        write("natural 30%", stream, 0.1)
        write("influence", stream, 0.2)
        write("dmagent-plus", stream, 0.4 + stream)
    write("dmagent-plus, training 0", 0, 0.3)
    write("dmagent-plus, training 1", 0, 0.5)
    text = tables(output, ["natural 30%", "influence"])
    assert "on 1 runs of 1 tasks" in text
    assert "| 3 (chosen, `dmagent-plus`) | +0.400 ± nan | +0.300 ± nan | +0.200 ± nan |" in text
    assert "| median of 3 | +0.400 | +0.300 | +0.200 |" in text
    assert "| standard deviation | 0.100 | 0.100 | 0.100 |" in text
