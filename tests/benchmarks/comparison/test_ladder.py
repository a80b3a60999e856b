"""Models of several sizes on the same mixes: the runs go on where they were stopped, and the table ranks them."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import records
from benchmarks.comparison import ladder
from benchmarks.comparison.policies import natural
from dmagent_loader.training.tasks.simulator import ProxySimulator
from dmagent_loader.training.tasks.spec import TaskSpec

pytestmark = pytest.mark.timeout(240)


@pytest.mark.slow
def test_a_ladder_that_was_stopped_goes_on(
    simulator: ProxySimulator, task: TaskSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "TASK", replace(task, steps=1))
    mixes = {"natural 30%": functools.partial(natural, 0.3), "random 0": functools.partial(ladder.drawn, 0)}
    monkeypatch.setattr(ladder, "MIXES", mixes)
    monkeypatch.setattr(ladder, "LEARNING_RATES", {"0.16M": 1e-3, "0.24M": 1e-3})
    output, rungs = tmp_path / "ladder.jsonl", ladder.rungs(["0.24M", "0.16M"], [1.0])
    assert list(map(ladder.label, rungs)) == ["0.16M", ladder.AGAIN, "0.24M"]
    ladder.run(simulator, output, rungs)
    whole = records.lines(output)
    assert len(whole) == 6
    output.write_text(output.read_text()[:-30])  # killed in the middle of a line
    ladder.run(simulator, output, rungs)
    again = records.lines(output)
    assert [line | {"seconds": 0} for line in again] == [line | {"seconds": 0} for line in whole]
    by_rung = {line["rung"]: line for line in whole if line["mix"] == "natural 30%"}
    assert by_rung["0.16M"]["base"] == by_rung[ladder.AGAIN]["base"] != by_rung["0.24M"]["base"]
    assert len({str(line["gains"]) for line in by_rung.values()}) == len(rungs), "two rungs had the same run"


def test_the_table_has_the_rank_correlations_of_whole_rungs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    keep, acquire = rng.normal(size=(2, len(ladder.MIXES)))
    gains = {"0.16M": (keep, acquire), "0.7M": (2 * keep - 1, -acquire), "5M": (keep, acquire)}
    output = tmp_path / "ladder.jsonl"
    for rung, columns in gains.items():
        for mix, of_mix in zip(ladder.MIXES, np.column_stack(columns).tolist(), strict=True):
            if (rung, mix) != ("5M", "influence"):
                share = float(rng.uniform())
                records.add(output, {"rung": rung, "mix": mix, "gains": of_mix, "target_share": share})
    shown = ladder.table(output).splitlines()
    assert len(shown) == 3, "a rung that lacks a mix is compared"
    assert shown[2].startswith("| 0.16M and 0.7M | 1.00 (1.00 to 1.00) | -1.00 (-1.00 to -1.00) |"), shown
