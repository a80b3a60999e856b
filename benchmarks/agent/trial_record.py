"""What a trial of policies measured, and how it is read: at the end of the runs, or at equal target tokens.

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
"""Kind and version of the file; raised when an older reader would misunderstand a newer one."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One policy's runs at one moment; the first axis of every array is the seed.

    Args:
        objective: (S,) gain of the standardised feedback over the base model's, mean over the fields: the return that
            agents are trained for.
        feedback: (S, K) in nats.
        unseen_objective: (S,) as `objective`, on the unseen questions.
        unseen: (S, K) feedback on the unseen questions in nats.
        held_out: (S, F) loss on the held-out text in nats.
        target_tokens: (S,) of the target field, so far.
        source_tokens: (S,) of the source field, so far.
        steps: (S,) so far; between two steps where target tokens are prescribed.
        effective_domains: (S,) exp(entropy) of the mixes, mean over the steps so far.
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
        """(S,) share of the target field in all tokens so far."""
        return self.target_tokens / (self.target_tokens + self.source_tokens)


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """Runs of R policies over S seeds. Step 0 is the base model; where nothing was measured, values are NaN.

    Args:
        names: Of the policies.
        fields: K names.
        tokens_per_step: Tokens trained between two decisions.
        mixes: (R, S, T + 1, 52); rows after the end of a run are 0.
        lengths: (R, S) steps of each run.
        feedback: (R, S, T + 1, K) in nats.
        unseen: (R, S, T + 1, K) feedback on the unseen questions in nats.
        held_out: (R, S, T + 1, F) loss on the held-out text in nats.
        seconds: Spent on training and scoring.
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
        """The most target tokens that all runs of some policies used up: where they can be compared at equal ones."""
        return float(min(self._used(name)[..., -1].min() for name in names))

    def read(self, name: str, statistics: FeedbackStatistics, *, target_tokens: float | None = None) -> Reading:
        """Reads the runs of a policy.

        Args:
            name: Of the policy.
            statistics: Of the recorded set that agents are trained on; their std is the unit of the objective.
            target_tokens: Read where a run had used up so many target tokens, by a straight line between the two
                nearest measurements; None: at the end.

        Raises:
            ConfigurationError: No such policy, or a run that used fewer target tokens.
        """
        number, used = self._number(name), self._used(name)
        lengths = self.lengths[number]
        level = used[:, -1] if target_tokens is None else np.full(len(used), target_tokens)
        if (used[:, -1] < level).any():
            raise ConfigurationError(
                f"a run of {name!r} ended after {used[:, -1].min():.0f} target tokens, so it cannot be read at "
                f"{level[0]:.0f}: leave the policy out, or read at fewer"
            )
        # At the end by its step, not by its tokens: a run without target data has used none at every step.
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
        """The policy with the highest mean objective over the seeds, on the questions that policies may read.

        Raises:
            ConfigurationError: No name, or see `read`.
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
        """Reads what `save` wrote.

        Raises:
            StateError: Another schema.
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
        """(S, T + 1) target tokens used up to each step."""
        return used_target_tokens(self.mixes[self._number(name)], self.tokens_per_step)
