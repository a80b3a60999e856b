"""Every restore of a run: after each step, on any number of ranks and data workers, the same samples in the same order.

`make test` restores some states of each kind, `make test-all` all of them, also in real gloo processes; see `restores`.
"""

from __future__ import annotations

import json
import subprocess
from itertools import chain

import pytest
from launching import REPOSITORY, environment, python

from benchmarks.reliability.groups import ROWS, Stretch
from benchmarks.reliability.restores import WORKERS, WORLDS, Restores


@pytest.fixture(scope="module")
def restores(tmp_path_factory) -> Restores:
    return Restores(tmp_path_factory.mktemp("restores"))


def test_the_run_has_all_that_can_go_wrong(restores):
    """Decisions and a change by hand that take effect, a domain that runs out in between, and an end."""
    for workers in WORKERS:
        whole = restores.whole(1, workers)
        assert len(whole.ledger) >= 8
        assert {entry["decided_by"] for entry in whole.ledger} == {"follows", "manual"}
        keys = [key for _, key in chain(*whole.steps)]
        assert sum(key.startswith("target_proofs") for key in keys) == ROWS["target/proofs"]
        last = max(i for i, key in enumerate(keys) if key.startswith("target_proofs"))
        assert 16 < last < len(keys) - 16
        assert len(whole.steps) > 15


@pytest.mark.parametrize("world_size", WORLDS)
def test_restored_now_and_then_without_workers(restores, world_size):
    for at in list(restores.whole(2, 0).states)[world_size % 3 :: world_size + 3]:
        restores.check((2, 0), at, (world_size, 0))


@pytest.mark.parametrize(("before", "after"), [((4, 2), (1, 2)), ((1, 0), (2, 2)), ((2, 2), (4, 0))])
def test_restored_now_and_then_with_workers(restores, before, after):
    for at in list(restores.whole(*before).states)[1::9]:
        restores.check(before, at, after)


@pytest.mark.slow
@pytest.mark.parametrize("from_workers", WORKERS)
@pytest.mark.parametrize("from_world", WORLDS)
def test_every_restore_of_a_run(restores, from_world, from_workers):
    """Each step x 1, 2, 4 ranks x 0, 2 workers, to 1, 2, 4 ranks x 0, 2 workers."""
    for at in restores.whole(from_world, from_workers).states:
        for world_size in WORLDS:
            for workers in WORKERS:
                restores.check((from_world, from_workers), at, (world_size, workers))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "processes", "workers"), [(4, 2, 0), (1, 4, 0), (2, 2, 2)])
def test_every_state_is_restored_by_real_processes(restores, before, processes, workers, tmp_path):
    whole = restores.whole(before, workers)
    (tmp_path / "shards.json").write_text(json.dumps(restores.shards))
    (tmp_path / "states.json").write_text(json.dumps(whole.states))
    program = REPOSITORY / "benchmarks" / "reliability" / "groups.py"
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run(
            [*python(processes), program, tmp_path, str(workers)],
            env=environment(PYTHONPATH=str(REPOSITORY)),
            stdout=log,
            stderr=log,
            timeout=280,
            check=False,
        )
    assert done.returncode == 0, (tmp_path / "log").read_text()[-4000:]
    ranks = [json.loads((tmp_path / f"left-{rank}.json").read_text()) for rank in range(processes)]
    for at in whole.states:
        parts = [rank[str(at)] for rank in ranks]
        assert all(part["ledger"] == parts[0]["ledger"] for part in parts)
        steps = [
            sorted((index, key) for batch in step for index, key in batch)
            for step in zip(*(part["steps"] for part in parts), strict=True)
        ]
        left = Stretch(steps=steps, ledger=parts[0]["ledger"])
        restores.check((before, workers), at, (processes, workers), left)
