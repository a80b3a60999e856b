"""A long run over many domains keeps its memory, open files and threads; the run of 1e7 samples is ``soak.py``."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from launching import REPOSITORY, environment, python

from benchmarks.reliability.soak import POINTS, chart, soak, summary

PROGRAM = str(REPOSITORY / "benchmarks" / "reliability" / "soak.py")
SAMPLES = int(os.environ.get("RELIABILITY_SOAK_SAMPLES", "2000000"))
"""Of the long test."""


def test_memory_files_and_threads_stay_as_they_are(tmp_path):
    """200,000 samples with 40 decisions, in two processes of their own, the second from the state of the first."""
    for samples in ("100000", "200000"):
        command = [*python(), PROGRAM, tmp_path, "--samples", samples, "--domains", "200", "--rows", "10"]
        command += ["--per-reweight", "5000", "--seconds", "100"]
        done = subprocess.run(command, env=environment(PYTHONPATH=str(REPOSITORY)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["samples"] == 200_000
    assert found["decisions"] == 40
    assert found["fewest_samples_of_a_domain"] > 0
    assert found["growth_megabytes_per_million"] < 60, found
    assert found["files_come_and_go"] <= 4
    assert found["threads_come_and_go"] <= 1
    assert found["most_files"] < 1200


@pytest.mark.slow
def test_memory_files_and_threads_stay_as_they_are_for_long(tmp_path):
    found = soak(tmp_path, samples=SAMPLES, domains=1000, rows=30, per_reweight=64_000, seconds=250.0)["summary"]
    assert found["samples_after_warm_up"] > 100_000
    assert found["growth_megabytes_per_million"] < 15, found
    assert found["files_come_and_go"] <= 4
    assert found["threads_come_and_go"] <= 1


def test_growth_is_what_is_left_after_the_warm_up():
    """Catches a summary that averages a leak away, or that counts what starting a process costs."""

    def points(rss):
        return [
            {"samples": 1000 * i, "seconds": i, "rss": value, "files": 9, "threads": 2} for i, value in enumerate(rss)
        ]

    warm = [100 << 20, 200 << 20, *[(300 << 20)] * (POINTS - 2)]
    leak = [(100 << 20) + (i << 17) for i in range(POINTS)]
    assert summary([points(warm)])["growth_megabytes_per_million"] == 0
    assert summary([points(leak), points(leak)])["growth_megabytes_per_million"] == pytest.approx(125, rel=0.01)
    found = {"processes": [points(leak)], "summary": {"samples": 10, "domains": 2, "decisions": 3}}
    assert chart(found).startswith(b"\x89PNG")
