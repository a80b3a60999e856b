"""The tables of the comparison, as Markdown; they are meaningful at any time, on the runs that are there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison.policies import PRIOR, REFERENCE, SHARES
from benchmarks.comparison.runs import NOISE_STREAMS
from benchmarks.comparison.statistics import (
    Estimate,
    Scores,
    improvement,
    interquartile_mean,
    mean_over_tasks,
    over_runs,
    paired,
)
from benchmarks.comparison.trainings import BUNDLED, BUNDLED_NUMBER, PREFIX
from benchmarks.records import lines
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.tasks.episode import RANGE_SHARES, RANGE_STREAM, attainable, reward
from dmagent_loader.training.tasks.spec import TaskSpec

BEST_SHARE = "best of five natural shares"
LEAST_TASKS, LEAST_STREAMS = 12, 2
"""Test tasks and streams that a claim needs (RULES.md)."""
RANGE_RUNS = {f"range {share:.0%}" for share in RANGE_SHARES}
FRESH_TEST, FIRST_FRESH = "fresh test", 24
HARM = -0.1
"""Difference from the reference below which a policy does harm in a task."""
AS_GOOD = -0.1
"""Least lower end of the interval of the mean difference from a policy that another one is as good as."""
ABLATIONS = {
    "replayed": "dynamic",
    "influence shuffled": "adaptive",
    "feedback frozen": "reacts to feedback",
    "mean static": "worth its path",
    "order shuffled": "the order of its mixes matters",
    "order reversed": "... and is the right way round",
}
"""Ending of an ablation's name -> the claim that the policy supports if it is ahead of it."""


class Results:
    """Finished runs of the comparison."""

    def __init__(self, found: Iterable[Mapping[str, Any]]) -> None:
        listed = list(found)
        self.specs = {line["task"]: TaskSpec.from_json(line["spec"]) for line in listed}
        # Runs for the ranges, and those of a policy's own proxies, have streams of their own behind.
        self.runs = [line for line in listed if "gains" in line and line["stream"] < RANGE_STREAM]
        self.failed = [line for line in listed if "failed" in line]
        natural: dict[str, list[FloatArray]] = {}
        for line in listed:
            if line["policy"] in RANGE_RUNS and "gains" in line:
                natural.setdefault(line["task"], []).append(np.array(line["gains"]))
        run = {line["task"] for line in self.runs}
        self.ranges = {task: attainable(gains) for task, gains in natural.items() if task in run}
        self.policies = list(dict.fromkeys(line["policy"] for line in self.runs))
        endings = tuple(f", {ablation}" for ablation in ABLATIONS)
        self.whole = [name for name in self.policies if not name.endswith(endings)]
        """The policies that are no ablation of another one."""
        self.splits = {task: split_of(spec) for task, spec in self.specs.items()}
        self.strata = {
            task: f"{self.splits[task]} {'perturbed' if spec.perturbation.kind != 'none' else 'plain'}"
            for task, spec in self.specs.items()
        }

    def scores(
        self, policy: str, which: str = "reward", *, streams: int = LEAST_STREAMS
    ) -> dict[str, dict[int, float]]:
        """Scores of a policy: the reward, or the gain of ``"keep"`` or ``"acquire"`` in nats.

        Args:
            policy: Name, or `BEST_SHARE`.
            which: Score.
            streams: Streams below this number alone: the further ones of the noise floor are of a few tasks.
        """
        if policy == BEST_SHARE:
            return self._best_share(which)
        found: dict[str, dict[int, float]] = {}
        for line in self.runs:
            if line["policy"] == policy and line["stream"] < streams:
                found.setdefault(line["task"], {})[line["stream"]] = self._score(line, which)
        return found

    def _score(self, line: Mapping[str, Any], which: str) -> float:
        gains, task = np.array(line["gains"]), line["task"]
        if which == "reward":
            return reward(gains, self.ranges[task], self.specs[task].balance)
        return float(gains[("keep", "acquire").index(which)])

    def _best_share(self, which: str) -> dict[str, dict[int, float]]:
        """For each task the natural share with the highest mean reward, where all five are there."""
        by_share = {f"natural {share:.0%}": self.scores(f"natural {share:.0%}") for share in SHARES}
        found = {}
        for task in self.specs:
            if all(task in scores for scores in by_share.values()):
                best = max(by_share, key=lambda name: float(np.mean(list(by_share[name][task].values()))))
                found[task] = self.scores(best, which)[task]
        return found

    def of_split(self, scores: Scores, split: str, kind: str | None = None) -> dict[str, Mapping[int, float]]:
        """Scores of tasks of a split, or of its ``"plain"`` or ``"perturbed"`` ones."""
        wanted = {f"{split} {kind}"} if kind else {f"{split} plain", f"{split} perturbed"}
        return {task: streams for task, streams in scores.items() if self.strata[task] in wanted}


