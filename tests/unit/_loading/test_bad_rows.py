"""Rows that cannot be used: refused by name, or replaced by others of their domain, the same wherever they are met."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from samplers import builder, logged
from shard_fixtures import rewritten

from dmagent_loader import ReadingConfig
from dmagent_loader.cli import main
from dmagent_loader.errors import ConfigurationError, DecodeError, StateError
from dmagent_loader.testing import sample_ids, write_toy_shards
from dmagent_loader.transforms import PACKED_MEMBER, collate_packed

ROWS = {"source/web": 60, "target/math": 60}
BAD = b"\xe9\xff"
Change = Callable[[int, dict[str, bytes]], dict[str, bytes]]


def changed(shard: str | Path, change: Change) -> None:
    """Writes a shard again; the change gets the numbers of the rows."""
    numbers = itertools.count()
    rewritten(shard, lambda _, members: change(next(numbers), members))


def undecodable(*rows: int) -> Change:
    return lambda number, members: {"txt": BAD} if number in rows else members


@pytest.fixture
def shards(tmp_path: Path) -> dict[str, list[str]]:
    """Text; rows 3 and 7 of the first shard of source/web are not UTF-8."""
    written = write_toy_shards(tmp_path / "shards", ROWS)
    changed(written["source/web"][0], undecodable(3, 7))
    return written


@pytest.fixture
def build(shards: dict[str, list[str]], tmp_path: Path):
    reading = ReadingConfig(max_bad_rows=0.1)
    return builder(shards, tmp_path / "cache", samples_per_reweight=16, on_bad_row="skip", reading=reading)


def test_by_default_a_bad_row_ends_the_run_and_the_message_names_ways_that_work(build) -> None:
    with pytest.raises(DecodeError, match=r"row [37] of shard .*toy-000000\.tar.*on_bad_row='skip'.*data='changed'"):
        sample_ids(build(on_bad_row="raise"))


def test_an_error_of_the_transform_names_the_row_and_stays_what_it_is(build) -> None:
    def transform(sample: Mapping[str, Any]) -> dict[str, Any]:
        if sample["__key__"].endswith("000020"):
            raise ZeroDivisionError("no words")
        return dict(sample)

    with pytest.raises(ZeroDivisionError) as error:
        sample_ids(build(decode=None, on_bad_row="raise", transform=transform))
    assert "row 4 of shard" in "".join(error.value.__notes__)


def test_only_the_samples_of_bad_rows_change(build) -> None:
    def nothing(sample: Mapping[str, Any]) -> dict[str, Any]:
        return dict(sample)

    with_bad = sample_ids(build())
    whole = sample_ids(build(decode=None, transform=nothing))  # bytes: no row is bad
    differing = [(a, b) for a, b in zip(with_bad, whole, strict=True) if a != b]
    assert [b[2] for _, b in differing]
    assert all(b[2] in ("source_web_000003", "source_web_000007") for _, b in differing)
    assert all(a[:2] == b[:2] for a, b in differing)
    assert all(a[2].startswith("source_web") for a, _ in differing)


def test_the_same_rows_take_their_place_on_any_number_of_ranks_and_after_a_restore(build) -> None:
    whole = sample_ids(mixed_in_advance_of(build()))
    for world in (2, 3):
        ranks = [sample_ids(mixed_in_advance_of(build(rank=rank, world_size=world))) for rank in range(world)]
        assert sorted(itertools.chain(*ranks)) == whole[: sum(map(len, ranks))]
    for consumed in (0, 5, 31, 77):
        sampler = build()
        mixed_in_advance_of(sampler)
        resumed = build()
        resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict(consumed=consumed))))
        assert sample_ids(resumed) == whole[consumed:]


def mixed_in_advance_of(sampler):
    sampler.set_mix({"source/web": 0.8, "target/math": 0.2})
    return sampler


def test_bad_rows_are_logged_once_and_counted_in_the_state(build, caplog: pytest.LogCaptureFixture) -> None:
    sampler = build(exhausted="repeat")
    with caplog.at_level(logging.WARNING):
        taken = sample_ids(sampler, 360)
    found = logged(caplog, "another row of the domain takes its place")
    assert len(found) == len(set(found)) == 2
    assert all("domain 'source/web', row" in message and "toy-000000.tar" in message for message in found)
    keys = [key for _, _, key in taken]
    assert "source_web_000003" not in keys
    assert "source_web_000007" not in keys
    assert sampler.bad_rows == {"source/web": 6}  # two rows in each of three passes
    assert sampler.state_dict()["bad_rows"]["counts"] == {"source/web": 6}


def test_counts_are_those_of_the_consumed_samples_and_survive_a_restore(build) -> None:
    sampler = build()
    sample_ids(sampler)
    states = [json.loads(json.dumps(sampler.state_dict(consumed=n))) for n in range(120)]
    counts = [state["bad_rows"]["counts"].get("source/web", 0) for state in states]
    assert counts[0] == 0
    assert counts[-1] == 2
    assert counts == sorted(counts)
    middle = counts.index(1)
    resumed = build()
    resumed.load_state_dict(states[middle])
    assert resumed.bad_rows == {"source/web": 1}
    sample_ids(resumed)
    assert resumed.state_dict()["bad_rows"] == states[-1]["bad_rows"]
    off = build(on_bad_row="raise")
    off.load_state_dict(states[-1])
    assert off.state_dict()["bad_rows"] == states[-1]["bad_rows"]


@pytest.mark.parametrize("decode", ["default", "lazy"])
def test_a_row_without_the_member_of_the_others_is_bad(tmp_path: Path, decode: str) -> None:
    shards = write_toy_shards(tmp_path / "shards", ROWS, tokens=8)

    def change(number: int, members: dict[str, bytes]) -> dict[str, bytes]:
        return {"json": b"{}"} if number == 2 else members

    changed(shards["target/math"][1], change)
    build = builder(shards, tmp_path / "cache", samples_per_reweight=16, decode=decode)
    reading = ReadingConfig(max_bad_rows=5)
    rows = list(build(on_bad_row="skip", reading=reading))
    batches = [collate_packed(rows[first : first + 6]) for first in range(0, 119, 6)]
    assert {len(row) for batch in batches for row in batch["input_ids"]} == {8}
    assert "target_math_000018" not in [key for batch in batches for key in batch["__key__"]]
    eager = sample_ids(build(on_bad_row="skip", reading=reading, decode="default"))
    assert [(i, k) for b in batches for i, k in zip(b["__index__"].tolist(), b["__key__"], strict=True)] == [
        (index, key) for index, _, key in eager
    ]


def test_lazy_and_eager_rows_are_replaced_alike_also_with_a_transform(tmp_path: Path) -> None:
    shards = write_toy_shards(tmp_path / "shards", ROWS, tokens=8)
    changed(shards["source/web"][0], lambda number, members: {PACKED_MEMBER: BAD} if number % 3 == 0 else members)

    def transform(sample: Mapping[str, Any]) -> dict[str, Any]:
        if sample["__key__"][-1] in "14":
            raise KeyError("text")
        return {"tokens": sample[PACKED_MEMBER].sum()}

    build = builder(shards, tmp_path / "cache", samples_per_reweight=16, transform=transform)
    found = [
        [
            (s["__index__"], s["__key__"], int(s["tokens"]))
            for s in build(decode=decode, on_bad_row="skip", reading=reading)
        ]
        for decode in ("default", "lazy")
        for reading in [ReadingConfig(max_bad_rows=1.0)]
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 119


@pytest.mark.parametrize(("most", "rows"), [(1, (3, 7)), (0, (3,)), (0.01, (3, 7)), (0.05, (1, 3, 5, 7))])
def test_more_bad_rows_than_allowed_are_an_error(tmp_path: Path, most: float, rows: Sequence[int]) -> None:
    shards = write_toy_shards(tmp_path / "shards", ROWS)
    changed(shards["source/web"][0], undecodable(*rows))
    build = builder(shards, tmp_path / "cache", samples_per_reweight=16, on_bad_row="skip")
    with pytest.raises(DecodeError, match=rf"more than the \d that max_bad_rows={most} allows.*ReadingConfig\(max_bad"):
        sample_ids(build(reading=ReadingConfig(max_bad_rows=most)))
    assert len(sample_ids(build(reading=ReadingConfig(max_bad_rows=len(rows))))) == 119


def test_a_domain_whose_rows_are_all_bad_is_an_error_whatever_the_bound(build) -> None:
    def transform(sample: Mapping[str, Any]) -> dict[str, Any]:
        raise ValueError("never")

    with pytest.raises(DecodeError, match="tried in its place are bad, too"):
        sample_ids(build(transform=transform, reading=ReadingConfig(max_bad_rows=1.0)))


def test_faults_of_settings_are_no_bad_rows(build) -> None:
    with pytest.raises(ConfigurationError, match="transform returned"):
        sample_ids(build(transform=lambda sample: None))
    with pytest.raises(ConfigurationError, match="on_bad_row is 'ignore'"):
        build(on_bad_row="ignore")
    for wrong in (1.5, -0.1, -1, float("nan"), "3"):
        with pytest.raises(ConfigurationError, match="max_bad_rows"):
            ReadingConfig(max_bad_rows=wrong)  # type: ignore[arg-type]


def test_probes_and_peeks_pass_over_bad_rows(build, shards: dict[str, list[str]]) -> None:
    changed(shards["source/web"][1], undecodable(0))
    assert build(shards={"source/web": shards["source/web"][1:2]}).peek()["__key__"] == "source_web_000017"
    rows = build().probe_rows(60)
    assert len(rows["target/math"]) == 60
    assert len(rows["source/web"]) == 57
    with pytest.raises(DecodeError):
        build(on_bad_row="raise").probe_rows(60)


def test_replay_lists_the_rows_that_were_trained_on(build, shards, tmp_path: Path, capsys) -> None:
    sampler = build()
    taken = sample_ids(sampler)
    (tmp_path / "state.json").write_text(json.dumps(sampler.state_dict()))
    manifest = {"schema": 1, "domains": {name: {"shards": []} for name in shards}}
    for name, listed in shards.items():
        manifest["domains"][name]["shards"] = [{"path": str(Path(one).relative_to(tmp_path))} for one in listed]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    arguments = [
        "replay",
        str(tmp_path / "state.json"),
        "--shards",
        str(tmp_path),
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    assert main(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["index"], line["domain"], line["key"]) for line in lines] == taken
    assert sum("instead_of" in line for line in lines) == 2


@pytest.mark.parametrize(
    "bad_rows",
    [
        None,
        [],
        {},
        {"counts": {"source/web": -1}, "replaced": []},
        {"counts": {}, "replaced": [[200, 1]]},
        {"counts": {}, "replaced": [[1]]},
        {"counts": {}, "replaced": [[1, 0]]},
        {"counts": {}, "replaced": [["a", 1]]},
    ],
    ids=itertools.count(),
)
def test_damaged_records_of_bad_rows_are_refused(build, bad_rows: Any) -> None:
    state = {**build().state_dict(consumed=20), "bad_rows": bad_rows}
    with pytest.raises(StateError, match="bad_rows"):
        build().load_state_dict(state)
