"""Mixing trajectories by Algorithm 1 (paper, C.1; body reconstructed, weights and proposal are extensions).

At each step N candidate mixes are drawn around the present one. The candidate with the best score is kept: it changes
the mix little, is close to the target distribution (which counts more over time), and differs from the mixes of earlier
trajectories at the same step. With N = 1 the score has no effect, with N = 10,000 it decides.

Shapes: M trajectories, T steps, D = 52 domains, N candidates of one step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save as serialize

from dmagent_loader._files import write_atomically
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.domains import NUM_CANONICAL, NUM_TOPICS
from dmagent_loader.mixture.simplex import FloatArray, IntArray, js_divergence

SCHEMA = "trajectories/2"
"""Kind and version of the file; increased when an older reader would misunderstand a newer one."""


@dataclass(frozen=True, kw_only=True)
class TrajectoryConfig:
    """Settings of Algorithm 1.

    Args:
        candidates_per_step: N of each set (paper: "path sampling number").
        trajectories_per_set: Number of trajectories of each set; 96 in the paper.
        steps: T, largest number of reweighting steps of a trajectory; 80 in the paper.
        tokens_per_step: Tokens trained between two reweighting steps.
        target_tokens: Number of target-field tokens; a trajectory ends with the step that uses up the last.
        change_weight: Weight of -JS(candidate, previous mix).
        target_weight: Weight of -(t / T) JS(candidate, target distribution).
        diversity_weight: Weight of the mean total variation to earlier trajectories at the same step.
        smoothing: Constant added to every Dirichlet parameter of the proposal, so that every domain can be reached.
        seed: Seed of all draws.

    Raises:
        ConfigurationError: A number is not positive.
    """

    candidates_per_step: tuple[int, ...] = (1, 100, 1000, 10_000)
    trajectories_per_set: int = 96
    steps: int = 80
    tokens_per_step: int = 8192
    target_tokens: int = 340_000
    change_weight: float = 1.0
    target_weight: float = 2.0
    diversity_weight: float = 0.3
    smoothing: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (
            *self.candidates_per_step,
            self.trajectories_per_set,
            self.steps,
            self.tokens_per_step,
            self.target_tokens,
        )
        if not self.candidates_per_step or min(counts) < 1:
            raise ConfigurationError(f"trajectories need positive numbers of candidates, steps and tokens, got {self}")
        if self.smoothing <= 0:
            raise ConfigurationError(f"smoothing is {self.smoothing}: Dirichlet parameters must be positive")

    @classmethod
    def from_json(cls, text: str) -> TrajectoryConfig:
        """Reads the JSON form of `dataclasses.asdict`."""
        values = json.loads(text)
        return cls(**{**values, "candidates_per_step": tuple(values["candidates_per_step"])})


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """M trajectories over the canonical domains, in the order in which they were drawn.

    Args:
        mixes: (M, T + 1, 52); row 0 is the start state, row t the mix of step t; rows after the end are 0.
        lengths: (M,), number of steps, at most T.
        candidates: (M,), N of the trajectory's set.
        starts: (M,), number of the trajectory's start state.
        target_distribution: (52,), distribution that the score favours.
        config: Settings.
    """

    mixes: FloatArray
    lengths: IntArray
    candidates: IntArray
    starts: IntArray
    target_distribution: FloatArray
    config: TrajectoryConfig

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of mixes and lengths."""
        digest = hashlib.sha256(self.lengths.tobytes())
        digest.update(self.mixes.tobytes())
        return digest.hexdigest()

    def members(self, candidates: int) -> IntArray:
        """Numbers of the trajectories of one set.

        Args:
            candidates: N of the set.

        Raises:
            ConfigurationError: There is no such set.
        """
        numbers = np.flatnonzero(self.candidates == candidates).astype(np.int64)
        if not len(numbers):
            raise ConfigurationError(
                f"no trajectory was drawn with {candidates} candidates per step; the sets are "
                f"{self.config.candidates_per_step}"
            )
        return numbers

    def subset(self, numbers: Sequence[int] | IntArray) -> Trajectories:
        """Some of the trajectories, in their order, as if only they had been drawn.

        Args:
            numbers: Numbers of the trajectories, equally many of each set that remains.

        Raises:
            ConfigurationError: A number does not exist or is repeated, or the sets would differ in size.
        """
        kept = np.sort(np.asarray(numbers, dtype=np.int64))
        if not len(kept) or len(set(kept.tolist())) < len(kept) or kept[0] < 0 or kept[-1] >= len(self.lengths):
            raise ConfigurationError(
                f"{kept.tolist()} are not distinct numbers of {len(self.lengths)} trajectories: give each once, from 0 "
                f"to {len(self.lengths) - 1}"
            )
        counts = {n: int((self.candidates[kept] == n).sum()) for n in self.config.candidates_per_step}
        counts = {n: count for n, count in counts.items() if count}
        if len(set(counts.values())) > 1:
            raise ConfigurationError(f"the sets would have {counts} trajectories: choose the same number of each")
        return replace(
            self,
            mixes=self.mixes[kept],
            lengths=self.lengths[kept],
            candidates=self.candidates[kept],
            starts=self.starts[kept],
            config=replace(
                self.config, candidates_per_step=tuple(counts), trajectories_per_set=next(iter(counts.values()))
            ),
        )

    def shortened(self, steps: int) -> Trajectories:
        """The first steps of each trajectory.

        Raises:
            ConfigurationError: `steps` is less than 1.
        """
        if steps < 1:
            raise ConfigurationError(f"trajectories cannot be shortened to {steps} steps: keep one or more")
        mixes = self.mixes[:, : steps + 1]
        config = replace(self.config, steps=mixes.shape[1] - 1)
        return replace(self, mixes=mixes, lengths=np.minimum(self.lengths, config.steps), config=config)

    def target_share(self) -> FloatArray:
        """Weight of the target field: (M, T + 1), NaN after the end."""
        share = self.mixes[:, :, NUM_TOPICS:].sum(axis=-1)
        steps = np.arange(self.mixes.shape[1])
        return np.where(steps[None] <= self.lengths[:, None], share, np.nan)

    def save(self, path: Path) -> None:
        """Writes one safetensors file with the settings as JSON in its header."""
        arrays = {
            "mixes": self.mixes,
            "lengths": self.lengths,
            "candidates": self.candidates,
            "starts": self.starts,
            "target_distribution": self.target_distribution,
        }
        meta = {"schema": SCHEMA, "settings": json.dumps(asdict(self.config))}
        write_atomically(path, serialize(arrays, metadata=meta))

    @classmethod
    def load(cls, path: Path) -> Trajectories:
        """Reads a file that `save` wrote.

        Raises:
            StateError: The file has another schema.
        """
        with safe_open(str(path), framework="numpy") as file:
            meta = file.metadata() or {}
            if meta.get("schema") != SCHEMA:
                raise StateError(f"{path} has schema {meta.get('schema')}, not {SCHEMA}: draw the trajectories again")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        return cls(**arrays, config=TrajectoryConfig.from_json(meta["settings"]))


