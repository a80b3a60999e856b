"""What an agent does when it steers: proxies trained under its control, with real feedback at every step.

The recorded trajectories show what mixes do; only a closed loop shows what the agent does with them.

Shapes: P proxies, T steps, D = 52 domains, K fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dmagent_loader.agent import MixingAgent
from dmagent_loader.domains import CANONICAL_TOPICS, NUM_CANONICAL
from dmagent_loader.history import History, Standardization
from dmagent_loader.pipeline.corpus import Corpus
from dmagent_loader.pipeline.feedback import FeedbackConfig
from dmagent_loader.pipeline.proxies import ProxyTrainer
from dmagent_loader.pipeline.questions import ProxyQuestions
from dmagent_loader.pipeline.streams import TrajectoryStream
from dmagent_loader.simplex import FloatArray, effective_domains, total_variation

NUM_TOPICS = len(CANONICAL_TOPICS)
STREAM_NUMBERS = 1_000_000
"""Streams of steered proxies are numbered from here on: other rows than any recorded trajectory's."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One steered run, averaged over P proxies that differ in their data streams.

    Args:
        mixes: (P, T + 1, 52); row 0 is the start state.
        feedback: (P, T + 1, K) in nats.
        without_feedback: (P, T) total variation between each proposal and the one that the agent would have made with
            every feedback at its mean (0 after standardising): how much the feedback changes its mind.
    """

    mixes: FloatArray
    feedback: FloatArray
    without_feedback: FloatArray

    def changes(self) -> FloatArray:
        """(P, T) total variation between each mix and the one before."""
        return total_variation(self.mixes[:, 1:], self.mixes[:, :-1])

    def table(self, fields: Sequence[str], every: int = 2) -> str:
        """A text table over steps: target share, effective domains, feedback."""
        header = "| step | target share | largest target topic | effective domains | " + " | ".join(fields) + " |"
        lines = [header, "|---:|---:|---|---:|" + "---:|" * len(fields)]
        shares = self.mixes[:, :, NUM_TOPICS:].sum(axis=-1)
        last = self.mixes.shape[1] - 1
        for step in sorted({*range(0, last + 1, every), last}):
            learnt = self.mixes[:, step, NUM_TOPICS:].mean(axis=0)
            top = int(np.argmax(learnt))
            largest = f"{CANONICAL_TOPICS[top]} {learnt[top]:.2f}" if learnt[top] > 0 else "none"
            spread = np.mean([effective_domains(mix) for mix in self.mixes[:, step]])
            scores = " | ".join(f"{x:.2f}" for x in self.feedback[:, step].mean(axis=0))
            share = shares[:, step]
            lines.append(f"| {step} | {share.mean():.2f} ± {share.std():.2f} | {largest} | {spread:.1f} | {scores} |")
        return "\n".join(lines)


def skewed_start_state(seed: int) -> FloatArray:
    """A made-up start state: shares 1/1, 1/2, 1/3 ... over the source topics in a random order; (52,), sums to 1."""
    shares = 1.0 / np.arange(1, NUM_TOPICS + 1)
    mix = np.zeros(NUM_CANONICAL)
    mix[np.random.default_rng(seed).permutation(NUM_TOPICS)] = shares / shares.sum()
    return mix


def steer_proxies(
    agent: MixingAgent,
    corpus: Corpus,
    questions: ProxyQuestions,
    config: FeedbackConfig,
    start_state: FloatArray,
    *,
    steps: int,
    tokens_per_step: int,
    pretraining_steps: int,
    standardization: Standardization,
    num_proxies: int = 4,
) -> Rollout:
    """Trains proxies from scratch under the agent's control.

    Args:
        agent: With feedback statistics.
        corpus: Tokens of the 52 domains.
        questions: The environment.
        config: Of the proxies, as in the collection.
        start_state: (52,), the mix before the first step.
        steps: T.
        tokens_per_step: Between two decisions.
        pretraining_steps: Steps on the start state before the agent takes over: 0 as in the recorded trajectories, more
            as in continual pre-training.
        standardization: Of the feedback the agent sees.
        num_proxies: P; they differ in their data streams.
    """
    trainer = ProxyTrainer(num_proxies, config.proxy)
    rows_per_step = tokens_per_step // config.row_tokens
    for step in range(1, pretraining_steps + 1):
        _train_last_step(trainer, corpus, config, rows_per_step, np.tile(start_state, (num_proxies, step + 1, 1)))
    mixes = np.tile(start_state, (num_proxies, 1, 1))
    # The pre-training's mixes stay in front of the trained ones: a stream counts its rows from the beginning.
    trained = np.tile(start_state, (num_proxies, pretraining_steps + 1, 1))
    feedback = questions.feedback(trainer.model)[:, None]
    without_feedback = np.zeros((num_proxies, steps))
    for step in range(1, steps + 1):
        proposals = np.zeros((num_proxies, 1, NUM_CANONICAL))
        for i in range(num_proxies):
            seen = History(domains=agent.config.domains, fields=questions.fields, mixes=mixes[i], feedback=feedback[i])
            proposals[i, 0] = agent.propose(seen, standardization=standardization)
            blind = _without_feedback(agent, seen)
            without_feedback[i, step - 1] = total_variation(proposals[i, 0], blind)
        mixes = np.concatenate([mixes, proposals], axis=1)
        trained = np.concatenate([trained, proposals], axis=1)
        _train_last_step(trainer, corpus, config, rows_per_step, trained)
        feedback = np.concatenate([feedback, questions.feedback(trainer.model)[:, None]], axis=1)
    return Rollout(mixes=mixes, feedback=feedback, without_feedback=without_feedback)


def _train_last_step(
    trainer: ProxyTrainer, corpus: Corpus, config: FeedbackConfig, rows_per_step: int, trained: FloatArray
) -> None:
    """Trains each proxy on the last of its mixes: (P, steps so far + 1, 52)."""
    last = trained.shape[1] - 1
    rows = [
        TrajectoryStream(
            corpus,
            mixes,
            rows_per_step=rows_per_step,
            row_tokens=config.row_tokens,
            seed=config.seed,
            number=STREAM_NUMBERS + i,
        ).rows(last)
        for i, mixes in enumerate(trained)
    ]
    trainer.train(torch.from_numpy(np.stack(rows)))


def _without_feedback(agent: MixingAgent, history: History) -> FloatArray:
    """The proposal that the agent would make if every feedback were at its mean."""
    assert agent.config.statistics is not None
    mean = np.tile(np.array(agent.config.statistics.mean), (len(history), 1))
    return agent.propose(dataclasses.replace(history, feedback=mean), standardization="frozen")
