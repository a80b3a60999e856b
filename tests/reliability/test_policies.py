"""A policy that misbehaves in any way: the last good mix holds, loudly, and the run goes on; seen through a whole run.

What the guard makes of a single proposal is tested in ``tests/unit/policies/test_guard.py``.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dmagent_loader import AgentWeightedSampler, DecisionConfig, Environment, ReadingConfig
from dmagent_loader.integrations.mixing import Mixing
from dmagent_loader.policies import GuardConfig
from dmagent_loader.testing import sample_ids, write_toy_shards

ROWS = {"source/web": 300, "source/books": 200, "target/math": 300}
GOOD = [np.array([0.2, 0.3, 0.5]), np.array([0.6, 0.1, 0.3]), np.array([0.1, 0.1, 0.8])]
INTERVAL = 30
LATE_SECONDS = 0.15


class Misbehaves:
    """Good at first, then bad for two steps, then good again."""

    name = "misbehaves"

    def __init__(self, bad):
        self.bad, self.calls = bad, 0

    def propose(self, history):
        self.calls += 1
        if len(history) in (2, 3):
            return self.bad(history)
        return GOOD[len(history) % 3]


class Keeps(Misbehaves):
    """What the other is to be: it says itself that the mix stays as it was."""

    def __init__(self):
        super().__init__(lambda history: GOOD[1])


def deep(history):
    return deep(history)


def rewrites(history):
    """Gets past the read-only view, to the arrays behind it, and then fails."""
    for array in (history.mixes, history.feedback):
        array.base.setflags(write=True)
        array.base[:] = np.nan
    object.__setattr__(history, "domains", ("x",))
    raise RuntimeError("after it had rewritten the history")


class Unreadable:
    def __array__(self, dtype=None, copy=None):
        raise OSError("no array today")


class Changing:
    """Not an array when it is looked at for the second time."""

    def __init__(self):
        self.looks = 0

    def __array__(self, dtype=None, copy=None):
        self.looks += 1
        return np.full(3, 1 / 3) if self.looks > 1 else np.array([1.0, 1.0, -1.0])


BAD = {
    "NaN": lambda history: np.array([np.nan, 0.5, 0.5]),
    "infinite": lambda history: np.array([np.inf, 0.0, 0.0]),
    "too short": lambda history: np.array([0.5, 0.5]),
    "too long": lambda history: np.full(52, 1 / 52),
    "two dimensions": lambda history: np.full((1, 3), 1 / 3),
    "no dimension": lambda history: 1.0,
    "negative": lambda history: np.array([0.6, 0.6, -0.2]),
    "sums to 2": lambda history: np.array([1.0, 0.5, 0.5]),
    "all zero": lambda history: np.zeros(3),
    "off the simplex by 1 in 500": lambda history: np.array([0.2, 0.3, 0.502]),
    "nothing": lambda history: None,
    "words": lambda history: ["a", "b", "c"],
    "complex": lambda history: np.full(3, 1 / 3 + 0j),
    "yes and no": lambda history: np.array([True, False, False]),
    "a mapping": lambda history: {"source/web": 1.0},
    "ragged": lambda history: [[0.5], [0.25, 0.25], 0.0],
    "needs grad": lambda history: torch.full((3,), 1 / 3, requires_grad=True),
    "unreadable": lambda history: Unreadable(),
    "negative at first sight": lambda history: Changing(),
    "raises": lambda history: 1 / 0,
    "no memory": lambda history: np.empty(1 << 60),
    "recursion": deep,
    "exit": lambda history: sys.exit(3),
    "stops iterating": lambda history: next(iter(())),
    "rewrites history": rewrites,
    "sleeps": lambda history: time.sleep(20 * LATE_SECONDS),
    "never ends": lambda history: forever_until_told(),
}
_stop = False


def forever_until_told():
    while not _stop:
        sum(range(1000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    (folder / "shards.json").write_text(json.dumps(write_toy_shards(folder / "shards", ROWS)))
    return folder


@pytest.fixture
def start(folder):
    def start(policy, *, shadow=False, **settings):
        sampler = AgentWeightedSampler(
            json.loads((folder / "shards.json").read_text()),
            policy=policy,
            samples_per_reweight=INTERVAL,
            reading=ReadingConfig(progress=False, cache_dir=folder / "cache"),
            deciding=DecisionConfig(guard=GuardConfig(timeout_seconds=LATE_SECONDS), shadow=shadow),
            **settings,
        )
        questions = {"general": [("a", "b")], "math": [("1", "2")]}
        environment = Environment.from_pairs(
            questions, lambda text: [ord(c) for c in text], prefix_token_id=0, progress=False
        )
        return Mixing(sampler, environment)

    return start


def train(mixing, steps, mend=lambda mixing: None):
    """Decides at every interval; returns the samples and the metrics of each decision."""
    seen, metrics = [], []
    mixing.begin()
    for _ in range(steps):
        assert mixing.due()
        mend(mixing)
        report = mixing.reweight(lambda environment: {"general": -3.0, "math": -4.0 + mixing.consumed / 1000})
        metrics.append(report.full)
        seen += sample_ids(mixing.sampler, INTERVAL)
        mixing.consumed += INTERVAL
    return seen, metrics


@pytest.mark.parametrize("kind", BAD)
def test_the_last_good_mix_holds_loudly_and_the_run_goes_on(start, kind, caplog, monkeypatch):
    global _stop
    _stop = False
    wanted = start(Keeps())
    kept, _ = train(wanted, 6)
    mixing = start(Misbehaves(BAD[kind]))

    def wait_for_the_late_one(mixing):
        """After two steps at which it is late or still busy, a late policy comes to its end."""
        global _stop
        if len(mixing.sampler.measurements) == 3:
            _stop = True
            caller = mixing.sampler._run.decider.guard._caller
            deadline = time.monotonic() + 30
            while caller._late is not None and not caller._late.done.is_set() and time.monotonic() < deadline:
                time.sleep(0.01)

    with caplog.at_level(logging.ERROR):
        seen, metrics = train(mixing, 6, wait_for_the_late_one)
    assert seen == kept
    assert [entry.mix for entry in mixing.sampler.ledger] == [entry.mix for entry in wanted.sampler.ledger]
    assert [entry.accepted for entry in mixing.sampler.ledger] == [True, False, False, True, True, True]
    assert [m["dmagent/policy_failures"] for m in metrics] == [0, 1, 2, 2, 2, 2]
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    for step, error in zip((2, 3), errors, strict=True):
        assert error.startswith(f"policy 'misbehaves' failed at step {step}: ")
        assert error.endswith("; the previous mix stays in force")
    assert [entry.note for entry in mixing.sampler.ledger][1:3] == errors
    assert all(np.isfinite(mixing.sampler._run.decider.history().mixes).all() for _ in range(2))


def test_what_rounding_does_to_a_mix_is_no_failure(start):
    """float32 and float16 weights do not sum to 1 to the last bit, and may be a hair below 0."""

    def rounded(history):
        exact = np.array([1 / 3, 2 / 3, -1e-10]) if len(history) % 2 else np.array([0.1, 0.2, 0.7])
        return exact.astype(np.float16 if len(history) == 2 else np.float32)

    mixing = start(Misbehaves(rounded))
    _, metrics = train(mixing, 6)
    assert metrics[-1]["dmagent/policy_failures"] == 0
    assert all(sum(entry.mix) == pytest.approx(1.0, abs=1e-12) for entry in mixing.sampler.ledger)


def test_a_late_policy_holds_the_run_up_only_for_its_time(start):
    """And the next step does not wait for it again, although it is still busy."""
    mixing = start(Misbehaves(BAD["sleeps"]))
    train(mixing, 1)
    late = mixing.reweight(lambda environment: {"general": -3.0, "math": -3.0}).decision
    sample_ids(mixing.sampler, INTERVAL)
    mixing.consumed += INTERVAL
    busy = mixing.reweight(lambda environment: {"general": -3.0, "math": -3.0}).decision
    assert LATE_SECONDS <= late.seconds < 15 * LATE_SECONDS
    assert busy.seconds < LATE_SECONDS
    assert "still busy" in busy.notes[0]


def test_a_policy_without_a_limit_of_its_own_has_one(start):
    assert GuardConfig().timeout_seconds == 300


def test_failures_are_counted_over_restarts(start):
    mixing = start(Misbehaves(BAD["NaN"]))
    train(mixing, 2)
    state = json.loads(json.dumps(mixing.state_dict()))
    resumed = start(Misbehaves(BAD["NaN"]))
    resumed.load_state_dict(state)
    _, metrics = train(resumed, 2)
    assert [m["dmagent/policy_failures"] for m in metrics] == [2, 2]


def test_failures_are_counted_in_shadow_mode_too(start):
    mixing = start(Misbehaves(BAD["NaN"]), shadow=True)
    _, metrics = train(mixing, 4)
    assert [m["dmagent/policy_failures"] for m in metrics] == [0, 1, 2, 2]


HOG = """
import json, logging, resource, sys
from pathlib import Path
import numpy as np, psutil
from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader.testing import sample_ids