def split_of(spec: TaskSpec) -> str:
    """The split of a task; test tasks that were added later are one of their own, see RULES.md."""
    return FRESH_TEST if spec.split == "test" and spec.number >= FIRST_FRESH else spec.split


def tables(path: Path, references: Sequence[str]) -> str:
    """All tables.

    Args:
        path: Output of the comparison.
        references: Policies that the others are compared with.
    """
    results = Results(lines(path))
    parts = [f"{len(results.runs)} runs of {len(results.ranges)} tasks, {len(results.failed)} failed.", noise(results)]
    for split in ("test", FRESH_TEST, "validation", "train"):
        if results.of_split(results.scores(REFERENCE), split):
            parts += [f"## {split} tasks", policies(results, split)]
            parts += [differences(results, split, reference) for reference in references]
            parts += [groups(results, split, references[0]), by_task(results, split), trainings(results, split)]
    parts += ["## Claims", claims(results, references, "test")]
    if FRESH_TEST in results.splits.values():
        parts += [f"## Claims, {FRESH_TEST} tasks", claims(results, references, FRESH_TEST)]
    if results.failed:
        parts.append(failures(results))
    return "\n\n".join(part for part in parts if part)


def noise(results: Results) -> str:
    """Spread of one mix over streams."""
    rows = [
        "| noise floor: natural 30% | streams | reward, sd | keep, sd (nats) | acquire, sd (nats) |",
        "|---|---:|---:|---:|---:|",
    ]
    columns = [results.scores(REFERENCE, which, streams=NOISE_STREAMS) for which in ("reward", "keep", "acquire")]
    for task, streams in columns[0].items():
        if len(streams) > LEAST_STREAMS:
            sds = [float(np.std(list(column[task].values()), ddof=1)) for column in columns]
            rows.append(
                f"| {_task(results.specs[task])} | {len(streams)} | {sds[0]:.3f} | {sds[1]:.4f} | {sds[2]:.4f} |"
            )
    return "\n".join(rows)


