"""What a report says of a run is what the sampler did and will do."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmagent_loader import AgentWeightedSampler, DecisionConfig, ReadingConfig
from dmagent_loader._report.decisions import decision_tables
from dmagent_loader._report.history import RunHistory, read_history
from dmagent_loader._report.selection import by_field, largest
from dmagent_loader.errors import StateError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.influence import Influence, scores_from
from dmagent_loader.policies import GuardConfig, LinearSchedule
from dmagent_loader.testing import write_toy_shards

ROWS = {"source/web": 60, "source/books": 20, "target/math": 40, "target/code": 30}
FIRST = {"source/web": 0.2, "source/books": 0.2, "target/math": 0.3, "target/code": 0.3}
LAST = {"source/web": 0.1, "source/books": 0.1, "target/math": 0.2, "target/code": 0.6}
SCHEDULE = LinearSchedule(FIRST, LAST, 3)

Build = Callable[..., AgentWeightedSampler]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("history")
    shards = write_toy_shards(folder / "shards", ROWS)

    def build(**settings: Any) -> AgentWeightedSampler:
        reading = ReadingConfig(cache_dir=folder / "cache", progress=False)
        return AgentWeightedSampler(
            shards, **{"samples_per_reweight": 20, "policy": SCHEDULE, "reading": reading, **settings}
        )

    return build


def decide(sampler: AgentWeightedSampler, consumed: int) -> None:
    """Reads samples up to `consumed`, and decides before each 20 of them."""
    stream = None
    for at in range(0, consumed, 20):
        sampler.reweight({"general": -2.0 - at / 100, "math": -3.0 + at / 10}, consumed=at)
        stream = stream or iter(sampler)
        for _ in range(20):
            next(stream)


def history(sampler: AgentWeightedSampler, consumed: int, **settings: Any) -> RunHistory:
    """As a report reads it: through JSON, whose objects a trainer may sort."""
    state = json.loads(json.dumps(sampler.state_dict(consumed=consumed), sort_keys=True))
    return read_history(state, name="run", **settings)


def test_counts_passes_and_rows_left_are_those_of_the_sampler(build: Build) -> None:
    sampler = build(exhausted={"source": "repeat", "target": "stop"})
    decide(sampler, 80)
    seen = history(sampler, 80)
    counts = np.array([sampler.achieved(0, 80)[name] for name in ROWS])
    rows = np.array(list(ROWS.values()))
    np.testing.assert_array_equal(seen.counts, counts)
    np.testing.assert_allclose(seen.passes, counts / rows)
    left = [rows[0] - counts[0] % 60, rows[1] - counts[1] % 20, rows[2] - counts[2], rows[3] - counts[3]]
    np.testing.assert_array_equal(seen.rows_left, left)
    np.testing.assert_allclose(seen.mix_now, list(sampler.mix.values()), atol=1e-6)
    assert seen.next_decision == 80


@pytest.mark.parametrize("policy", [None, SCHEDULE])
def test_a_run_whose_interval_is_not_derived_yet(build: Build, policy: LinearSchedule | None) -> None:
    """Without a policy it never is, with one only after the first decision."""
    sampler = build(policy=policy, samples_per_reweight=None)
    seen = history(sampler, 0)
    assert seen.samples_per_reweight is None
    assert seen.next_decision == (None if policy is None else 0)


def test_the_forecast_is_where_the_run_ends(build: Build) -> None:
    """The plan of a state knows rows, but not shards: the end must still be the sample at which the run stops."""
    sampler = build()
    decide(sampler, 60)
    forecast = history(sampler, 60).forecast
    assert forecast.end == sampler.plan.end == forecast.last_sample
    assert set(forecast.used_up) == {"target/math", "target/code"}
    first = dict(zip(ROWS, forecast.runs_out.tolist(), strict=True))
    assert first["source/web"] == -1
    code = first["target/code"]
    assert sampler.achieved(0, code)["target/code"] == 30
    assert sampler.achieved(0, code - 1)["target/code"] == 29
    assert history(sampler, 60, last_sample=70).forecast.last_sample == 70


def test_the_end_is_that_of_the_last_whole_step(build: Build) -> None:
    """A trainer stops where the samples left make no step; the report must not promise more of them."""
    sampler = build()
    decide(sampler, 60)
    end = sampler.plan.end
    assert end is not None
    step = end - 60 + 1
    over = history(sampler, 60, last_sample=60 + 2 * step, samples_per_step=step).forecast
    assert over.end == over.last_sample == 60
    assert history(sampler, 60, samples_per_step=end - 60).forecast.end == end


def test_a_run_whose_domains_repeat_has_no_end(build: Build) -> None:
    sampler = build(exhausted="repeat")
    decide(sampler, 20)
    forecast = history(sampler, 20).forecast
    assert (forecast.end, forecast.last_sample, forecast.fails) == (None, None, False)


def test_a_rule_error_is_forecast_as_a_failure(build: Build) -> None:
    sampler = build(exhausted="error")
    decide(sampler, 20)
    forecast = history(sampler, 20).forecast
    assert forecast.fails
    assert (forecast.end, forecast.used_up) == sampler.plan.failure


def test_charts_show_the_mix_that_was_drawn_from(build: Build) -> None:
    """Where a domain ran out, others took its weight: catches a chart of the requested mix."""
    sampler = build(exhausted={"source": "repeat", "target": "stop"}, samples_per_reweight=200)
    sampler.reweight({"general": -2.0}, consumed=0)
    sampler.set_mix(LAST)
    end = sampler.plan.end
    assert end is not None
    seen = history(sampler, end)
    record = seen.record([(domain, (i,)) for i, domain in enumerate(seen.plan.space.domains)], "run")
    assert [step["start"] for step in record.mix] == [0, seen.forecast.runs_out[3]]
    assert record.mix[0]["mix"]["target/code"] == pytest.approx(0.6, abs=1e-4)
    assert record.mix[1]["mix"]["target/code"] == 0
    assert record.mix[1]["mix"]["target/math"] == pytest.approx(0.8, abs=1e-4)
    fields = seen.record(by_field(seen.plan.space), "run")
    assert [step["mix"]["target"] for step in fields.mix] == pytest.approx([0.8, 0.8], abs=1e-4)


def test_fields_of_ones_own_are_those_of_the_run(tmp_path: Path) -> None:
    """Names need not contain their field; without it, a report would not know the fields at all."""
    shards = write_toy_shards(tmp_path / "shards", {"source/web": 30, "source/law": 20})
    shards = {name.removeprefix("source/"): urls for name, urls in shards.items()}
    sampler = AgentWeightedSampler(
        shards,
        samples_per_reweight=10,
        fields={"web": "general", "law": "legal"},
        reading=ReadingConfig(cache_dir=tmp_path / "cache", progress=False),
    )
    seen = history(sampler, 10)
    assert seen.plan.space.fields == ("general", "legal")
    assert seen.forecast.end == sampler.plan.end


def rows_of(sampler: AgentWeightedSampler, consumed: int) -> list[dict[str, str]]:
    """The decisions, oldest first, by column."""
    tables = decision_tables(history(sampler, consumed))
    table = tables.all or tables.newest
    columns = [column.replace("\n", " ") for column in table.columns]
    return [dict(zip(columns, row, strict=True)) for row in table.rows[::-1]]


def test_every_decision_is_listed_with_its_feedback_and_changes(build: Build) -> None:
    sampler = build()
    decide(sampler, 60)
    first, second, third = rows_of(sampler, 60)
    assert first["after samples"] == "0"
    assert first["feedback math (change)"] == "-3.000"
    assert second["feedback math (change)"] == "-1.000\n(+2.000)"
    assert second["feedback general (change)"] == "-2.200\n(-0.200)"
    assert second["largest changes of weight"].startswith("target/code +10.0, ")
    assert third["decided by"] == SCHEDULE.name
    assert third["mix target"] == "80.0%"
    assert {row["reason"] for row in (first, second, third)} == {"accepted as proposed"}


class Failing(LinearSchedule):
    """Proposes no mix at its third step."""

    def propose(self, history: Any) -> Any:
        return [0.5] * 4 if len(history) == 3 else super().propose(history)


def test_refusals_and_what_the_guard_changed_are_reasons(build: Build) -> None:
    sampler = build(
        policy=Failing(FIRST, LAST, 3), deciding=DecisionConfig(guard=GuardConfig(ceiling={"target/code": 0.45}))
    )
    decide(sampler, 60)
    sampler.set_mix(LAST)
    reasons = [row["reason"] for row in rows_of(sampler, 60)]
    assert reasons[0] == "accepted as proposed"
    assert reasons[1].startswith("accepted; guard: moved by 0.05 to keep floor and ceiling (target/code)")
    assert "sum to 2, not to 1; the previous mix stays in force" in " ".join(reasons)
    assert reasons[-1] == "set by hand"
    tables = decision_tables(history(sampler, 60))
    assert (tables.made, tables.refused) == (3, 1)


def test_shadow_decisions_are_listed_though_they_changed_nothing(build: Build) -> None:
    sampler = build(deciding=DecisionConfig(shadow=True))
    decide(sampler, 40)
    listed = rows_of(sampler, 40)
    assert [row["reason"] for row in listed] == [
        "logged only: shadow mode, or replaced before a sample was drawn",
        "the mix at the start",
        "logged only: shadow mode, or replaced before a sample was drawn",
    ]


def test_the_newest_decisions_and_refusals_come_first(build: Build) -> None:
    """Catches a page on which the one refusal of a long run is out of sight."""
    sampler = build(policy=Failing(FIRST, LAST, 3), exhausted="repeat", samples_per_reweight=1)
    stream = None
    for at in range(40):
        sampler.reweight({"general": -2.0}, consumed=at)
        stream = stream or iter(sampler)
        next(stream)
    tables = decision_tables(history(sampler, 40))
    shown = [row[0] for row in tables.newest.rows]
    assert shown == [str(at) for at in [*range(39, 24, -1), 2]]
    assert tables.all is not None
    assert len(tables.all.rows) == 40


def test_largest_domains_stand_alone_and_the_rest_is_summed_by_field() -> None:
    space = DomainSpace.from_names(["source/a", "source/b", "source/c", "target/d", "target/e"])
    groups = [(domain.name, list(members)) for domain, members in largest(space, np.array([5, 1, 2, 3, 4.0]), 2)]
    assert groups == [
        ("source/a", [0]),
        ("source: 2 other domains", [1, 2]),
        ("target/e", [4]),
        ("target/d", [3]),  # the only one of the rest has its own name
    ]
    assert [domain.name for domain, _ in largest(space, np.ones(5), 5)] == list(space.names)


def one_shard_each(rows: list[int]) -> dict[str, Any]:
    """The shards of a state: one in each domain."""
    packed = base64.b64encode(zlib.compress(np.array(rows, dtype="<i8").tobytes())).decode()
    contents = base64.b64encode(bytes(8 * len(rows))).decode()
    return {"numbers": [1] * len(rows), "rows": packed, "contents": contents}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("shards", one_shard_each([60, 20, 40]), "shards of 3 domains for 4"),
        ("shards", one_shard_each([60, 20, 40, -1]), "impossible numbers of rows"),
        ("shards", one_shard_each([2**61, 2**61, 40, 30]), "impossible numbers of rows"),
        ("shards", one_shard_each([60, 20, 40, 0]), "have no rows"),
        ("shards", one_shard_each([60, 20, 1, 30]), "counts at sample"),
        ("shards", {**one_shard_each([60, 20, 40, 30]), "numbers": [1, 1, 1, 10**400]}, "shards of 4 domains"),
        ("shards", {**one_shard_each([60, 20, 40, 30]), "numbers": [1, 1, 1, 2]}, "numbers instead of 5"),
        ("shards", {**one_shard_each([60, 20, 40, 30]), "contents": ""}, "identifies 0 shards instead of 4"),
        ("shards", None, "segment of the state cannot be read"),
        ("domains", [1, 2, 3, 4], "domains is .* not a list with a text"),
        ("domains", {"a": 1}, "domains is .* not a list"),
        ("domains", ["a", "a", "b", "c"], "listed twice"),
        ("domain_fields", ["source", "source", "target", {}], "domain_fields is .* not a list"),
        ("domain_fields", ["source"], "domain_fields is .* not a list"),
        ("exhausted", ["repeat", "repeat", "stop", "never"], "'never'"),
        ("exhausted", [], "exhausted is \\[\\], not a list"),
        ("seed", "0", "seed is '0'"),
        ("shuffle_window", 0, "shuffle_window is 0"),
        ("samples_per_reweight", 0, "samples_per_reweight is 0"),
        ("policy", ["x"], "policy is"),
        ("consumed", -1, "consumed is -1"),
        ("counts", {}, "counts at sample"),
        ("schema", 3, "schema 3"),
        ("policy_state", {"measured": [3], "unavailable": False, "slots_done": 1, "topics": None}, "saved influence"),
    ],
)
def test_damaged_states_are_refused(build: Build, key: str, value: Any, words: str) -> None:
    sampler = build()
    decide(sampler, 40)
    state = json.loads(json.dumps(sampler.state_dict(consumed=40)))
    read_history(state, name="run")
    with pytest.raises(StateError, match=words):
        read_history({**state, key: value}, name="run")


def test_a_state_of_another_kind_of_policy_shows_no_influence(build: Build) -> None:
    sampler = build()
    decide(sampler, 20)
    state = sampler.state_dict(consumed=20)
    assert read_history({**state, "policy_state": {"measured": "yes"}}, name="run").influence is None


def test_influence_inside_a_combined_policy_is_found(build: Build) -> None:
    sampler = build()
    decide(sampler, 20)
    scores = scores_from(("general",), tuple(ROWS), np.array([[1.0, 2.0, 3.0, 4.0]]), np.full((1, 4), 0.1))
    measured = {"measured": [Influence(scores=scores, way="gradient").to_json()], "unavailable": False}
    part = {**measured, "slots_done": 1, "topics": None}
    seen = read_history({**sampler.state_dict(consumed=20), "policy_state": {"within": part}}, name="run")
    assert seen.influence is not None
    assert seen.influence["general"]["target/code"].value == 4.0