logging.basicConfig()
process = psutil.Process()

class Hog:
    name = "hog"
    def propose(self, history):
        resource.setrlimit(resource.RLIMIT_AS, (process.memory_info().vms + (1 << 29),) * 2)
        self.taken = 0
        held = []
        while True:
            held.append(np.ones(1 << 22))
            self.taken += held[-1].nbytes

folder = Path(sys.argv[1])
shards = json.loads((folder / "shards.json").read_text())
policy = Hog()
sampler = AgentWeightedSampler(
    shards, policy=policy, samples_per_reweight=30, reading=ReadingConfig(progress=False, cache_dir=folder / "cache")
)
sample_ids(sampler, 30)
before = process.memory_info().rss
decision = sampler.reweight({"general": -3.0}, consumed=30)
print(json.dumps({
    "in_force": decision.in_force,
    "note": decision.notes[0],
    "taken": policy.taken,
    "kept": process.memory_info().rss - before,
    "left": len(sample_ids(sampler, 100)),
}))
"""


@pytest.mark.slow
def test_a_policy_that_takes_all_memory_gives_it_back(folder):
    done = subprocess.run(
        [sys.executable, "-c", HOG, folder],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    report = json.loads(done.stdout)
    assert not report["in_force"]
    assert "MemoryError" in report["note"]
    assert report["taken"] > 200 << 20
    assert report["kept"] < 50 << 20, "the error that was logged still holds the policy's arrays"
    assert report["left"] == 100
    assert "policy 'hog' failed at step 1" in done.stderr
