"""Measurements of a trial of policies, which are read at the end of the runs or at equal target tokens.

Shapes: R policies, S seeds, T steps, D = 52 domains, K fields of the environment, F = 2 fields of the corpus.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save as serialize

from benchmarks.agent.rollout import used_target_tokens
from dmagent_loader._files import write_atomically
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.history import FeedbackStatistics
from dmagent_loader.mixture.simplex import FloatArray, IntArray, effective_domains

SCHEMA = "trial/1"
"""Kind and version of the file; increased when an older reader would misunderstand a newer one."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Runs of one policy at one moment; the first axis of every array is the seed.

    Args:
        objective: (S,), gain of the standardised feedback over the base model's, mean over the fields: the return that
            agents are trained for.
        feedback: (S, K), in nats.
        unseen_objective: (S,), objective on the unseen questions.
        unseen: (S, K), feedback on the unseen questions in nats.
        held_out: (S, F), loss on the held-out text in nats.
        target_tokens: (S,), tokens of the target field so far.
        source_tokens: (S,), tokens of the source field so far.
        steps: (S,), steps so far; fractional at a given number of target tokens.
        effective_domains: (S,), exp(entropy) of the mixes, mean over the steps so far.
    """

    objective: FloatArray
    feedback: FloatArray
    unseen_objective: FloatArray
    unseen: FloatArray
    held_out: FloatArray
    target_tokens: FloatArray
    source_tokens: FloatArray
    steps: FloatArray
    effective_domains: FloatArray

    @property
    def target_share(self) -> FloatArray:
        """Share of the target field in all tokens so far: (S,)."""
        return self.target_tokens / (self.target_tokens + self.source_tokens)


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """Runs of R policies over S seeds. Step 0 is the base model; values that were not measured are NaN.

    Args:
        names: Names of the R policies.
        fields: Names of the K fields.
        tokens_per_step: Tokens trained between two decisions.
        mixes: (R, S, T + 1, 52); rows after the end of a run are 0.
        lengths: (R, S), number of steps of each run.
        feedback: (R, S, T + 1, K), in nats.
        unseen: (R, S, T + 1, K), feedback on the unseen questions in nats.
        held_out: (R, S, T + 1, F), loss on the held-out text in nats.
        seconds: Time spent on training and scoring.
    """

    names: tuple[str, ...]
    fields: tuple[str, ...]
    tokens_per_step: int
    mixes: FloatArray
    lengths: IntArray
    feedback: FloatArray
    unseen: FloatArray
    held_out: FloatArray
    seconds: float

    def target_tokens(self, names: Sequence[str]) -> float:
        """Largest number of target tokens that all runs of some policies used up, at which they can be compared."""
        return float(min(self._used(name)[..., -1].min() for name in names))

    def read(self, name: str, statistics: FeedbackStatistics, *, target_tokens: float | None = None) -> Reading:
        """Reads the runs of a policy.

        Args:
            name: Name of the policy.
            statistics: Feedback statistics of the recorded set; their std is the unit of the objective.
            target_tokens: Number of target tokens at which the runs are read, by linear interpolation between the two
                nearest measurements; None: they are read at the end.

        Raises:
            ConfigurationError: There is no such policy, or a run used fewer target tokens.
        """
        number, used = self._number(name), self._used(name)
        lengths = self.lengths[number]
        level = used[:, -1] if target_tokens is None else np.full(len(used), target_tokens)
        if (used[:, -1] < level).any():
            raise ConfigurationError(
                f"a run of {name!r} ended after {used[:, -1].min():.0f} target tokens, so it cannot be read at "
                f"{level[0]:.0f}: leave the policy out, or read at fewer"
            )
        # The end is found by its step and not by its tokens: a run without target data has 0 tokens at every step.
        if target_tokens is None:
            steps = lengths.astype(np.float64)
        else:
            grid = [used[s, : lengths[s] + 1] for s in range(len(used))]
            steps = np.array([np.interp(target_tokens, x, np.arange(len(x))) for x in grid])

        def at(values: FloatArray) -> FloatArray:
            rows = []
            for step, path in zip(steps, values, strict=True):
                known = np.flatnonzero(np.isfinite(path).all(axis=-1))
                rows.append([np.interp(step, known, path[known, k]) for k in range(path.shape[-1])])
            return np.array(rows)

        std = np.array(statistics.std)
        feedback, unseen = at(self.feedback[number]), at(self.unseen[number])
        spread = np.zeros(len(used))
        for seed, step in enumerate(np.ceil(steps).astype(np.int64)):
            spread[seed] = np.mean([effective_domains(mix) for mix in self.mixes[number, seed, 1 : step + 1]])
        return Reading(
            objective=((feedback - self.feedback[number, :, 0]) / std).mean(axis=-1),
            feedback=feedback,
            unseen_objective=((unseen - self.unseen[number, :, 0]) / std).mean(axis=-1),
            unseen=unseen,
            held_out=at(self.held_out[number]),
            target_tokens=level,
            source_tokens=steps * self.tokens_per_step - level,
            steps=steps,
            effective_domains=spread,
        )

    def best(self, names: Sequence[str], statistics: FeedbackStatistics, *, target_tokens: float | None = None) -> str:
        """The policy with the highest mean objective over the seeds, on the questions whose feedback policies read.

        Raises:
            ConfigurationError: There is no name, or see `read`.
        """
        if not names:
            raise ConfigurationError("there is no policy to choose from: give at least one name")
        scores = [self.read(name, statistics, target_tokens=target_tokens).objective.mean() for name in names]
        return names[int(np.argmax(scores))]

    def save(self, path: Path) -> None:
        """Writes one safetensors file."""
        arrays = {
            "mixes": self.mixes,
            "lengths": self.lengths,
            "feedback": self.feedback,
            "unseen": self.unseen,
            "held_out": self.held_out,
        }
        meta = {
            "schema": SCHEMA,
            "names": json.dumps(self.names),
            "fields": json.dumps(self.fields),
            "tokens_per_step": str(self.tokens_per_step),
            "seconds": repr(self.seconds),
        }
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        write_atomically(path, serialize(contiguous, metadata=meta))

    @classmethod
    def load(cls, path: Path) -> TrialRecord:
        """Reads a file that `save` wrote.

        Raises:
            StateError: The file has another schema.
        """
        with safe_open(str(path), framework="numpy") as file:
            meta = file.metadata() or {}
            if meta.get("schema") != SCHEMA:
                raise StateError(f"{path} has schema {meta.get('schema')}, not {SCHEMA}: run the trial again")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        return cls(
            **arrays,
            names=tuple(json.loads(meta["names"])),
            fields=tuple(json.loads(meta["fields"])),
            tokens_per_step=int(meta["tokens_per_step"]),
            seconds=float(meta["seconds"]),
        )

    def _number(self, name: str) -> int:
        if name not in self.names:
            raise ConfigurationError(f"no run of {name!r} in this trial; its policies are {', '.join(self.names)}")
        return self.names.index(name)

    def _used(self, name: str) -> FloatArray:
        """Target tokens used up to each step: (S, T + 1)."""
        return used_target_tokens(self.mixes[self._number(name)], self.tokens_per_step)
