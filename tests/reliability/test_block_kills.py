"""Killed processes that share a folder of blocks; 100 kills: ``benchmarks/reliability/block_kills.py``."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from launching import REPOSITORY, environment

pytest.importorskip("aiohttp", reason="fsspec needs aiohttp for http")


def test_kills_lose_no_row_and_leave_nothing_behind() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.reliability.block_kills", "--kills", "6"],
        env=environment(PYTHONPATH=str(REPOSITORY)),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    counts = json.loads(done.stdout)
    assert counts["kills"] == 6
    assert counts["while fetching"] > 0, "no kill was in the middle of a fetch"
