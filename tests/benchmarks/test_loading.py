"""What benchmarks/loading.py accepts as delivered: rows of the shards, in the mix that was asked for."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import random
import sys
import types
from pathlib import Path

import pytest

from dmagent_loader.mixture.domains import CANONICAL_TOPICS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmarks():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def folder(benchmarks, tmp_path_factory):
    """Both kinds of shards, from 26 files of source text and one of target text, made of random words."""
    text, made = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("made")
    generator = random.Random(0)
    names = [f"source/{topic}" for topic in CANONICAL_TOPICS] + ["target/all"]
    for name in names:
        (text / name).parent.mkdir(exist_ok=True)
        size = 3 * len(CANONICAL_TOPICS) if name == "target/all" else 3
        documents = (" ".join(str(generator.randrange(10**6)) for _ in range(1500)) for _ in range(size))
        lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
        (text / f"{name}.jsonl").write_text(lines)
    args = argparse.Namespace(data=text, bench_data=made, gigabytes=0.005, megabytes=None)
    benchmarks("data").make_shards(args)
    return made


def check(benchmarks, folder, kind, module, level="items"):
    args = argparse.Namespace(data=folder / kind, loader="dmagent", workers=0, seed=0, level=level, rows=3000)
    return benchmarks("loading").check(module, args)


@pytest.mark.parametrize("kind", ["packed", "text"])
@pytest.mark.parametrize("level", ["items", "batches"])
def test_our_rows_are_recognised_and_their_mix_is_the_one_asked_for(benchmarks, folder, kind, level):
    checked = check(benchmarks, folder, kind, benchmarks("loaders.dmagent"), level)
    # 52 domains, none off by much more than a sample: independent draws would give about 51.
    assert checked["checked"] > 2900
    assert checked["chi_square"] < 10


def test_a_loader_that_ignores_the_mix_is_found_out(benchmarks, folder):
    """Round robin over the domains, for example."""

    def items(task):
        rows = [itertools.cycle(list(task.data.rows(name))) for name in task.data.domains]
        return (next(each) for each in itertools.cycle(rows))

    with pytest.raises(AssertionError, match="not the mix"):
        check(benchmarks, folder, "text", types.SimpleNamespace(items=items, value=lambda row: row))


def test_a_loader_that_delivers_other_tokens_is_found_out(benchmarks, folder):
    """One wrong token in a row is enough."""
    ours = benchmarks("loaders.dmagent")

    def value(item):
        tokens = ours.value(item).copy()
        tokens[-1] += 1
        return tokens

    with pytest.raises(AssertionError, match="in no shard"):
        check(benchmarks, folder, "packed", types.SimpleNamespace(items=ours.items, value=value))


def test_a_batch_of_another_type_is_found_out(benchmarks, folder):
    ours = benchmarks("loaders.dmagent")
    narrow = types.SimpleNamespace(batches=ours.batches, value=None, values=lambda batch: ours.values(batch).int())
    with pytest.raises(AssertionError, match="int64"):
        check(benchmarks, folder, "packed", types.SimpleNamespace(items=ours.items, **vars(narrow)), "batches")
