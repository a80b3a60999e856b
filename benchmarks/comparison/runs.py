"""The work list of the comparison: which policy on which task and stream, the most telling first, each run once."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison.policies import REFERENCE, Entry, TaskContext, random_mix, shuffled
from benchmarks.records import add, lines, rounded
from dmagent_loader.errors import FeedbackError
from dmagent_loader.mixture.domains import TARGET
from dmagent_loader.mixture.influence import Influence
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies import Policy
from dmagent_loader.training.tasks.axes import sample_tasks
from dmagent_loader.training.tasks.episode import (
    RANGE_SHARES,
    RANGE_STREAM,
    Episode,
    attainable,
    range_gains,
    run_episode,
)
from dmagent_loader.training.tasks.simulator import Simulator, Start
from dmagent_loader.training.tasks.spec import TaskSpec

NOISE_FLOOR = (("test", 0), ("test", 7))
"""Tasks whose natural mix is run on `NOISE_STREAMS` streams."""
NOISE_STREAMS = 12
TOLD = (
    ("test", 0, 3),
    ("test", 6, 15),
    ("validation", 0, 3),
    ("test", 3, 6),
    ("validation", 3, 8),  # 8 is the same draw as 3
    ("test", 15, 24),
    ("train", 0, 9),
    ("test", 24, 36),
)
"""Split, first task and end, in the order of running."""
PROXY_STREAM = 2000
"""Stream of the first run that a policy's own proxies make."""
MARKS = 8
"""Feedbacks of a run under a policy that does not read it."""

Unit = tuple[TaskSpec, str, int]
"""Task, name of the policy, stream."""


def tasks(told: Iterable[tuple[str, int, int]] = TOLD) -> list[TaskSpec]:
    """The compared tasks in the order of running."""
    return [spec for split, first, end in told for spec in sample_tasks(split, end)[first:]]


def work_list(specs: Sequence[TaskSpec], entries: Mapping[str, Entry], streams: int) -> Iterator[Unit]:
    """All runs. Streams come in pairs, because a replay on one takes the path from the other.

    Args:
        specs: Tasks, the most telling first.
        entries: Policies by name, the most telling first; those of a lower turn are run first, on all tasks.
        streams: Number of streams of each task, even.
    """
    chosen = {(spec.split, spec.number): spec for spec in specs}
    for key in NOISE_FLOOR:
        if key in chosen:
            yield from ((chosen[key], REFERENCE, stream) for stream in range(NOISE_STREAMS))
    turns = sorted({entry.turn for entry in entries.values()})
    for first in range(0, streams, 2):
        for turn in turns:
            for stream in (first, first + 1):
                for spec in specs:
                    yield from ((spec, name, stream) for name, entry in entries.items() if entry.turn == turn)


