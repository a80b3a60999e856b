"""A loop under Lightning Fabric: each sample once over the ranks, and an exact resume from Fabric's checkpoint."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from launching import environment, python

from dmagent_loader.testing import write_toy_shards

PROGRAM = Path(__file__).parent / "run_fabric.py"
DOMAINS = {"source/a": 200, "target/x": 150}


def trained(folder: Path, processes: int, *, steps: list[int]) -> list[dict[str, Any]]:
    """What each rank was trained on, in runs that continue one another."""
    folder.mkdir()
    (folder / "shards.json").write_text(json.dumps(write_toy_shards(folder / "shards", DOMAINS, tokens=16)))
    ranks: list[dict[str, Any]] = [{} for _ in range(processes)]
    for count in steps:
        command = [*python(processes), str(PROGRAM), str(folder), str(count)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        for rank, before in enumerate(ranks):
            found = json.loads((folder / f"rank{rank}.json").read_text())
            before.update(found, seen=[*before.get("seen", []), *found["seen"]])
    return ranks


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, processes: int) -> None:
    whole = trained(tmp_path / "whole", processes, steps=[20])
    assert trained(tmp_path / "resumed", processes, steps=[11, 9]) == whole
    seen = sorted(itertools.chain(*(batch for rank in whole for batch in rank["seen"])))
    assert seen == list(range(20 * 4 * processes))
    assert whole[0]["policies"].count("influence") == 1 + 20 * 4 * processes // 32
    assert all(rank["mixes"] == whole[0]["mixes"] and rank["weights"] == whole[0]["weights"] for rank in whole)