def policies(results: Results, split: str) -> str:
    """Scores of all policies; tasks differ between rows until all runs are there."""
    rows = [
        "| policy | tasks | reward | interquartile mean | keep (nats) | acquire (nats) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    found = []
    for name in [*results.policies, BEST_SHARE]:
        scores = results.of_split(results.scores(name), split)
        if scores:
            mean = mean_over_tasks(scores, results.strata)
            middle = over_runs(scores, results.strata, interquartile_mean)
            nats = [
                mean_over_tasks(results.of_split(results.scores(name, which), split), results.strata)
                for which in ("keep", "acquire")
            ]
            cells = [_with_error(mean), _with_interval(middle), *(f"{e.value:+.3f} ± {e.error:.3f}" for e in nats)]
            found.append((-mean.value, f"| {name} | {mean.tasks} | {' | '.join(cells)} |"))
    return "\n".join([*rows, *(row for _, row in sorted(found))])


def differences(results: Results, split: str, reference: str) -> str:
    """Paired differences from one policy."""
    rows = [
        f"| minus {reference} | tasks | reward | interquartile mean | plain tasks | perturbed tasks "
        "| probability of improvement | keep (nats) | acquire (nats) | least task |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    base = results.scores(reference)
    for name in [*results.policies, BEST_SHARE]:
        scores = results.of_split(paired(results.scores(name), base), split)
        if name == reference or not scores:
            continue
        mean = mean_over_tasks(scores, results.strata)
        middle = over_runs(scores, results.strata, interquartile_mean)
        better = over_runs(scores, results.strata, improvement)
        parts = [results.of_split(scores, split, kind) for kind in ("plain", "perturbed")]
        kinds = [_with_error(mean_over_tasks(part, results.strata)) if part else "" for part in parts]
        nats = [
            mean_over_tasks(
                results.of_split(paired(results.scores(name, which), results.scores(reference, which)), split),
                results.strata,
            )
            for which in ("keep", "acquire")
        ]
        least = min(scores, key=lambda task: float(np.mean(list(scores[task].values()))))
        cells = [
            _with_error(mean),
            _with_interval(middle),
            *kinds,
            f"{better.value:.2f} [{better.low:.2f}, {better.high:.2f}]",
            *(f"{e.value:+.3f} ± {e.error:.3f}" for e in nats),
            f"{np.mean(list(scores[least].values())):+.2f} {_task(results.specs[least])}",
        ]
        rows.append(f"| {name} | {mean.tasks} | {' | '.join(cells)} |")
    return "\n".join(rows)


SHOWN = (
    REFERENCE,
    BEST_SHARE,
    "question-topics",
    "influence",
    "influence, influence shuffled",
    "dmagent-rl",
    "dmagent-plus",
)


def by_task(results: Results, split: str) -> str:
    """Rewards task by task."""
    names = [name for name in SHOWN if results.of_split(results.scores(name), split)]
    rows = [f"| task | range (nats) | balance | {' | '.join(names)} |", "|---|---|---:|" + "---:|" * len(names)]
    for task, spec in results.specs.items():
        if results.splits[task] == split and task in results.ranges:
            cells = []
            for name in names:
                values = list(results.scores(name).get(task, {}).values())
                cells.append(f"{np.mean(values):.2f}" if values else "")
            ranges = ", ".join(f"{r:.2f}" for r in results.ranges[task])
            rows.append(f"| {_task(spec)} | {ranges} | {spec.balance:g} | {' | '.join(cells)} |")
    return "\n".join(rows)


def claims(results: Results, references: Sequence[str], split: str) -> str:
    """The rules of RULES.md, on the tasks of one split."""
    rows = ["| claim | policy | tasks | figure | passes |", "|---|---|---:|---:|---|"]
    for name in (name for name in results.whole if name != REFERENCE and not name.startswith(PREFIX)):
        scores = results.of_split(paired(results.scores(name), results.scores(REFERENCE)), split)
        if scores:
            least = min(float(np.mean(list(streams.values()))) for streams in scores.values())
            rows.append(_claim("does no harm", name, f"{least:+.2f} in the least task", least >= HARM, scores))
        for reference in (*references, BEST_SHARE):
            for kind in (None, "perturbed"):
                scores = results.of_split(paired(results.scores(name), results.scores(reference)), split, kind)
                if scores and name != reference:
                    rows += _against(results, name, reference, kind, scores)
    for ablation, claim in ABLATIONS.items():
        for name in results.policies:
            scores = results.of_split(paired(results.scores(name), results.scores(f"{name}, {ablation}")), split)
            if scores:
                mean = mean_over_tasks(scores, results.strata)
                rows.append(_claim(claim, name, _with_error(mean), mean.value > 2 * mean.error, scores))
    return "\n".join(rows)


def groups(results: Results, split: str, reference: str) -> str:
    """Differences from one policy by the number of decisions and the domain space."""
    specs = {
        task: spec for task, spec in results.specs.items() if results.splits[task] == split and task in results.ranges
    }
    columns: dict[str, set[str]] = {}
    for task, spec in specs.items():
        columns.setdefault(f"{spec.steps} steps", set()).add(task)
        columns.setdefault(spec.space, set()).add(task)
    names = sorted(columns, key=lambda name: (not name.endswith("steps"), len(name), name))
    rows = [f"| minus {reference} | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for policy in results.policies:
        scores = paired(results.scores(policy), results.scores(reference))
        parts = [{task: streams for task, streams in scores.items() if task in columns[name]} for name in names]
        if policy != reference and any(parts):
            means = [mean_over_tasks(part, results.strata) if part else None for part in parts]
            cells = [f"{_with_error(mean)} ({mean.tasks})" if mean else "" for mean in means]
            rows.append(f"| {policy} | {' | '.join(cells)} |")
    return "\n".join(rows)


def trainings(results: Results, split: str) -> str:
    """Trainings of `dmagent-plus` on the runs that all of them have; empty without any."""
    by_name = {
        name: results.of_split(results.scores(name), split)
        for name in results.policies
        if name == BUNDLED or name.startswith(PREFIX)
    }
    runs = [{(task, stream) for task, found in scores.items() for stream in found} for scores in by_name.values()]
    common = set.intersection(*runs) if len(by_name) > 1 else set()
    if not common:
        return ""
    rows = ["| training | reward | minus natural 30% | minus influence |", "|---|---:|---:|---:|"]
    means = []
    for name, scores in by_name.items():
        own: dict[str, dict[int, float]] = {}
        for task, stream in sorted(common):
            own.setdefault(task, {})[stream] = scores[task][stream]
        compared = [own, *(paired(own, results.scores(reference)) for reference in (REFERENCE, PRIOR))]
        estimates = [mean_over_tasks(found, results.strata) for found in compared]
        means.append([estimate.value for estimate in estimates])
        label = f"{BUNDLED_NUMBER} (chosen, `{BUNDLED}`)" if name == BUNDLED else name.removeprefix(PREFIX)
        rows.append(f"| {label} | {' | '.join(map(_with_error, estimates))} |")
    spread, middle = np.std(means, axis=0, ddof=1), np.median(means, axis=0)
    rows.append(f"| median of {len(means)} | {' | '.join(f'{value:+.3f}' for value in middle)} |")
    rows.append(f"| standard deviation | {' | '.join(f'{value:.3f}' for value in spread)} |")
    tasks = len({task for task, _ in common})
    return "\n".join([f"Trainings, on {len(common)} runs of {tasks} tasks that all of them have:", "", *rows])


def failures(results: Results) -> str:
    """Runs that failed."""
    return "\n".join(
        [
            "Failed:",
            *(f"- {line['policy']}, {_task(results.specs[line['task']])}: {line['failed']}" for line in results.failed),
        ]
    )


def _against(results: Results, name: str, reference: str, kind: str | None, scores: Scores) -> list[str]:
    """Whether a policy is ahead of another one, and, over all tasks, as good as it."""
    mean = mean_over_tasks(scores, results.strata)
    better = over_runs(scores, results.strata, improvement)
    claim = f"ahead of {reference}" + (" under perturbations" if kind else "")
    figure = f"{_with_error(mean)}, {better.value:.2f} [{better.low:.2f}, {better.high:.2f}]"
    rows = [_claim(claim, name, figure, mean.value > 2 * mean.error and better.low > 0.5, scores)]
    if kind is None:
        rows.append(_claim(f"as good as {reference}", name, _with_interval(mean), mean.low >= AS_GOOD, scores))
    return rows


def _claim(claim: str, policy: str, figure: str, passes: bool, scores: Scores) -> str:
    is_enough = len(scores) >= LEAST_TASKS and all(len(streams) >= LEAST_STREAMS for streams in scores.values())
    verdict = ("yes" if passes else "no") if is_enough else f"too few runs (so far: {'yes' if passes else 'no'})"
    return f"| {claim} | {policy} | {len(scores)} | {figure} | {verdict} |"


def _task(spec: TaskSpec) -> str:
    fault = "" if spec.perturbation.kind == "none" else f", {spec.perturbation.label}"
    acquired = spec.fields[1].removeprefix("acquire ")
    return f"{spec.number}: {spec.keep} + {acquired}, {spec.space}, {spec.steps} steps{fault}"


def _with_error(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} ± {estimate.error:.3f}"


def _with_interval(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
