"""The comparison on tiny real proxies: it goes on where it was stopped, and its tables hold at any time."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot

from benchmarks import records
from benchmarks.comparison import cautious, policies
from benchmarks.comparison.pictures import _panel, pareto
from benchmarks.comparison.policies import Entry, TaskContext, entries, natural, shuffled, with_ablations
from benchmarks.comparison.record import paths, record
from benchmarks.comparison.runs import NOISE_STREAMS, Comparison, tasks, work_list
from benchmarks.comparison.tables import Results, claims, tables
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.influence import Influence, Score
from dmagent_loader.training.tasks.library import TaskLibrary
from dmagent_loader.training.tasks.simulator import ProxySimulator, Start
from dmagent_loader.training.tasks.spec import Perturbation, TaskSpec

pytestmark = pytest.mark.timeout(240)


class Reacting:
    """More target text after each fall of the feedback on the field to keep."""

    name = "reacting"
    always_answers = True

    def __init__(self, context: TaskContext) -> None:
        self._start: Start = context.start

    def propose(self, history: History) -> np.ndarray:
        fell = (np.diff(history.feedback[:, 0]) < 0).sum()
        return self._start.at(float(min(0.9, 0.2 + 0.2 * fell + 0.05 * len(history))))


def small_entries() -> dict[str, Entry]:
    return {
        "natural 30%": Entry(make=functools.partial(natural, 0.3)),
        **with_ablations("influence", Entry(make=functools.partial(policies.named, "influence"))),
        **with_ablations("reacting", Entry(make=Reacting, reads_feedback=True), influence=False),
    }


def run(
    simulator: ProxySimulator, specs: list[TaskSpec], folder: Path, chosen: Mapping[str, Entry], most: int | None = None
) -> Path:
    output = folder / "comparison.jsonl"
    units = list(work_list(specs, chosen, 2))
    Comparison(simulator, chosen, output, folder / "paths").run(units[:most])
    return output


def without_times(line: dict[str, object]) -> dict[str, object]:
    kept = {name: value for name, value in line.items() if "seconds" not in name}
    if isinstance(kept.get("influence"), dict):
        kept["influence"] = {n: v for n, v in kept["influence"].items() if n != "seconds"}  # type: ignore[attr-defined]
    return kept


@pytest.mark.slow
def test_a_comparison_that_was_stopped_goes_on(simulator: ProxySimulator, task: TaskSpec, tmp_path: Path) -> None:
    task = replace(task, split="test", number=1, steps=2)
    specs = [task, replace(task, number=2, perturbation=Perturbation(kind="noise", noise="random", onset=0.5))]
    chosen = small_entries()
    whole = run(simulator, specs, tmp_path / "whole", chosen)
    stopped = run(simulator, specs, tmp_path / "stopped", chosen, most=7)
    half = stopped.read_text()
    stopped.write_text(half[: len(half) - 40])  # killed in the middle of a line
    run(simulator, specs, tmp_path / "stopped", chosen)
    done = [without_times(line) for line in records.lines(whole)]
    again = [without_times(line) for line in records.lines(stopped)]
    order = ["task", "policy", "stream"]
    assert sorted(done, key=lambda line: [str(line[n]) for n in order]) == sorted(
        again, key=lambda line: [str(line[n]) for n in order]
    )
    assert len(done) == 2 * (3 + 2 * len(chosen))
    by_key = {(line["spec"]["number"], line["policy"], line["stream"]): line for line in records.lines(whole)}
    mean, held = (by_key[1, name, 0]["mean_mix"] for name in ("reacting", "reacting, mean static"))
    assert mean == pytest.approx(held, abs=1e-4)
    assert by_key[1, "reacting, replayed", 0]["target_share"] == by_key[1, "reacting", 1]["target_share"]
    before = whole.read_text()
    run(simulator, specs, tmp_path / "whole", chosen)
    assert whole.read_text() == before, "finished runs were run again"

    shown = tables(whole, ["natural 30%"])
    assert "| natural 30% | 2 |" in shown
    assert "too few runs" in shown
    assert "| adaptive | influence | 2 |" in shown
    assert "| dynamic | reacting | 2 |" in shown
    assert "| ahead of natural 30% | influence | 2 |" in shown
    assert "| minus natural 30% | 2 steps | merged-7 |" in shown
    assert pareto(whole, tmp_path, "test").stat().st_size > 10_000


def test_half_way_to_the_natural_mix_is_the_mean_of_both(simulator: ProxySimulator, task: TaskSpec) -> None:
    start = simulator.reset(task, 0)
    context = TaskContext(
        spec=task, start=start, stream=0, recorded=lambda *_: np.empty(0), proxies=None, ranges=np.ones(2)
    )
    domains = start.space.names
    scores = {field: {d: Score(float(i % 3), 1e-3) for i, d in enumerate(domains)} for field in start.fields}
    influence = Influence(scores=scores, way="gradient", rows=dict.fromkeys(domains, 32))
    history = History(
        domains=domains, fields=start.fields, mixes=start.mix[None], feedback=np.array(start.feedback)[None]
    )
    mixes = []
    for policy in (policies.named("influence", context), cautious.half_way(context)):
        policy.inform("influence", influence)  # type: ignore[attr-defined]
        policy.inform("length", start.length)  # type: ignore[attr-defined]
        mixes.append(policy.propose(history))
    natural_mix = start.at(0.3)
    assert mixes[1] == pytest.approx((mixes[0] + natural_mix) / 2)
    assert np.abs(mixes[0] - natural_mix).max() > 0.01


def test_a_failing_policy_is_recorded_and_the_rest_goes_on(
    simulator: ProxySimulator, task: TaskSpec, tmp_path: Path
) -> None:
    def fail(context: TaskContext) -> np.ndarray:
        raise ValueError("no such mix")

    chosen = {"broken": Entry(make=fail), "natural 30%": Entry(make=functools.partial(natural, 0.3))}
    output = run(simulator, [replace(task, split="test", steps=1)], tmp_path, chosen)
    results = Results(records.lines(output))
    assert [line["failed"] for line in results.failed] == ["ValueError: no such mix"] * 2
    assert results.policies == ["natural 30%"]
    assert "- broken, 0: sciq + gsm8k, merged-7, 1 steps: ValueError: no such mix" in tables(output, ["natural 30%"])


def test_a_proxy_that_diverges_is_a_failed_run_and_the_tables_hold(
    library: TaskLibrary, task: TaskSpec, tmp_path: Path
) -> None:
    """A gain that is not a number would be the mean of its policy, or pass as harmless."""

    class Diverging(ProxySimulator):
        def finish(self) -> np.ndarray:
            gains = super().finish()
            return gains * np.nan if self.diverges else gains

        def reset(self, spec: TaskSpec, stream: int) -> Start:
            self.diverges = stream == 1
            return super().reset(spec, stream)

    chosen = {"natural 30%": Entry(make=functools.partial(natural, 0.3))}
    spec = replace(task, split="test", number=1, steps=1)
    output = run(Diverging(library, probe_rows=4), [spec], tmp_path, chosen)
    results = Results(records.lines(output))
    assert [(line["stream"], line["failed"]) for line in results.failed] == [
        (1, "FeedbackError: the scores are [nan, nan]: the proxy has diverged")
    ]
    assert "| natural 30% | 1 |" in tables(output, ["natural 30%"])


def compared(rewards: Mapping[str, tuple[float, ...]], task: TaskSpec) -> list[dict[str, object]]:
    """Records of two streams of plain test tasks. Attainable ranges are 1, so the reward is the gain of both fields."""
    found: list[dict[str, object]] = []
    for number in range(len(next(iter(rewards.values())))):
        spec = replace(task, split="test", number=number)
        whole = {"task": spec.id, "spec": spec.to_json()}
        found.append({**whole, "policy": "range 100%", "stream": 900, "gains": [1.0, 1.0]})
        for name, of_task in rewards.items():
            gains = [of_task[number]] * 2
            found += [{**whole, "policy": name, "stream": s, "gains": gains} for s in (0, 1)]
    return found


def test_claims_are_made_for_every_policy_that_is_no_ablation(task: TaskSpec) -> None:
    """Names of baselines have commas, too, such as "Olmix, 64 proxies"."""
    little_behind, varying = (0.45,) * 12, (0.0, 0.95) * 6
    results = Results(
        compared(
            {
                "natural 30%": (0.5,) * 12,
                "Olmix, 64 proxies": little_behind,
                "influence": varying,
                "influence, influence shuffled": little_behind,
            },
            task,
        )
    )
    assert results.whole == ["natural 30%", "Olmix, 64 proxies", "influence"]
    shown = claims(results, ["natural 30%"], "test")
    assert "| as good as natural 30% | Olmix, 64 proxies | 12 | -0.050 [-0.050, -0.050] | yes |" in shown
    assert "| ahead of natural 30% | Olmix, 64 proxies | 12 | -0.050 ± 0.000, 0.00 [0.00, 0.00] | no |" in shown
    # Less behind on average, but the interval reaches below -0.1.
    assert re.search(r"\| as good as natural 30% \| influence \| 12 \| -0\.025 \[-0\.\d+, \+0\.\d+\] \| no \|", shown)
    assert not re.search(r"as good as .* \| influence, influence shuffled", shown)


def test_a_policy_on_a_few_tasks_alone_does_not_shrink_the_picture_to_these(task: TaskSpec) -> None:
    found = compared({"natural 30%": (0.5,) * 4, "Olmix, 64 proxies": (0.6,) * 4, "influence": (0.7,) * 4}, task)
    last = found[-1]["task"]
    results = Results([line for line in found if (line["task"], line["policy"]) != (last, "influence")])
    axis = pyplot.figure().add_subplot()
    _panel(axis, results, "test", "plain")
    pyplot.close(axis.figure)
    assert axis.get_title() == "4 plain test tasks"
    assert axis.get_legend_handles_labels()[1] == ["natural mix, share of target", "Olmix, 64 proxies"]


def test_tables_of_an_empty_output_are_printed(tmp_path: Path) -> None:
    assert tables(tmp_path / "none.jsonl", ["natural 30%"]).startswith("0 runs")


def test_the_work_list_has_the_noise_floor_first_and_then_turns_through_all_tasks() -> None:
    specs, chosen = tasks(), entries()
    units = list(work_list(specs, chosen, 2))
    assert [stream for _, _, stream in units[:NOISE_STREAMS]] == list(range(NOISE_STREAMS))
    rest = units[2 * NOISE_STREAMS :]
    assert len(rest) == len(specs) * len(chosen) * 2
    turns = [chosen[name].turn for _, name, _ in rest]
    assert turns == sorted(turns)
    for name, entry in chosen.items():
        if entry.after:
            assert chosen[entry.after].turn < entry.turn, f"{name} comes before the path that it needs"


def test_shuffled_scores_stay_in_their_field_with_their_errors() -> None:
    domains = [f"source/{i}" for i in range(6)] + [f"target/{i}" for i in range(4)]
    influence = Influence(
        scores={"k": {d: Score(float(i), i / 10) for i, d in enumerate(domains)}},
        way="gradient",
        rows={**dict.fromkeys(domains, 8), "source/2": 2},
        copies={"source/2": 6},
    )
    found = shuffled(influence, 0)
    assert found.originals("source/2") == 0.25, "copies are a fact of the data: both policies know them"
    values, errors = found.values()[0], found.errors()[0]
    assert sorted(values[:6]) == list(range(6))
    assert sorted(values[6:]) == list(range(6, 10))
    assert list(values) != list(range(10))
    np.testing.assert_allclose(errors, values / 10)
    again, other = shuffled(influence, 0), shuffled(influence, 1)
    assert (found.values() == again.values()).all()
    assert (found.values() != other.values()).any()


def test_recorded_paths_are_mixes(simulator: ProxySimulator, task: TaskSpec, tmp_path: Path) -> None:
    output = tmp_path / "record.jsonl"
    task = replace(task, steps=2)
    record(task, 0, simulator, output)
    found = records.lines(output)
    assert [line["path"] for line in found] == [name for name, _ in paths(0)]
    for line in found:
        mixes = np.array(line["mixes"])
        assert mixes.shape in ((1, 7), (2, 7))
        np.testing.assert_allclose(mixes.sum(axis=1), 1, atol=1e-4)
        assert np.array(line["feedback"]).shape == (3, 2)
        assert Influence.from_json(line["influence"]).domains == tuple(line["domains"])
    before = output.read_text()
    record(task, 0, simulator, output)
    assert output.read_text() == before
