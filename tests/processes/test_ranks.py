"""Four gloo processes with one rank that is late, other than the rest, or gone: refused on every rank, by name.

Catches ranks that train on side by side with other shards, seeds or ledgers (their samples then come twice or never),
and ranks that wait for one that will not come. See `ranks` for the cases.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from typing import Any

import pytest
from launching import REPOSITORY, environment, python

PROGRAM = REPOSITORY / "benchmarks" / "reliability" / "ranks.py"
Reports = dict[str, dict[int, dict[str, Any]]]

SETTINGS = (
    *("seed", "exhausted", "shuffle_window", "samples_per_reweight", "initial_mix", "start_state", "policy", "shadow"),
    *("history_mix", "guard", "on_bad_row", "world_size", "shuffle_shards"),
)
REFUSED = {
    "rank 3 lacks a shard": ("opening the shards failed on 1 of 4 ranks; rank 3: ShardNotFoundError", {3}),
    "rank 0 has no manifest": ("building the sampler failed on 1 of 4 ranks; rank 0: ShardNotFoundError", {0}),
    "rank 2 has fewer shards": (
        "differ in the shards of 'source/web' (ranks 0, 1, 3: 4 shards with 64 rows; rank 2: 3 shards with 48 rows)",
        set(),
    ),
    "rank 2 has other domains": ("differ in the domains (ranks 0, 1, 3: ['source/web', 'source/books',", set()),
    "rank 2 has other contents": ("differ in the contents of the shards (ranks 0, 1, 3:", set()),
    "rank 1 has an older state": ("differ in the state's consumed samples (ranks 0, 2, 3: 64; rank 1: 48)", set()),
    "rank 3 has a damaged state": (
        "loading a state failed on 1 of 4 ranks; rank 3: StateError: the state's count",
        {3},
    ),
    "rank 3 has an unreadable checkpoint": ("failed on 1 of 4 ranks; rank 3: StateError: the saved state", {3}),
    "rank 1 does not resume": ("'loading a state', but rank 1 is at 'deciding on the next mix'", {1}),
    "rank 1 allows other data": ("the ranks differ in data (ranks 0, 2, 3: exact; rank 1: changed)", set()),
    "rank 1 has another ledger": ("differ in the mixes so far (ranks 0, 2, 3: 1 mixes,", set()),
    "rank 1 counts otherwise": ("differ in consumed (ranks 0, 2, 3: 16; rank 1: 12)", set()),
    "rank 2 sets its mix by hand": ("but rank 2 is at 'changing the mix by hand'", {2}),
    "rank 0's model diverged": ("failed on 1 of 4 ranks; rank 0: FeedbackError: the feedback is not finite", {0}),
    "rank 2 has other questions": ("the ranks differ in the environment's questions (ranks 0, 1, 3:", set()),
    **{f"rank 2 differs: {name}": (f"the ranks differ in {name} (ranks 0, 1, 3:", set()) for name in SETTINGS},
    "rank 2 differs: the loader": ("the ranks differ in the loader (ranks 0, 1, 3:", set()),
    "rank 2 differs: no process has data-parallel rank 2 of 4": ("(the processes have [0, 1, 1, 3])", set()),
}
"""Case -> what the others are told, and the ranks that have an error of their own."""

GONE = {
    "rank 3 dies before a decision": ("deciding on the next mix", 3),
    "rank 0 dies in its policy": ("deciding on the next mix", 0),
    "rank 2 dies before publication": ("agreeing on the first sample of a new mix", 2),
    "rank 1 dies in the evaluation": ("evaluating the model", 1),
    "rank 0 dies at the start": ("building the sampler", 0),
    "rank 1 dies in a restore": ("loading a state", 1),
    "rank 1 stops": ("deciding on the next mix", 1),
}
UNDISTURBED = ("nothing", "rank 2 is slow", "nothing, after all of these")


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> Reports:
    folder = tmp_path_factory.mktemp("ranks")
    with (folder / "log").open("w") as log:  # not a pipe, which a rank that hangs would hold open
        command = [sys.executable, PROGRAM, folder / "reports.json"]
        done = subprocess.run(
            command, env=environment(PYTHONPATH=str(REPOSITORY)), stdout=log, stderr=log, timeout=280, check=False
        )
    assert done.returncode == 0, (folder / "log").read_text()[-3000:]
    found: Reports = defaultdict(dict)
    for report in json.loads((folder / "reports.json").read_text()):
        found[report["case"]][report["rank"]] = report
    return found


def test_every_case_is_expected_here(reports):
    assert set(reports) == {*UNDISTURBED, "rank 0's policy fails", *REFUSED, *GONE}


@pytest.mark.parametrize("case", UNDISTURBED)
def test_a_slow_rank_and_refusals_before_change_nothing(case, reports):
    ranks = reports[case]
    assert all("error" not in report for report in ranks.values()), ranks
    seen, ledgers = zip(*(ranks[rank]["result"] for rank in range(4)), strict=True)
    assert [index for group in zip(*seen, strict=True) for index in sorted(group)] == list(range(96))
    assert all(ledger == ledgers[0] for ledger in ledgers)
    assert ledgers[0] == reports["nothing"][0]["result"][1]
    assert len(ledgers[0]) == 6, "the mix was to change at each decision"


def test_a_policy_that_fails_on_rank_0_leaves_all_ranks_with_the_last_mix(reports):
    results = [reports["rank 0's policy fails"][rank]["result"] for rank in range(4)]
    assert results == [results[0]] * 4
    accepted, failures, _ = results[0]
    assert accepted == [False, False]
    assert failures == 3


@pytest.mark.parametrize("case", REFUSED)
def test_a_rank_that_differs_is_refused_on_every_rank_by_name(case, reports):
    message, own = REFUSED[case]
    for rank in range(4):
        report = reports[case][rank]
        assert "error" in report, f"rank {rank} went on"
        assert report["seconds"] < 30
        if rank not in own:
            assert report["error"] == "RankError", report["traceback"]
            assert message in report["message"]


@pytest.mark.parametrize("case", GONE)
def test_a_rank_that_is_gone_is_an_error_on_the_others_within_the_timeout(case, reports):
    step, victim = GONE[case]
    assert set(reports[case]) == {0, 1, 2, 3} - {victim}
    for report in reports[case].values():
        assert report["error"] == "RankError", report["traceback"]
        assert report["message"].startswith(f"{step}: rank {report['rank']} of 4 waited ")
        assert "start the run again from its newest checkpoint" in report["message"]
        assert report["seconds"] < 30


@pytest.mark.slow
def test_under_torchrun_the_run_ends_with_the_message_of_a_rank_that_waited(tmp_path):
    """torchrun ends the others by itself; what users read is the first traceback in its output."""
    program = tmp_path / "program.py"
    program.write_text(TORCHRUN)
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run(
            [*python(4), program, tmp_path],
            env=environment(PYTHONPATH=str(REPOSITORY)),
            stdout=log,
            stderr=log,
            timeout=200,
            check=False,
        )
    printed = (tmp_path / "log").read_text()
    assert done.returncode == 1, printed[-3000:]
    assert "RankError: deciding on the next mix: rank 0 of 4 waited" in printed
    assert "Signal 9 (SIGKILL)" in printed


TORCHRUN = """
import os, signal, sys, time
import torch.distributed as dist
from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader.policies import StaticPolicy
from dmagent_loader.testing import write_toy_shards

dist.init_process_group("gloo")
folder = f"{sys.argv[1]}/{dist.get_rank()}"
shards = write_toy_shards(folder, {"source/web": 32, "target/math": 32})
reading = ReadingConfig(progress=False, cache_dir=folder)
sampler = AgentWeightedSampler(shards, policy=StaticPolicy([0.5, 0.5]), samples_per_reweight=16, reading=reading)
if dist.get_rank() == 3:
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
sampler.reweight({"general": -3.0}, consumed=0)
"""
