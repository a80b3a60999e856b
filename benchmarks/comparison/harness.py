"""Scores of policies by lm-evaluation-harness, on questions and text that no policy reads.

python -m benchmarks.comparison.harness run --data DATA
python -m benchmarks.comparison.harness table --output build/tasks/harness.jsonl

Runs are those of the comparison: the same tasks, streams and rows. A line holds one score of a task, policy and stream;
a program that was killed anywhere goes on where it was. Proxies of 0.2M parameters choose among candidate answers
hardly better than chance, so log-likelihoods and bits per byte tell more than accuracy.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.comparison.harness_tasks import (
    ACCURACY,
    ACCURACY_NORM,
    ACQUIRE,
    BITS,
    LOG_LIKELIHOOD,
    SETS,
    SOURCE_TEXT,
    TARGET_TEXT,
    harness_scores,
    harness_tasks,
)
from benchmarks.comparison.policies import add_policies, compared
from benchmarks.comparison.runs import Comparison, key
from benchmarks.comparison.statistics import mean_over_tasks, paired
from benchmarks.records import add, lines
from dmagent_loader.training.tasks.axes import sample_tasks
from dmagent_loader.training.tasks.library import TaskLibrary
from dmagent_loader.training.tasks.simulator import ProxySimulator
from dmagent_loader.training.tasks.spec import TaskSpec

BASE = "base model"
POLICIES = ("natural 30%", "influence", "dmagent-plus")
MODULES = ("benchmarks.comparison.plus",)
KEPT_GAIN, ACQUIRED_GAIN = "keep, gain by the package", "acquire, gain by the package"
"""Gains of the comparison itself, in nats per token."""
APART = "lm-eval against the package"
"""Largest difference between two log-likelihoods of a request, in nats per token."""
TOLERANCE = 1e-4
OWN, OTHERS = "set of the task", "other sets"
"""Rows of the table: the set that the task keeps, if it is one of `SETS`; the mean over the other ones."""
DIGITS = 6


def metrics(spec: TaskSpec, policy: str) -> list[str]:
    """Scores of a run, or of the base model of a task."""
    found = [f"{name}, {score}" for name in SETS for score in (LOG_LIKELIHOOD, ACCURACY, ACCURACY_NORM)]
    if spec.acquire != "text":
        found.append(f"{ACQUIRE}, {LOG_LIKELIHOOD}")
    found += [f"{SOURCE_TEXT}, {BITS}", f"{TARGET_TEXT}, {BITS}"]
    return [*found, *([APART] if policy == BASE else [KEPT_GAIN, ACQUIRED_GAIN])]


def missing(
    specs: Sequence[TaskSpec], policies: Sequence[str], streams: int, found: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[TaskSpec, str, int, list[str]]]:
    """Runs with the scores that a record lacks, task by task; the base model has one stream."""
    done = {(*key(line), line["metric"]) for line in found}
    for stream in range(streams):
        for spec in specs:
            for policy in (BASE, *policies) if stream == 0 else policies:
                wanted = [name for name in metrics(spec, policy) if (spec.id, policy, stream, name) not in done]
                if wanted:
                    yield spec, policy, stream, wanted


class HarnessComparison:
    """Runs policies and scores their models.

    Args:
        simulator: Simulator of the tasks.
        comparison: The comparison, which runs the policies.
        output: Lines of JSON.
    """

    def __init__(self, simulator: ProxySimulator, comparison: Comparison, output: Path) -> None:
        self._simulator, self._comparison, self._output = simulator, comparison, output

    def run(self, specs: Sequence[TaskSpec], policies: Sequence[str], streams: int) -> None:
        """Adds what is missing from the output."""
        for spec, policy, stream, wanted in missing(specs, policies, streams, lines(self._output)):
            values, numbers = self._scores(spec, policy, stream)
            for name in wanted:
                line = {"task": spec.id, "policy": policy, "stream": stream, "metric": name}
                known = {"split": spec.split, "number": spec.number, "keep": spec.keep}
                add(self._output, {**line, "value": round(values[name], DIGITS), "of": numbers.get(name), **known})
            print(f"{spec.split} {spec.number} {policy} {stream}: {len(wanted)} scores", flush=True)

    def _scores(self, spec: TaskSpec, policy: str, stream: int) -> tuple[dict[str, float], Mapping[str, int]]:
        extra = {}
        if policy == BASE:
            self._simulator.reset(spec, stream)
        else:
            episode, _ = self._comparison.episode(spec, policy, stream)
            extra = dict(zip((KEPT_GAIN, ACQUIRED_GAIN), episode.gains.tolist(), strict=True))
        library, model = self._simulator.library, self._simulator.model()
        tokenizer = library.corpus(spec.target).tokenizer()
        scores = harness_scores(model, tokenizer, harness_tasks(library, spec))
        if policy == BASE:
            extra[APART] = scores.apart(model, tokenizer)
            assert extra[APART] < TOLERANCE, f"lm-eval and the package differ by {extra[APART]} nats per token"
        return {**scores.values, **extra}, scores.numbers


Values = dict[str, dict[str, dict[str, dict[int, float]]]]
"""Metric -> policy -> task -> stream -> value."""


def by_metric(found: Iterable[Mapping[str, Any]]) -> Values:
    """Scores of a record, with the rows `OWN` and `OTHERS` of the table."""
    values: Values = {}
    others: dict[tuple[str, str, str, int], dict[str, float]] = {}
    wanted = {}

    def put(metric: str, policy: str, task: str, stream: int, value: float) -> None:
        values.setdefault(metric, {}).setdefault(policy, {}).setdefault(task, {})[stream] = value

    for line in found:
        task, policy, stream = key(line)
        wanted[task] = set(SETS) - {line["keep"]}
        put(line["metric"], policy, task, stream, line["value"])
        name, _, score = line["metric"].partition(", ")
        if name in wanted[task]:
            others.setdefault((score, policy, task, stream), {})[name] = line["value"]
        elif name in SETS:
            put(f"{OWN}, {score}", policy, task, stream, line["value"])
    for (score, policy, task, stream), of_sets in others.items():
        if set(of_sets) == wanted[task]:  # a run that was killed may have left some of them
            put(f"{OTHERS}, {score}", policy, task, stream, float(np.mean(list(of_sets.values()))))
    return values


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Mean of each score over tasks, and paired differences between policies with standard errors over tasks."""
    values = by_metric(found)
    policies = list(dict.fromkeys(line["policy"] for line in found))
    ours = [name for name in policies if name != BASE]
    pairs = [(one, other) for place, other in enumerate(ours) for one in ours[place + 1 :]]
    names = ["score", "tasks", *policies, *(f"{one} minus {other}" for one, other in pairs)]
    rows = [f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(names) - 1)]
    for metric, scores in sorted(values.items(), key=lambda item: item[0].partition(", ")[0] not in (OWN, OTHERS)):
        shown = [name for name in policies if name in scores]
        tasks = set.intersection(*(set(scores[name]) for name in shown))
        cells = [f"{_mean(scores[name], tasks):.4g}" if name in scores else "" for name in policies]
        for one, other in pairs:
            differences = paired(scores.get(one, {}), scores.get(other, {}))
            cells.append(_with_error(differences) if differences else "")
        rows.append(f"| {metric} | {len(tasks)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _mean(scores: Mapping[str, Mapping[int, float]], tasks: set[str]) -> float:
    return float(np.mean([np.mean(list(scores[task].values())) for task in sorted(tasks)])) if tasks else float("nan")


def _with_error(differences: Mapping[str, Mapping[int, float]]) -> str:
    estimate = mean_over_tasks(differences, dict.fromkeys(differences, ""))
    return f"{estimate.value:+.4f} ± {estimate.error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run and score what is missing")
    run.add_argument("--data", type=Path, required=True)
    run.add_argument("--work", type=Path, default=Path("build/tasks"), help="for corpora, base models, probes, ranges")
    run.add_argument("--split", default="test", help="tasks of this split")
    run.add_argument("--first", type=int, default=24, help="number of the first task; the fresh test tasks begin at 24")
    run.add_argument("--tasks", type=int, default=12, help="number of tasks")
    run.add_argument("--streams", type=int, default=1, help="streams of each task")
    add_policies(run, list(POLICIES), list(MODULES))
    show = commands.add_parser("table", help="print the table of what is there")
    for command in (run, show):
        command.add_argument("--output", type=Path, default=Path("build/tasks/harness.jsonl"))
    arguments = parser.parse_args()
    if arguments.command == "run":
        os.environ["HF_HUB_OFFLINE"] = "1"  # all tasks are from local files
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        torch.set_num_threads(1)
        chosen = compared(arguments.also, arguments.policies)
        simulator = ProxySimulator(TaskLibrary(arguments.data, arguments.work))
        comparison = Comparison(simulator, chosen, arguments.work / "comparison.jsonl", arguments.work / "paths")
        specs = sample_tasks(arguments.split, arguments.first + arguments.tasks)[arguments.first :]
        HarnessComparison(simulator, comparison, arguments.output).run(specs, list(chosen), arguments.streams)
    print(table(lines(arguments.output)))


if __name__ == "__main__":
    main()
