"""Closed loop: models that are trained under the control of policies, with real feedback.

Recorded trajectories show the effect of mixes; only a closed loop shows the effect of a policy.

Shapes: P runs, T steps, D = 52 domains, K fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import NUM_CANONICAL, NUM_TOPICS, DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray, IntArray, total_variation, validate_mix
from dmagent_loader.policies import Policy
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.data.streams import MixStream
from dmagent_loader.training.proxies.trainer import ProxyTrainer


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length and data of a run.

    Args:
        steps: T, largest number of reweighting steps.
        tokens_per_step: Tokens trained between two decisions.
        target_tokens: Number of target-field tokens; a run ends with the step that uses up the last, as recorded
            trajectories do (paper, section 2).
        row_tokens: Tokens of a training row.
        seed: Seed of the data streams.

    Raises:
        ConfigurationError: There is no step, no row in a step, or no target token.
    """

    steps: int
    tokens_per_step: int
    target_tokens: int
    row_tokens: int
    seed: int

    def __post_init__(self) -> None:
        if min(self.steps, self.tokens_per_step // self.row_tokens, self.target_tokens) < 1:
            raise ConfigurationError(f"a run needs one or more steps, rows in a step and target tokens, got {self}")


class ClosedLoop:
    """P runs that are trained as one batched model, each under its own policy.

    `advance` trains one step. Before the next step the caller writes its measurements into `feedback`, for every run
    whose policy reads it.

    Attributes:
        trainer: Models of the runs that trained in the last step, in the order of `active`.
        mixes: (P, T + 1, 52); row 0 is the start state, rows after the end of a run are 0.
        feedback: (P, T + 1, K) in nats; NaN where nothing was measured.
        step: Number of steps so far.
        active: Numbers of the runs that trained in the last step.

    Args:
        policies: One policy for each run.
        trainer: The P initial models.
        corpus: Tokens of the 52 domains.
        config: Settings.
        numbers: Stream number of each run; runs with the same number read the same rows of a domain first, see
            `MixStream`.
        start_state: (52,).
        fields: Names of the K fields.
        base_feedback: (P, K), feedback before the first step.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        trainer: ProxyTrainer,
        corpus: Corpus,
        config: LoopConfig,
        *,
        numbers: Sequence[int],
        start_state: FloatArray,
        fields: tuple[str, ...],
        base_feedback: FloatArray,
    ) -> None:
        self.trainer = trainer
        self.mixes = np.zeros((len(policies), config.steps + 1, NUM_CANONICAL))
        self.mixes[:, 0] = start_state
        self.feedback = np.full((len(policies), config.steps + 1, len(fields)), np.nan)
        self.feedback[:, 0] = base_feedback
        self.step = 0
        self.active: IntArray = np.arange(len(policies))
        self._policies, self._config, self._fields = policies, config, fields
        self._streams = [
            MixStream(
                corpus,
                rows_per_step=config.tokens_per_step // config.row_tokens,
                row_tokens=config.row_tokens,
                seed=config.seed,
                number=number,
            )
            for number in numbers
        ]

    @property
    def target_tokens(self) -> FloatArray:
        """Target-field tokens used up to each step: (P, T + 1), constant after the end of a run."""
        return used_target_tokens(self.mixes, self._config.tokens_per_step)

    @property
    def staying(self) -> IntArray:
        """Numbers of the active runs that have not ended."""
        if self.step == self._config.steps:
            return self.active[:0]
        remaining = self.target_tokens[self.active, self.step] < self._config.target_tokens
        return np.asarray(self.active[remaining], dtype=np.int64)

    def propose(self, run: int) -> FloatArray:
        """The mix that a run's policy proposes for the next step: (52,).

        Raises:
            MixError: The proposal is not a distribution.
        """
        past = slice(self.step + 1)
        return proposal(self._policies[run], self._fields, self.mixes[run, past], self.feedback[run, past])

    def advance(self) -> bool:
        """Trains one step of all runs that have not ended; returns False if all have ended."""
        staying = self.staying
        if not len(staying):
            return False
        self.trainer.keep(np.flatnonzero(np.isin(self.active, staying)).tolist())
        self.active = staying
        mixes = np.stack([self.propose(int(run)) for run in staying])
        self.step += 1
        self.mixes[staying, self.step] = mixes
        rows = [self._streams[run].next(mix) for run, mix in zip(staying, mixes, strict=True)]
        self.trainer.train(torch.from_numpy(np.stack(rows)))
        return True

    def restore(self, mixes: FloatArray, feedback: FloatArray, step: int) -> None:
        """Continues from the step of another loop with the same settings; the caller restores the trainer's state."""
        self.mixes, self.feedback, self.step = mixes.copy(), feedback.copy(), step
        trained = mixes.sum(axis=-1) > 0
        for stream, path, known in zip(self._streams, mixes, trained, strict=True):
            for mix in path[1 : step + 1][known[1 : step + 1]]:
                stream.skip(mix)
        self.active = np.flatnonzero(trained[:, step])


def proposal(policy: Policy, fields: tuple[str, ...], mixes: FloatArray, feedback: FloatArray) -> FloatArray:
    """The policy's mix of the next step, (52,), after mixes (t, 52) and feedback (t, K).

    Raises:
        MixError: The proposal is not a distribution.
    """
    domains = DomainSpace.canonical().names
    history = History(domains=domains, fields=fields, mixes=mixes, feedback=feedback)
    return validate_mix(policy.propose(history), domains)


def used_target_tokens(mixes: FloatArray, tokens_per_step: int) -> FloatArray:
    """Target-field tokens used up to each step: (..., T + 1, 52) -> (..., T + 1); the start state uses none."""
    shares = mixes[..., NUM_TOPICS:].sum(axis=-1)
    shares[..., 0] = 0.0
    return np.asarray(np.cumsum(shares * tokens_per_step, axis=-1), dtype=np.float64)


def change_by_feedback(policy: Policy, fields: tuple[str, ...], mixes: FloatArray, feedback: FloatArray) -> FloatArray:
    """Effect of the feedback on a policy's proposals.

    Args:
        policy: The policy that steered the run.
        fields: Names of the K fields.
        mixes: (T + 1, 52), mixes of one run.
        feedback: (T + 1, K), feedback after each step.

    Returns:
        (T,), total variation between each proposal and the one with all feedback equal to the base model's.
    """
    blind = np.tile(feedback[0], (len(feedback), 1))

    def proposals(seen: FloatArray) -> FloatArray:
        return np.array([proposal(policy, fields, mixes[:t], seen[:t]) for t in range(1, len(mixes))])

    return total_variation(proposals(feedback), proposals(blind))