class Comparison:
    """Runs what is missing from the output.

    Args:
        simulator: Simulator of the tasks.
        entries: Policies by name.
        output: Lines of JSON; see `line`.
        paths: Folder for the whole paths of policies that others replay.
    """

    def __init__(self, simulator: Simulator, entries: Mapping[str, Entry], output: Path, paths: Path) -> None:
        self._simulator, self._entries, self._output, self._paths = simulator, entries, output, paths
        self._lines = {key(line): line for line in lines(output)}

    def run(self, units: Iterable[Unit]) -> None:
        """Runs some units; one whose record is there is skipped, one that fails is recorded as failed."""
        for spec, name, stream in units:
            if (spec.id, name, stream) in self._lines:
                continue
            try:
                line = self._compared(spec, name, stream)
            except Exception as error:  # a policy of any origin; the rest of the comparison must go on
                line = {"failed": f"{type(error).__name__}: {error}"}
            self._record(spec, name, stream, line)

    def ranges(self, spec: TaskSpec) -> FloatArray:
        """Attainable range of each field, in nats: (2,)."""
        gains = []
        for share in RANGE_SHARES:
            name = f"range {share:.0%}"
            if (spec.id, name, RANGE_STREAM) not in self._lines:
                found = _finite(range_gains(self._simulator, spec, share))
                self._record(spec, name, RANGE_STREAM, {"gains": rounded(found)})
            gains.append(np.array(self._lines[spec.id, name, RANGE_STREAM]["gains"]))
        return attainable(gains)

    def episode(self, spec: TaskSpec, name: str, stream: int) -> tuple[Episode, Start]:
        """One policy on one task and stream; the simulator then holds the trained model. No line is recorded for it."""
        entry, ranges = self._entries[name], self.ranges(spec)
        kept: list[Start] = []
        proxies = self._proxies(spec, entry.proxies) if entry.proxies else None

        def choose(start: Start) -> FloatArray | Policy:
            kept.append(start)
            return entry.make(
                TaskContext(
                    spec=spec,
                    start=start,
                    stream=stream,
                    recorded=self._path_of(spec),
                    proxies=proxies,
                    ranges=ranges,
                )
            )

        def permuted(repeat: int) -> Influence:
            return shuffled(self._simulator.influence(repeat), stream)

        episode = run_episode(
            self._simulator,
            spec,
            stream,
            choose,
            measure=permuted if entry.is_shuffled else None,
            feedback_every=1 if entry.reads_feedback else max(1, spec.steps // MARKS),
            frozen_feedback=entry.is_frozen,
        )
        return episode, kept[0]

    def _compared(self, spec: TaskSpec, name: str, stream: int) -> dict[str, Any]:
        self.ranges(spec)  # the tables need them
        started = time.perf_counter()
        episode, start = self.episode(spec, name, stream)
        gains = _finite(episode.gains)
        if any(other.after == name for other in self._entries.values()):
            self._paths.mkdir(parents=True, exist_ok=True)
            np.save(self._path(spec, name, stream), episode.mixes[1:].astype(np.float32))
        return {
            "gains": rounded(gains),
            **summary(episode, start),
            "wall_seconds": round(time.perf_counter() - started, 2),
        }

    def _proxies(self, spec: TaskSpec, count: int) -> tuple[FloatArray, FloatArray]:
        """See `TaskContext.proxies`; each run is recorded."""
        mixes, feedback = [], []
        start = self._simulator.reset(spec, PROXY_STREAM)
        for number in range(count):
            rng = np.random.default_rng([spec.number, number, 13])
            mix = random_mix(rng, start, 0.02, 0.98)
            name, stream = f"proxy {number}", PROXY_STREAM + number
            if (spec.id, name, stream) not in self._lines:
                episode = run_episode(
                    self._simulator, spec, stream, functools.partial(_always, mix), feedback_every=spec.steps
                )
                gains, end = _finite(episode.gains), _finite(episode.feedback[-1])
                self._record(spec, name, stream, {"gains": rounded(gains), "end": rounded(end)})
            mixes.append(mix)
            feedback.append(self._lines[spec.id, name, stream]["end"])
        return np.array(mixes), np.array(feedback)

    def _path_of(self, spec: TaskSpec) -> Any:
        def recorded(name: str, stream: int) -> FloatArray:
            return np.asarray(np.load(self._path(spec, name, stream)), dtype=np.float64)

        return recorded

    def _path(self, spec: TaskSpec, name: str, stream: int) -> Path:
        return self._paths / f"{spec.id}-{name.replace(' ', '_').replace('/', '_')}-{stream}.npy"

    def _record(self, spec: TaskSpec, name: str, stream: int, result: dict[str, Any]) -> None:
        line = {"task": spec.id, "policy": name, "stream": stream, "spec": spec.to_json(), **result}
        add(self._output, line)
        self._lines[key(line)] = line
        told = result.get("failed", result.get("gains"))
        print(f"{spec.split} {spec.number} [{spec.perturbation.label}] {name} {stream}: {told}", flush=True)


def _finite(scores: FloatArray) -> FloatArray:
    """The scores of a run, which has failed if one of them is not a number.

    Raises:
        FeedbackError: The proxy has diverged.
    """
    if not np.isfinite(scores).all():
        raise FeedbackError(f"the scores are {scores.tolist()}: the proxy has diverged")
    return scores


def _always(mix: FloatArray, _: Start) -> FloatArray:
    return mix


def key(line: Mapping[str, Any]) -> tuple[str, str, int]:
    """What a line is about: task, policy, stream."""
    return line["task"], line["policy"], line["stream"]


def summary(episode: Episode, start: Start) -> dict[str, Any]:
    """A run in short: mean mix, course of the target share, feedback and measured influence."""
    is_target = np.array([domain.field == TARGET for domain in start.space.domains])
    steps = len(episode.mixes) - 1
    marks = sorted({round(i * steps / MARKS) for i in range(MARKS + 1)})
    is_read = np.asarray(np.isfinite(episode.feedback).all(axis=1))
    read = [mark for mark in marks if is_read[mark]] if is_read.all() else np.flatnonzero(is_read).tolist()
    influence = episode.influence
    return {
        "mean_mix": rounded(episode.mixes[1:].mean(axis=0)),
        "target_share": [[m, round(float(episode.mixes[m] @ is_target), 4)] for m in marks if m > 0],
        "feedback": [[m, *rounded(episode.feedback[m])] for m in read],
        "influence": None
        if influence is None
        else {
            "values": [[float(f"{v:.4g}") for v in row] for row in influence.values()],
            "errors": [[float(f"{v:.3g}") for v in row] for row in influence.errors()],
            "tokens": influence.tokens,
            "seconds": round(influence.seconds, 2),
        },
        "seconds": round(episode.seconds, 2),
    }
