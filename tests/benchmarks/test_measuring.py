"""What the benchmark programs make of their measurements: parts that are joined, and figures that are only followed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


def measure(measuring, output, *words, value):
    """One run of a program of two parts; returns its results."""
    args = measuring.parser("doc", "toy", parts=("a", "b")).parse_args(["--output", str(output), *words])
    results = measuring.measured_parts(args, {"a": lambda: value, "b": lambda: value})
    measuring.save(args, results)
    return results


def test_parts_that_are_measured_later_are_joined_with_those_before(program, tmp_path, monkeypatch):
    measuring, output = program("measuring"), tmp_path / "toy.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/toy.py", "--parts", "a", "--data", "/some/where/data"])
    assert measure(measuring, output, "--parts", "a", value=1) == {"a": 1}
    assert measure(measuring, output, "--parts", "b", value=2) == {"a": 1, "b": 2}
    assert json.loads(output.read_text())["command"] == "python benchmarks/toy.py --data data"
    assert measure(measuring, output, value=3) == {"a": 3, "b": 3}


def test_a_short_run_is_not_joined_with_a_whole_one(program, tmp_path):
    measuring, output = program("measuring"), tmp_path / "toy.json"
    measure(measuring, output, "--quick", value=1)
    with pytest.raises(SystemExit, match="--quick"):
        measure(measuring, output, "--parts", "b", value=2)


def test_a_peer_that_skips_is_followed_along_its_line_and_one_that_does_not_is_left(program):
    resume = program("resume")

    def points(*times):
        return [{"consumed": 10**power, "seconds": [t] * 5} for power, t in zip((3, 4, 5), times, strict=True)]

    slope, straight = resume.straight_line("a peer", points(0.2, 1.1, 10.1))
    assert (slope, straight) == (pytest.approx(1e-4), pytest.approx(1.0))
    assert resume.straight_line("a peer", points(0.30, 0.31, 0.33)) is None
    assert resume.straight_line("a peer", points(0.2, 1.1, 10.1)[:2]) is None
    assert resume.straight_line(resume.BOUNDED, points(0.2, 1.1, 10.1)) is None


def test_linked_shards_are_opened_from_the_cache_of_those_that_they_link_to(program, tmp_path):
    shards, cache = program("scale_shards"), tmp_path / "cache"
    paths = shards.write_shards(tmp_path / "few", 1, 4, 200)
    folders = shards.link_shards(paths, tmp_path / "links", cache, 5)
    index = cache / "index"
    entries = {path: path.stat().st_ino for path in index.iterdir()}
    assert len(entries) == 6
    assert len(set(entries.values())) == 1
    assert shards.sampler(folders, str(cache))["shards"] == 5
    assert {path: path.stat().st_ino for path in index.iterdir()} == entries, "an index was made anew"


def test_what_changes_cost_is_the_difference_to_one_mix_of_the_same_round(program):
    """Not the difference of the medians: a slow round slows both."""
    dynamics = program("dynamics")
    timed = {"static 0": [1.0, 2.0, 4.0], "agent 0": [1.6, 2.4, 4.5]}
    results = {"throughput": {"changes": 50, "seconds": timed}}
    assert dynamics.cost_ms(results, "agent", 0, "throughput") == pytest.approx(10.0)
    assert dynamics.lost(results, "agent", 0) == pytest.approx(1 - 1 / 1.2)
