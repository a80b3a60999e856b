"""What policies do when they steer: models trained under their control, with real feedback.

The recorded trajectories show what mixes do; only a closed loop shows what a policy does with them.

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
    """How long a run lasts, and what it reads.

    Args:
        steps: T, reweighting steps at most.
        tokens_per_step: Tokens trained between two decisions.
        target_tokens: Target-field tokens that there are; a run ends with the step that uses up the last, as recorded
            trajectories do (paper, section 2).
        row_tokens: Tokens of a training row.
        seed: Of the data streams.
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
    """P runs trained at once as one batched model, each under a policy of its own.

    `advance` trains one step; the caller writes what it measures into `feedback` before the next, wherever a policy
    reads it.

    Attributes:
        trainer: Holds the runs that trained in the last step, in the order of `active`.
        mixes: (P, T + 1, 52); row 0 is the start state, rows after the end of a run are 0.
        feedback: (P, T + 1, K) in nats; NaN where nothing was measured.
        step: Steps done.
        active: Numbers of the runs that trained in the last step.

    Args:
        policies: One for each run.
        trainer: P models to start from.
        corpus: Tokens of the 52 domains.
        config: Settings.
        numbers: Stream of each run; runs of one number read the same rows of a domain first, see `MixStream`.
        start_state: (52,).
        fields: K names.
        base_feedback: (P, K), before the first step.
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
        """(P, T + 1) target-field tokens used up to each step; constant after the end of a run."""
        return used_target_tokens(self.mixes, self._config.tokens_per_step)

    @property
    def staying(self) -> IntArray:
        """Numbers of the active runs that have not ended."""
        if self.step == self._config.steps:
            return self.active[:0]
        remaining = self.target_tokens[self.active, self.step] < self._config.target_tokens
        return np.asarray(self.active[remaining], dtype=np.int64)

    def propose(self, run: int) -> FloatArray:
        """The mix (52,) that a run's policy proposes for the next step.

        Raises:
            MixError: It is no distribution.
        """
        past = slice(self.step + 1)
        return proposal(self._policies[run], self._fields, self.mixes[run, past], self.feedback[run, past])

    def advance(self) -> bool:
        """Trains one step of all runs that have not ended; False if there is none left."""
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
        """Goes on where another loop of the same settings stood; the trainer's state is the caller's to restore."""
        self.mixes, self.feedback, self.step = mixes.copy(), feedback.copy(), step
        trained = mixes.sum(axis=-1) > 0
        for stream, path, known in zip(self._streams, mixes, trained, strict=True):
            for mix in path[1 : step + 1][known[1 : step + 1]]:
                stream.skip(mix)
        self.active = np.flatnonzero(trained[:, step])


def proposal(policy: Policy, fields: tuple[str, ...], mixes: FloatArray, feedback: FloatArray) -> FloatArray:
    """The mix (52,) of the next step, after mixes (t, 52) and feedback (t, K).

    Raises:
        MixError: The policy proposes no distribution.
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
    """How much the feedback changes a policy's mind.

    Args:
        policy: That steered the run.
        fields: K names.
        mixes: (T + 1, 52) of one run.
        feedback: (T + 1, K), after each step.

    Returns:
        (T,) total variation between each proposal and the one with all feedback at the base model's.
    """
    blind = np.tile(feedback[0], (len(feedback), 1))

    def proposals(seen: FloatArray) -> FloatArray:
        return np.array([proposal(policy, fields, mixes[:t], seen[:t]) for t in range(1, len(mixes))])

    return total_variation(proposals(feedback), proposals(blind))
