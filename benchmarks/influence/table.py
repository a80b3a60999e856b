"""Policies on many question sets: the table of docs/influence-results.md. It can be stopped and called again.

    python -m benchmarks.influence.table --data DATA --work build/influence --output benchmarks/results/influence.jsonl

Each finished run is a line of the output; runs that are there are not run again. `--print` only shows the tables.
Every policy of an environment and stream starts from the same base model and reads the same rows of a domain first.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.comparison.policies import shuffled
from benchmarks.influence.environments import TOLD, Setting, base_weights, one_thread, setting
from benchmarks.influence.probes import NAMES, cloned, measured
from benchmarks.influence.runs import STEPS, TOKENS_PER_STEP, run
from benchmarks.records import add, lines
from dmagent_loader import MixingAgent
from dmagent_loader.environment import Question
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.influence import Influence
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies import INFLUENCE, AgentPolicy, CombinedPolicy, Policy
from dmagent_loader.policies.influence import InfluencePolicy
from dmagent_loader.policies.question_topics import QuestionTopics
from dmagent_loader.training.tasks.library import SIZES

SHARES = (0.1, 0.2, 0.3, 0.5, 0.7)
ROUNDS = ((0, 1), (2, 3, 4))
"""Streams: two of every environment first, then the rest."""
ROWS = 32
REPEATS = 1000
"""Distance between the numbers of the streams that repeated measurements read."""
LARGER = ("1.4M", (("piqa", "gsm8k"), ("mmlu", "math")))


class Policies:
    """The mixes that are compared in one environment and stream.

    Args:
        found: The environment.
        weights: Of the base model.
        work: For probes.
        size: Of the model.
        stream: Number of the repetition.
    """

    def __init__(self, found: Setting, weights: dict[str, Tensor], work: Path, *, size: str, stream: int) -> None:
        self._setting, self._weights, self._work, self._size, self._stream = found, weights, work, size, stream
        self._space = DomainSpace.canonical()
        self._natural = 0.5 * (found.corpus.start_state + found.corpus.target_distribution)

    def names(self) -> dict[str, Callable[[], FloatArray | Policy]]:
        """Name -> what `run` takes; the agent comes before its own mean."""
        static = {f"natural {share:.0%}": functools.partial(self._at, share, self._natural) for share in SHARES}
        return {
            **static,
            "uniform 30%": lambda: self._at(0.3, (self._natural > 0).astype(float)),
            "question topics": lambda: self._proposed(self._topics()),
            "influence": lambda: self._influenced(self._probe),
            "influence, one measurement": lambda: self._influenced(self._probe, max_measurements=1),
            "influence x topics": lambda: self._influenced(self._probe, combine=True),
            "influence shuffled": lambda: self._influenced(lambda i: shuffled(self._probe(i), self._stream)),
            "clone probe": lambda: self._influenced(self._clones, max_measurements=1),
            "clone x topics": lambda: self._influenced(self._clones, combine=True, max_measurements=1),
            "dmagent-rl": self._agent,
            "dmagent-rl, topics by influence": lambda: CombinedPolicy(
                self._agent(), self._informed(self._probe, combine=True), self._space
            ),
        }

    def _at(self, share: float, within: FloatArray) -> FloatArray:
        source, target = within.copy(), within.copy()
        source[len(source) // 2 :] = 0
        target[: len(target) // 2] = 0
        return np.asarray((1 - share) * source / source.sum() + share * target / target.sum(), dtype=np.float64)

    def _probe(self, repeat: int) -> Influence:
        """The measurement that follows `repeat` others."""
        stream = self._stream + REPEATS * repeat
        return measured(self._setting, self._weights, self._work, size=self._size, stream=stream, rows=ROWS)

    def probe_tokens(self) -> int:
        """Tokens in one direction that the measurements of the influence policy read."""
        influence = self._informed(self._probe).influence
        assert influence is not None
        return influence.tokens

    def _clones(self, _: int) -> Influence:
        streams = (100 + 2 * self._stream, 101 + 2 * self._stream)
        return cloned(self._setting, self._weights, self._work, size=self._size, streams=streams)

    def _topics(self) -> QuestionTopics:
        policy = QuestionTopics(self._space, self._natural)
        policy.inform(
            "questions", {name: texts(listed) for name, listed in self._setting.environment.questions.items()}
        )
        return policy

    def _agent(self) -> AgentPolicy:
        return AgentPolicy(MixingAgent.from_pretrained("dmagent-rl"), self._space, self._natural)

    def _influenced(self, measure: Callable[[int], Influence], combine: bool = False, **settings: Any) -> FloatArray:
        return self._proposed(self._informed(measure, combine, **settings))

    def _informed(self, measure: Callable[[int], Influence], combine: bool = False, **settings: Any) -> InfluencePolicy:
        """The policy after as many measurements as it asks for."""
        topics = self._topics() if combine else None
        natural = np.where(self._setting.corpus.num_tokens > 0, self._natural, 0.0)
        natural[[i for i, name in enumerate(NAMES) if name not in measure(0).domains]] = 0.0
        policy = InfluencePolicy(self._space, natural / natural.sum(), topics=topics, combine=combine, **settings)
        repeat = 0
        while INFLUENCE in policy.needed(0):
            policy.inform(INFLUENCE, measure(repeat))
            repeat += 1
        return policy

    def _proposed(self, policy: Any) -> FloatArray:
        fields = self._setting.fields
        start = self._setting.corpus.start_state[None]
        history = History(domains=self._space.names, fields=fields, mixes=start, feedback=np.zeros((1, len(fields))))
        return np.asarray(policy.propose(history))


def texts(questions: tuple[Question, ...]) -> list[str]:
    """What the classifier of topics reads."""
    return [f"{question.question} {question.answer}" for question in questions]


def work_list(environments: list[tuple[str, str]], size: str) -> Iterator[tuple[str, str, str, int]]:
    """Size, keep, acquire and stream of all that is to be run, the most telling first."""
    for number, streams in enumerate(ROUNDS):
        for keep, acquire in environments:
            for stream in streams:
                yield size, keep, acquire, stream
        if number == 0 and size == "0.16M":
            for keep, acquire in LARGER[1]:
                for stream in streams[:1]:
                    yield LARGER[0], keep, acquire, stream


def make(arguments: argparse.Namespace) -> None:
    """Runs what is missing from the output, one line after the other."""
    one_thread()
    chosen = [pair for pair in TOLD if not arguments.only or "+".join(pair) in arguments.only]
    for size, keep, acquire, stream in work_list(chosen, arguments.size):
        found = setting(keep, acquire, arguments.data, arguments.work)
        weights = base_weights(found.corpus, arguments.work, size=size)
        policies = Policies(found, weights, arguments.work, size=size, stream=stream)
        recorder = Recorder(arguments.output, found, weights, size=size, stream=stream)
        for name, choose in policies.names().items():
            recorder.record(name, choose)
        mean = recorder.mix_of("dmagent-rl")
        recorder.record("dmagent-rl's mean, static", functools.partial(np.divide, mean, mean.sum()))
        # What the probe read, a backward pass counted as two forward ones, as steps of training.
        extra = -(-policies.probe_tokens() // (3 * TOKENS_PER_STEP))
        recorder.record("natural 30%, probe's tokens more", policies.names()["natural 30%"], STEPS + extra)


class Recorder:
    """Runs what is not in the output yet, and adds it there.

    Args:
        output: Lines of JSON.
        found: The environment.
        weights: Of the base model.
        size: Of the model.
        stream: Number of the repetition.
    """

    def __init__(self, output: Path, found: Setting, weights: dict[str, Tensor], *, size: str, stream: int) -> None:
        self._output, self._found, self._weights, self._size, self._stream = output, found, weights, size, stream

    def mix_of(self, name: str) -> FloatArray:
        """Mean of the mixes of a run that is in the output: (52,)."""
        return np.array(next(line for line in lines(self._output) if key(line) == self._key(name))["mix"])

    def record(self, name: str, choose: Callable[[], FloatArray | Policy], steps: int = STEPS) -> None:
        """Runs one policy, unless its run is there."""
        if self._key(name) in {key(line) for line in lines(self._output)}:
            return
        result = run(self._found, self._weights, choose(), size=self._size, stream=self._stream, steps=steps)
        line = {
            "environment": self._found.name,
            "size": self._size,
            "stream": self._stream,
            "policy": name,
            "objective": result.objective,
            "gains": result.gains.tolist(),
            "steps": steps,
            "mix": [round(weight, 5) for weight in result.mix.tolist()],
            "seconds": round(result.seconds, 2),
        }
        add(self._output, line)
        print(f"{self._found.name} {self._size} {self._stream} {name}: {result.objective:.2f}", flush=True)

    def _key(self, name: str) -> tuple[str, str, int, str]:
        return self._found.name, self._size, self._stream, name


def key(line: dict[str, Any]) -> tuple[str, str, int, str]:
    """What a line is about."""
    return line["environment"], line["size"], line["stream"], line["policy"]


COLUMNS = {
    "best of shares": "best of five natural shares",
    "natural 30%": "natural 30%",
    "uniform 30%": "uniform 30%",
    "dmagent-rl": "`dmagent-rl`",
    "dmagent-rl's mean, static": "its mean mix, static",
    "dmagent-rl, topics by influence": '`dmagent-rl`, `topics="influence"`',
    "question topics": '`"question-topics"`',
    "influence, one measurement": "influence alone, 32 rows",
    "influence": "influence alone",
    "influence shuffled": "influence alone, scores permuted",
    "influence x topics": '**`"influence"`**',
    "clone probe": "clones",
    "clone x topics": "clones, with topics",
    "natural 30%, probe's tokens more": "natural 30%, its tokens added",
}
"""Policies of the printed table, with their headings."""


def table(path: Path, size: str) -> str:
    """Objective of each policy in each environment: mean ± standard error over the streams; (1): of one stream."""
    by_cell: dict[tuple[str, str], dict[int, float]] = {}
    for line in lines(path):
        if line["size"] == size:
            by_cell.setdefault((line["environment"], line["policy"]), {})[line["stream"]] = line["objective"]
    shares = [f"natural {share:.0%}" for share in SHARES]
    rows = ["| questions | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for environment in dict.fromkeys(environment for environment, _ in by_cell):
        static = [by_cell[environment, name] for name in shares if (environment, name) in by_cell]
        best = max(static, key=lambda cell: np.mean(list(cell.values()))) if len(static) == len(shares) else {}
        cells = []
        for name in COLUMNS:
            values = list((best if name == "best of shares" else by_cell.get((environment, name), {})).values())
            error = f" ± {_error(values):.2f}" if len(values) > 1 else " (1)"
            cells.append(f"{np.mean(values):.2f}{error}" if values else "")
        rows.append(f"| {environment} | {' | '.join(cells)} |")
    return "\n".join(rows)


PAIRS = (
    ("influence x topics", "natural 30%"),
    ("influence x topics", "question topics"),
    ("influence x topics", "clone probe"),
    ("influence", "natural 30%"),
    ("influence", "influence shuffled"),
    ("influence", "clone probe"),
    ("question topics", "natural 30%"),
    ("dmagent-rl", "natural 30%"),
    ("dmagent-rl, topics by influence", "influence x topics"),
)


def paired(path: Path, size: str) -> str:
    """Mean differences of two policies on the same streams, ± standard error over environments; with MMLU and without.

    A difference of an environment is the mean over its streams.
    """
    by_run = {key(line): line["objective"] for line in lines(path) if line["size"] == size}
    rows = ["| difference | MMLU to keep | other questions | least environment |", "|---|---:|---:|---:|"]
    for one, other in PAIRS:
        found: dict[str, list[float]] = {}
        for environment, _, stream, policy in by_run:
            both = (environment, size, stream, one), (environment, size, stream, other)
            if policy == one and both[1] in by_run:
                found.setdefault(environment, []).append(by_run[both[0]] - by_run[both[1]])
        means = {environment: float(np.mean(values)) for environment, values in found.items()}
        parts = [[m for e, m in means.items() if e.startswith("mmlu") == is_mmlu] for is_mmlu in (True, False)]
        least = min(means, key=means.__getitem__, default="")
        cells = [f"{np.mean(part):+.2f} ± {_error(part):.2f} ({len(part)})" if part else "" for part in parts]
        worst = f"{means[least]:+.2f} {least}" if means else ""
        rows.append(f"| {one} - {other} | {' | '.join(cells)} | {worst} |")
    return "\n".join(rows)


def _error(values: list[float]) -> float:
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/influence"), help="for corpora, base models, probes")
    parser.add_argument("--output", type=Path, default=Path("build/influence/table.jsonl"))
    parser.add_argument("--size", choices=SIZES, default="0.16M")
    parser.add_argument("--only", nargs="*", metavar="KEEP+ACQUIRE", help="these environments alone")
    parser.add_argument("--print", action="store_true", help="show the tables of what is there, run nothing")
    arguments = parser.parse_args()
    if not arguments.print:
        if arguments.data is None:
            parser.error("--data is required unless --print is given")
        make(arguments)
    for size in SIZES:
        if any(line["size"] == size for line in lines(arguments.output)):
            print(f"\n{size} parameters\n\n{table(arguments.output, size)}\n\n{paired(arguments.output, size)}")


if __name__ == "__main__":
    main()
