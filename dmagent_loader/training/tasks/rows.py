"""Training rows of a task: those of its domain space, with the perturbation of its data.

Shapes: D domains, R rows of a step.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from dmagent_loader.mixture.domains import TARGET
from dmagent_loader.mixture.simplex import FloatArray, IntArray
from dmagent_loader.training.data.spaces import ROW_TOKENS, Space, SpaceRows
from dmagent_loader.training.tasks.spec import TaskSpec

RUNS_OUT_AFTER = 0.1
"""Part of the rows of a run that the domain holds which runs out."""


class TaskRows:
    """Rows of tokens for one mix after another.

    Args:
        space: Rows of each domain.
        spec: The task.
        number: Number of the stream.
        topic: Number of the one of the 52 domains whose text turns to noise.

    Attributes:
        capacity: (D,), rows of each domain.
        repeats: (D,), whether they are read again when they are used up.
    """

    def __init__(self, space: Space, spec: TaskSpec, number: int, *, topic: int) -> None:
        rows_per_step = spec.tokens_per_step // ROW_TOKENS
        self._space, self._spec, self._topic = space, spec, topic
        self._stream = SpaceRows(space, number, rows_per_step)
        self._number, self._step = number, 0
        self._is_noise = spec.perturbation.kind == "noise"
        self._fields = np.array([field == TARGET for field in space.fields])
        self._natural = space.natural(0.5)
        self.capacity = space.num_rows
        self.repeats = np.ones(len(self.capacity), dtype=bool)
        if spec.perturbation.kind == "runs_out" and self._fields.sum() > 1:
            domain = int(np.argmax(np.where(self._fields, self._natural, -1.0)))
            self.capacity = self.capacity.copy()
            most = round(RUNS_OUT_AFTER * spec.steps * rows_per_step)
            self.capacity[domain] = min(int(self.capacity[domain]), max(2, most))
            self.repeats[domain] = False

    def next(self, mix: FloatArray) -> npt.NDArray[np.int64]:
        """Tokens of the next step under a mix: (D,) -> (R, `ROW_TOKENS` + 1)."""
        is_noise = self._is_noise and self._step >= self._spec.perturbation.onset * self._spec.steps
        self._step += 1
        return self._read(self._stream.draw(self.delivered(mix)), is_noise)

    def delivered(self, mix: FloatArray) -> FloatArray:
        """The mix that is read: weight of a domain without rows goes to the rest of its field, (D,) -> (D,)."""
        is_empty = (self.capacity == 0) | (~self.repeats & (self._stream.taken >= self.capacity))
        result = np.where(is_empty, 0.0, mix)
        for members in (self._fields, ~self._fields):
            mass = float(mix[members].sum())
            rest = result[members] if result[members].sum() > 0 else np.where(is_empty, 0.0, self._natural)[members]
            if mass > 0:
                result[members] = mass * rest / rest.sum()
        return result

    def of_each(self, count: int) -> dict[str, npt.NDArray[np.int64]]:
        """Rows of each domain that has some, for a measurement: name -> (rows, `ROW_TOKENS` + 1).

        Like those of `AgentWeightedSampler.probe_rows`, they are spread over all rows of the domain: if its text turns
        to noise during the run, so are the last of them.
        """
        found = {}
        for domain, name in enumerate(self._space.names):
            if self.capacity[domain] > 0:
                rows = self._space.order(domain, self._number)[:count]
                clean = round(self._spec.perturbation.onset * len(rows))
                parts = self._read(rows[:clean], False), self._read(rows[clean:], self._is_noise)
                found[name] = np.concatenate(parts)
        return found

    def _read(self, rows: IntArray, is_noise: bool) -> npt.NDArray[np.int64]:
        tokens = self._space.read(rows)
        noise = self._spec.perturbation.noise
        if not is_noise or noise is None:
            return tokens
        places = np.flatnonzero(self._space.canonical[rows] == self._topic)
        if noise == "repeated":
            first = np.flatnonzero(self._space.canonical == self._topic)[:1]
            tokens[places] = self._space.read(first)
            return tokens
        for place in places:
            rng = np.random.default_rng([3, int(rows[place])])
            row = tokens[place]
            tokens[place] = (
                rng.permutation(row) if noise == "shuffled" else rng.integers(self._vocabulary, size=len(row))
            )
        return tokens

    @functools.cached_property
    def _vocabulary(self) -> int:
        return int(self._space.tokens.max()) + 1


def with_target_pool(space: Space, spec: TaskSpec) -> Space:
    """The space with so few rows of the target field that a run with 30% of it makes `spec.target_passes` passes."""
    if spec.target_passes is None:
        return space
    is_target = np.array([field == TARGET for field in space.fields])[space.domains]
    wanted = 0.3 * spec.steps * (spec.tokens_per_step // ROW_TOKENS) / spec.target_passes
    order = np.random.default_rng([spec.number, 12]).random(len(space.domains))
    kept = ~is_target | (order < wanted / is_target.sum())
    # Every domain keeps two rows: a measurement needs them.
    for domain in np.unique(space.domains[is_target]):
        members = np.flatnonzero(space.domains == domain)
        kept[members[np.argsort(order[members])[:2]]] = True
    return space.selected(kept)
