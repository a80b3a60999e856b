"""Scores by lm-evaluation-harness: the real evaluator on tiny real proxies, on questions that no policy reads."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import records
from benchmarks.comparison.harness import (
    APART,
    BASE,
    KEPT_GAIN,
    HarnessComparison,
    by_metric,
    metrics,
    missing,
    table,
)
from benchmarks.comparison.harness_tasks import SETS, HarnessTask, candidates, choice_rows, harness_tasks
from benchmarks.comparison.policies import Entry, natural
from benchmarks.comparison.runs import Comparison
from dmagent_loader.environment import Environment, EnvironmentSettings, Question
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.training.tasks.axes import sample_tasks
from dmagent_loader.training.tasks.library import QUESTIONS, TaskLibrary
from dmagent_loader.training.tasks.simulator import ProxySimulator
from dmagent_loader.training.tasks.spec import TaskSpec

pytestmark = pytest.mark.timeout(240)

SCIENCE = [f"scien{i}" for i in range(6)]
CHOSEN = {f"natural {share:.0%}": Entry(make=functools.partial(natural, share)) for share in (0.3, 1.0)}


@pytest.fixture(scope="module")
def with_choices(library: TaskLibrary) -> TaskLibrary:
    """The library, with all sets of the harness; the answers of BoolQ are yes and no, without a list."""
    rng = np.random.default_rng(1)
    for name in SETS:
        for file in QUESTIONS[name]:
            rows: list[dict[str, Any]] = []
            for number in range(12):
                stem = f"{name} {number} {' '.join(rng.choice(SCIENCE, size=4))}"
                row = {"question": stem, "answer": "yes" if number % 3 else "no"}
                if name != "boolq":
                    row = {"question": f"{stem}\nA. ...", "answer": "A.", "stem": stem}
                    row |= {"choices": rng.permutation(SCIENCE)[:3].tolist(), "answer_index": number % 3}
                rows.append(row)
            with gzip.open(library.data / "env" / f"{file}.jsonl.gz", "wt", encoding="utf-8") as text:
                text.writelines(json.dumps(row) + "\n" for row in rows)
    return library


def lines_of(spec: TaskSpec, values: dict[str, float], names: Sequence[str] = ("arc, log-likelihood",)) -> list[Any]:
    return [
        {"task": spec.id, "policy": policy, "stream": 0, "metric": name, "value": value, "keep": spec.keep}
        for policy, value in values.items()
        for name in names
    ]


def test_a_record_lacks_what_no_line_holds() -> None:
    specs = sample_tasks("test", 2)
    units = list(missing(specs, ["a", "b"], 2, []))
    assert [(spec.number, policy, stream) for spec, policy, stream, _ in units] == [
        *((n, policy, 0) for n in (0, 1) for policy in (BASE, "a", "b")),
        *((n, policy, 1) for n in (0, 1) for policy in ("a", "b")),
    ]
    assert [wanted for *_, wanted in units[:2]] == [metrics(specs[0], BASE), metrics(specs[0], "a")]
    found = lines_of(specs[0], {"a": 1.0}, metrics(specs[0], "a")[:-1])
    assert list(missing(specs[:1], ["a"], 1, found))[1:] == [(specs[0], "a", 0, metrics(specs[0], "a")[-1:])]


def test_a_task_has_scores_of_what_it_acquires() -> None:
    code, text = (replace(sample_tasks("test", 1)[0], acquire=acquire) for acquire in ("mbpp", "text"))
    assert set(metrics(code, "a")) - set(metrics(text, "a")) == {"acquire, log-likelihood"}
    assert set(metrics(text, BASE)) ^ set(metrics(text, "a")) == {APART, KEPT_GAIN, "acquire, gain by the package"}


def test_differences_are_paired_by_task() -> None:
    """Differences 1 and 3: mean 2, standard error 1. The second policy lacks the third task, which counts nowhere."""
    specs = [replace(spec, keep="arc") for spec in sample_tasks("test", 3)]
    found = [
        *lines_of(specs[0], {"a": -10.0, "b": -9.0}),
        *lines_of(specs[1], {"a": -20.0, "b": -17.0}),
        *lines_of(specs[2], {"a": -90.0}),
    ]
    header, _, own, arc = table(found).splitlines()
    assert header == "| score | tasks | a | b | b minus a |"
    assert arc == "| arc, log-likelihood | 2 | -15 | -13 | +2.0000 ± 1.0000 |"
    assert own == arc.replace("arc", "set of the task")


def test_other_sets_count_alike_and_only_together() -> None:
    """The set of the task, at place 1 of 0 to 4, counts on its own."""
    spec = replace(sample_tasks("test", 1)[0], keep=SETS[1])
    found = [line for place, name in enumerate(SETS) for line in lines_of(spec, {"a": place}, [f"{name}, accuracy"])]
    assert by_metric(found)["other sets, accuracy"] == {"a": {spec.id: {0: (0 + 2 + 3 + 4) / 4}}}
    assert by_metric(found)["set of the task, accuracy"] == {"a": {spec.id: {0: 1}}}
    assert "other sets, accuracy" not in by_metric(found[1:])


def test_questions_have_all_candidates_or_are_left_out(with_choices: TaskLibrary) -> None:
    tokenizer = with_choices.corpus("math").tokenizer()
    asked = with_choices.questions("math", "boolq", "keep").scored
    rows = choice_rows(asked, candidates(with_choices.data, "boolq"), tokenizer)
    assert [row["choices"][row["target"]] for row in rows] == [question.answer for question in asked]
    assert {tuple(row["choices"]) for row in rows} == {("no", "yes")}

    question = Question(question="which", answer="scien1", origin="here")
    for wrong, kept in (("scien2", 1), ("scien2 " * 200, 0)):
        rows = choice_rows([question], {("which", "scien1"): [wrong, "scien1"]}, tokenizer)
        assert len(rows) == kept


def test_a_task_without_questions_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'target text' has nothing to score"):
        HarnessTask(name="target text", output_type="loglikelihood_rolling", rows=[])


def test_no_policy_reads_what_is_scored(with_choices: TaskLibrary, simulator: ProxySimulator, task: TaskSpec) -> None:
    task = replace(task, keep="arc", target="Health", acquire="text", steps=1)
    read = {text for listed in simulator.reset(task, 0).questions.values() for text in listed}
    assert len(read) > 10
    for scored in harness_tasks(with_choices, task):
        assert scored.rows
        for row in scored.rows:
            target = row["choices"][row["target"]] if "choices" in row else row["target"]
            assert not any(target in text and row["text"] in text for text in read), scored.name


def test_a_model_is_scored_by_the_harness_and_a_killed_program_goes_on(
    with_choices: TaskLibrary, simulator: ProxySimulator, task: TaskSpec, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    task = replace(task, keep="arc", target="Health", steps=2)

    def run(folder: Path) -> Path:
        comparison = Comparison(simulator, CHOSEN, tmp_path / "comparison.jsonl", tmp_path / "paths")
        HarnessComparison(simulator, comparison, folder / "harness.jsonl").run([task], list(CHOSEN), 1)
        return folder / "harness.jsonl"

    output = run(tmp_path)
    found = records.lines(output)
    assert [(line["policy"], line["metric"]) for line in found] == [
        (policy, name) for policy in (BASE, *CHOSEN) for name in metrics(task, policy)
    ]
    text = output.read_text()
    output.write_text(text[: len(text) // 2])  # killed in the middle of a line
    run(tmp_path)
    assert records.lines(output) == found
    run(tmp_path)
    assert records.lines(output) == found

    value = {(line["policy"], line["metric"]): line["value"] for line in found}
    assert value["natural 100%", "target text, bits per byte"] < value[BASE, "target text, bits per byte"]
    halves = with_choices.questions("Health", "gsm8k", "acquire")
    tokenizer = with_choices.corpus("Health").tokenizer()
    model = simulator.model()  # of the run that was scored last
    ours = Environment({"all": halves.scored}, tokenizer, EnvironmentSettings(progress=False)).log_likelihoods(model)
    assert value["natural 100%", "acquire, log-likelihood"] == pytest.approx(ours["all"].sums.mean(), abs=1e-4)
    assert "| target text, bits per byte | 1 |" in table(found)