def propose(
    rng: np.random.Generator, present: FloatArray, source: FloatArray, target: FloatArray, count: int, smoothing: float
) -> FloatArray:
    """Draws random mixes around the present one (extension).

    c = (1 - w) a + w u with w ~ Beta(1, 1.5), u = [(1 - s) Dir(k p_source + smoothing), s Dir(k q + smoothing)],
    s ~ U(0, 1), k ~ U(2, 40). Most mixes stay near the present one, some are far away, and every target share occurs.

    Args:
        rng: Source of randomness.
        present: (52,), mix of the previous step.
        source: (26,), topic shares of the source field in the start state.
        target: (26,), topic shares of the target field.
        count: N.
        smoothing: Constant added to the Dirichlet parameters.

    Returns:
        (N, 52), rows sum to 1.
    """
    step = rng.beta(1.0, 1.5, size=(count, 1))
    share = rng.uniform(0.0, 1.0, size=(count, 1))
    sharpness = rng.uniform(2.0, 40.0, size=(count, 1))
    kept = rng.standard_gamma(sharpness * source + smoothing)
    learnt = rng.standard_gamma(sharpness * target + smoothing)
    kept *= (1.0 - share) / kept.sum(axis=1, keepdims=True)
    learnt *= share / learnt.sum(axis=1, keepdims=True)
    return np.asarray((1.0 - step) * present + step * np.concatenate([kept, learnt], axis=1), dtype=np.float64)


