"""Runs over real shards with bad rows, whose data change: what is delivered, counted and replayed is the same."""

from __future__ import annotations

import copy
import json
import tarfile
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from reading import quiet

from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader.cli import main

NAMES = ["source/a", "source/b", "target/x"]
RULES = ["repeat", "stop", "redistribute", "error"]
SHARDS, VERSIONS, ROWS = 3, 2, 5
BAD_ROW = 1
"""The row of every shard of the first version that cannot be decoded."""
Data = dict[str, list[tuple[int, int]]]
"""Domain -> (number, version) of its shards."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of two versions: in the second, as after a repair, no row is bad."""
    root = tmp_path_factory.mktemp("shards")
    for name in NAMES:
        for shard in range(SHARDS):
            for version in range(VERSIONS):
                path = path_of(root, name, (shard, version))
                path.parent.mkdir(parents=True, exist_ok=True)
                with tarfile.open(path, "w") as tar:
                    for row in range(ROWS):
                        key = f"{name.replace('/', '_')}-{shard}-{version}-{row}"
                        text = b"\xe9" if is_bad(key) else key.encode()
                        info = tarfile.TarInfo(f"{key}.txt")
                        info.size = len(text)
                        tar.addfile(info, BytesIO(text))
    return root


def path_of(root: Path, name: str, shard: tuple[int, int]) -> Path:
    return root / f"version-{shard[1]}" / name / f"{shard[0]}.tar"


def is_bad(key: str) -> bool:
    *_, version, row = key.split("-")
    return version == "0" and int(row) == BAD_ROW


@dataclass
class Trainer:
    """A run, what it was trained on, and what its passes have drawn."""

    root: Path
    data: Data
    exhausted: dict[str, str]
    sampler: AgentWeightedSampler = field(init=False)
    trained: list[tuple[int, str, str]] = field(default_factory=list)
    drawn: dict[str, set[str]] = field(default_factory=dict)
    replaced: Counter[str] = field(default_factory=Counter)

    def build(self, state: dict[str, Any] | None, how: str) -> None:
        shards = {name: [str(path_of(self.root, name, one)) for one in its] for name, its in self.data.items()}
        self.sampler = AgentWeightedSampler(
            shards,
            samples_per_reweight=8,
            exhausted=self.exhausted,
            on_bad_row="skip",
            reading=quiet(self.root / "cache", ReadingConfig(max_bad_rows=1.0, shuffle_window=4)),
        )
        if state is not None:
            self.sampler.load_state_dict(state, data=how)

    def state(self) -> dict[str, Any]:
        return json.loads(json.dumps(self.sampler.state_dict()))

    def draw(self, most: int) -> None:
        plan, begin = self.sampler.plan, len(self.trained)
        ends = [end for end in (plan.end, plan.failure[0] if plan.failure else None) if end is not None]
        indices = np.arange(begin, min([begin + most, *ends]))
        located = plan.locate(indices)
        event("data used up" if len(indices) < most else "data left")
        stream = iter(self.sampler)
        for index, domain, shard, row in zip(
            indices.tolist(), located.domain.tolist(), located.shard.tolist(), located.row.tolist(), strict=True
        ):
            sample, name = next(stream), plan.space.names[domain]
            number, version = self.data[name][shard]
            key = f"{name.replace('/', '_')}-{number}-{version}-{row}"
            assert (sample["__index__"], sample["__domain__"]) == (index, name)
            assert sample["txt"] == sample["__key__"]
            assert (sample["__key__"] != key) == is_bad(key)
            event("a bad row" if is_bad(key) else "a row")
            self.replaced[name] += is_bad(key)
            self._count(name, key)
            self.trained.append((index, name, sample["__key__"]))

    def _count(self, name: str, key: str) -> None:
        here = {
            f"{name.replace('/', '_')}-{n}-{version}-{row}" for n, version in self.data[name] for row in range(ROWS)
        }
        drawn = self.drawn.setdefault(name, set())
        if here <= drawn:
            drawn.clear()  # the pass is over, also for shards that are gone
        assert key not in drawn, f"{key} comes twice in a pass"
        drawn.add(key)

    def copy(self) -> Trainer:
        other = Trainer(self.root, self.data, self.exhausted)
        other.trained, other.replaced = list(self.trained), Counter(self.replaced)
        other.drawn = copy.deepcopy(self.drawn)
        return other


def some_data(random: Random) -> tuple[Data, dict[str, str]]:
    names = random.sample(NAMES, random.randint(1, len(NAMES)))
    data = {
        name: [(shard, random.randrange(VERSIONS)) for shard in random.sample(range(SHARDS), random.randint(1, SHARDS))]
        for name in names
    }
    return data, {name: random.choice(RULES) for name in names}


ACTIONS = ["draw", "draw", "draw", "change", "change", "mix", "save", "kill"]


@given(
    begin=st.integers(0, 2**32),
    actions=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 2**32)), max_size=12),
)
@settings(max_examples=40, deadline=None)
def test_what_is_delivered_is_counted_and_replayed(folder: Path, begin: int, actions: list[tuple[str, int]]) -> None:
    """Catches rows that come twice, bad rows replaced otherwise after a restart, and a replay of something else."""
    run = Trainer(folder, *some_data(Random(begin)))
    run.build(None, "exact")
    snapshots = [(run.state(), run.copy())]
    for what, number in actions:
        random = Random(number)
        event(what)
        if what == "draw":
            run.draw(random.randint(1, 15))
        elif what == "mix":
            weights = {name: random.random() + 0.01 for name in run.data}
            run.sampler.set_mix(weights, renormalize=True)
        elif what == "change":
            state = run.state()
            run.data, run.exhausted = some_data(random)
            run.build(state, "changed")
        elif what == "save":
            snapshots.append((run.state(), run.copy()))
        else:
            state, saved = random.choice(snapshots)
            run = saved.copy()
            run.build(state, "exact")
        assert run.sampler.bad_rows == {name: count for name, count in sorted(run.replaced.items()) if count}
    assert replayed(run) == run.trained


def replayed(run: Trainer) -> list[tuple[int, str, str]]:
    """The samples of ``dmagent replay``."""
    (run.root / "state.json").write_text(json.dumps(run.state()))
    arguments = ["replay", str(run.root / "state.json"), "--cache-dir", str(run.root / "cache")]
    for version in range(VERSIONS):
        domains = {
            name: {"shards": [{"path": f"version-{version}/{name}/{shard}.tar"} for shard in range(SHARDS)]}
            for name in NAMES
        }
        manifest = run.root / f"version-{version}.json"
        manifest.write_text(json.dumps({"schema": 1, "domains": domains}))
        arguments += ["--shards", str(manifest)]
    printed = StringIO()
    with redirect_stdout(printed):
        assert main(arguments) == 0
    lines = [json.loads(line) for line in printed.getvalue().splitlines()]
    return [(line["index"], line["domain"], line["key"]) for line in lines]
