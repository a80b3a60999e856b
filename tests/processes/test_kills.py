"""A run that is killed again and again trains on exactly what it would have trained on; its state is always whole.

`make test` kills a run six times, `make test-all` more; 200 kills: ``benchmarks/reliability/kills.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import REPOSITORY, environment

KILLS = int(os.environ.get("RELIABILITY_KILLS", "20"))
"""Of each kind of run in the long test."""


def run(tmp_path: Path, *command: str, seconds: float = 280.0) -> tuple[int, str]:
    with (tmp_path / "log").open("w+") as log:
        done = subprocess.run(
            [sys.executable, *command],
            env=environment(PYTHONPATH=str(REPOSITORY)),
            stdout=log,
            stderr=log,
            timeout=seconds,
            check=False,
        )
        log.seek(0)
        return done.returncode, log.read()


def campaign(tmp_path: Path, kinds: list[str], kills: int, aimed: int, steps: int) -> dict:
    output = tmp_path / "counts.json"
    options = ["--kills", str(kills * len(kinds)), "--aimed", str(aimed * len(kinds)), "--steps", str(steps)]
    status, printed = run(tmp_path, "-m", "benchmarks.reliability.kills", str(output), *options, "--kinds", *kinds)
    assert status == 0, printed[-4000:]
    totals = json.loads(output.read_text())["totals"]
    assert set(totals) == set(kinds)
    for counts in totals.values():
        assert counts["kills"] == kills
        assert counts["aimed"] >= aimed
        assert (counts["half_written"], counts["differences"], counts["leftovers_at_end"]) == (0, 0, 0)
        # torch never tells a worker whose parent died before the worker looked for it the first time.
        assert counts["left_behind"] <= 1, "data workers of killed processes were still there after half a minute"
        assert counts["runs"] >= 1
    return totals


def test_killed_a_few_times_the_stream_is_the_undisturbed_one(tmp_path):
    campaign(tmp_path, ["plain 0", "plain 2"], kills=1, aimed=2, steps=45)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain 0", "plain 2", "trainer 0", "trainer 2"])
def test_killed_often_the_stream_is_the_undisturbed_one(tmp_path, kind):
    totals = campaign(tmp_path, [kind], kills=KILLS, aimed=KILLS, steps=150)
    assert len(totals[kind]["points"]) >= 5, "the kills missed most of the points that they were aimed at"


SABOTAGED = """
import random, sys
from pathlib import Path
from benchmarks.reliability import killable, kills
kills.import_for_all(trainer=False)
from dmagent_loader.integrations.mixing import Mixing

campaign = kills.Campaign(Path(sys.argv[1]) / "campaign", "plain 0", 45, random.Random(0))
{sabotage}
try:
    for number in (7, 16, 25):
        campaign.kill_at(killable.Kill(point="half", number=number, after=True))
    campaign.finish()
except kills.Difference as difference:
    print("NOTICED", difference)
"""
IN_PLACE = """
def in_place(path, data):
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        killable.os.fsync(file.fileno())
import dmagent_loader._run.state
dmagent_loader._run.state.write_atomically = killable.write_atomically = in_place
"""
PREFETCHED = """
state_dict = Mixing.state_dict
def prefetched(self):
    type(self.sampler._feed).check_consumed = lambda feed, consumed: None  # it refuses this where a worker is slow
    self.consumed += 4
    try:
        return state_dict(self)
    finally:
        self.consumed -= 4
Mixing.state_dict = prefetched
"""
FORGETFUL = """
load_state_dict = Mixing.load_state_dict
def forgetful(self, state):
    load_state_dict(self, state)
    self.sampler._deciding().decider.measurements.pop(0)
Mixing.load_state_dict = forgetful
"""


@pytest.mark.parametrize(
    ("sabotage", "noticed"),
    [
        pytest.param("", None, marks=pytest.mark.slow),
        (IN_PLACE, "is not whole"),
        pytest.param(PREFETCHED, "trained on", marks=pytest.mark.slow),
        pytest.param(FORGETFUL, "trained on", marks=pytest.mark.slow),
    ],
    ids=["sound", "state written in place", "state of what was prefetched", "history lost"],
)
def test_the_campaign_notices_a_run_that_does_not_keep_the_promise(tmp_path, sabotage, noticed):
    status, printed = run(tmp_path, "-c", SABOTAGED.format(sabotage=sabotage), str(tmp_path))
    assert status == 0, printed[-4000:]
    if noticed is None:
        assert "NOTICED" not in printed
    else:
        assert f"NOTICED {tmp_path}" in printed
        assert noticed in printed