def score(
    candidates: FloatArray,
    previous: FloatArray,
    target: FloatArray,
    earlier: FloatArray,
    progress: float,
    config: TrajectoryConfig,
) -> FloatArray:
    """Score of candidate mixes (Algorithm 1; distances reconstructed: Jensen-Shannon, because the target has zeros).

    Args:
        candidates: (N, 52).
        previous: (52,), mix of the previous step.
        target: (52,), target distribution.
        earlier: (m, 52), mixes of the set's earlier trajectories at the same step; m may be 0.
        progress: t / T.
        config: Weights of the terms.

    Returns:
        (N,), higher is better.
    """
    result = -config.change_weight * js_divergence(candidates, previous)
    result -= config.target_weight * progress * js_divergence(candidates, target)
    if len(earlier):
        result += config.diversity_weight * mean_total_variation(candidates, earlier)
    return np.asarray(result, dtype=np.float64)


def mean_total_variation(candidates: FloatArray, earlier: FloatArray) -> FloatArray:
    """Mean total variation of each candidate to all earlier mixes: (N, D), (m, D) -> (N,).

    In each domain the sum of |c - e| over the sorted e is c * (2 below - m) + (sum of all) - 2 (sum of those below).
    So a binary search per candidate replaces the pass over all pairs, which was the slowest part of the sampling.
    """
    ordered = np.sort(earlier, axis=0)
    sums = np.vstack([np.zeros(ordered.shape[1]), np.cumsum(ordered, axis=0)])
    total = np.zeros(len(candidates))
    for domain, weights in enumerate(np.ascontiguousarray(candidates.T)):
        below = np.searchsorted(ordered[:, domain], weights)
        total += weights * (2 * below - len(earlier)) + sums[-1, domain] - 2 * sums[below, domain]
    return np.asarray(0.5 * total / len(earlier), dtype=np.float64)


def sample_trajectories(
    start_states: FloatArray,
    target_distribution: FloatArray,
    config: TrajectoryConfig,
    *,
    on_trajectory: Callable[[], object] | None = None,
) -> Trajectories:
    """Draws all sets of trajectories (Algorithm 1).

    Args:
        start_states: (S, 52), 0 on the target domains; the trajectories of a set use them in turn (the paper has one).
        target_distribution: (52,), 0 on the source domains.
        config: Settings.
        on_trajectory: Called after each trajectory, for a progress bar.

    Raises:
        ConfigurationError: A start state or the target distribution has the wrong shape or does not sum to 1.
    """
    target = target_distribution[NUM_TOPICS:]
    if start_states.ndim != 2 or start_states.shape[1] != NUM_CANONICAL or len(target_distribution) != NUM_CANONICAL:
        raise ConfigurationError(
            f"start states and target distribution have shapes {start_states.shape} and {target_distribution.shape}; "
            f"they must be (states, {NUM_CANONICAL}) and ({NUM_CANONICAL},): over the canonical domains"
        )
    kept = start_states[:, :NUM_TOPICS].sum(axis=1)
    if not np.allclose(kept, 1.0) or not np.isclose(target.sum(), 1.0):
        raise ConfigurationError(
            f"the start states have {kept.min():.4g} to {kept.max():.4g} of their weight on source domains and the "
            f"target distribution {target.sum():.4g} on target domains; all must be 1"
        )
    total = len(config.candidates_per_step) * config.trajectories_per_set
    candidates = np.repeat(np.array(config.candidates_per_step, dtype=np.int64), config.trajectories_per_set)
    starts = np.arange(total) % config.trajectories_per_set % len(start_states)
    mixes = np.zeros((total, config.steps + 1, NUM_CANONICAL))
    mixes[:, 0] = start_states[starts]
    lengths = np.zeros(total, dtype=np.int64)
    for number in range(total):
        # A generator for each trajectory, so that a set does not depend on the other sets.
        within = number % config.trajectories_per_set
        rng = np.random.default_rng([config.seed, int(candidates[number]), within])
        first = number - within
        source = mixes[number, 0, :NUM_TOPICS]
        used = 0.0
        for step in range(1, config.steps + 1):
            previous = mixes[number, step - 1]
            drawn = propose(rng, previous, source, target, int(candidates[number]), config.smoothing)
            reached = np.arange(first, number)[lengths[first:number] >= step]
            scores = score(drawn, previous, target_distribution, mixes[reached, step], step / config.steps, config)
            mixes[number, step] = drawn[int(np.argmax(scores))]
            lengths[number] = step
            used += float(mixes[number, step, NUM_TOPICS:].sum()) * config.tokens_per_step
            if used >= config.target_tokens:
                break
        if on_trajectory is not None:
            on_trajectory()
    return Trajectories(
        mixes=mixes,
        lengths=lengths,
        candidates=candidates,
        starts=starts.astype(np.int64),
        target_distribution=np.asarray(target_distribution, dtype=np.float64),
        config=config,
    )
