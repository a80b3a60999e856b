"""Evaluation of critics and actor on held-out trajectories (extension).

Hyperparameters are chosen without running an environment, which would turn the test into training. Recorded
trajectories can still show whether the critics rank the recorded steps by their later returns, and what the actor
proposes.

Shapes: M trajectories, T steps, D = 52 domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.agent.rank_correlation import spearman
from dmagent_loader.agent import MixingAgent
from dmagent_loader.agent.critic import MixingCritic
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import TARGET
from dmagent_loader.mixture.simplex import FloatArray, IntArray
from dmagent_loader.training.cql.rewards import (
    agent_states,
    checked_numbers,
    required_statistics,
    returns_to_go,
    rewards,
)
from dmagent_loader.training.record import FeedbackRecord

FEWEST_IN_A_STEP = 4
"""Smallest number of trajectories at a step for a meaningful rank correlation; steps with fewer are left out."""


@dataclass(frozen=True, kw_only=True)
class HeldOutQ:
    """Figures of critics and actor on held-out trajectories.

    Args:
        bellman_error: Root mean square of Q(s_t, a_t) minus its one-step target, in units of the standardised reward.
        rank_correlation: Spearman's correlation of Q(s_t, a_t) with the later discounted return, over all steps. Most
            of it is the time trend: little can be gained near the end of any run.
        rank_correlation_within_steps: The same correlation among the trajectories at one step number, averaged over the
            steps in proportion to their numbers of trajectories. NaN if no step has enough.
        advantage: Mean of u(s, pi(s)) - u(s, a), with u the lowest logit of the critics: their estimate of how much the
            actor's mix is better than the recorded one. A large value without a gain in a real run means that the actor
            exploits errors of its critics.
        target_share: Mean weight of the target field in pi(s).
        effective_domains: Mean of exp(entropy) of pi(s).
        steps: Number of pairs (s, a).
    """

    bellman_error: float
    rank_correlation: float
    rank_correlation_within_steps: float
    advantage: float
    target_share: float
    effective_domains: float
    steps: int


@torch.no_grad()
def held_out_q(
    record: FeedbackRecord,
    agent: MixingAgent,
    critics: Sequence[MixingCritic],
    numbers: IntArray,
    *,
    discount: float,
) -> HeldOutQ:
    """Evaluates critics and actor on some trajectories.

    Args:
        record: Trajectories with feedback.
        agent: The actor pi.
        critics: Critics of its training; the lowest of their values counts, as in training.
        numbers: Numbers of trajectories that were not trained on.
        discount: gamma of the training.

    Raises:
        ConfigurationError: There are no critics, or a trajectory cannot be used, see `rewards.checked_numbers`.
    """
    if not critics:
        raise ConfigurationError("there are no critics to evaluate: pass those of the CQLResult")
    statistics = required_statistics(agent.config)
    is_target = np.array([name.startswith(f"{TARGET}/") for name in agent.config.domains])
    values, returns, errors, advantages, mixes, steps = [], [], [], [], [], []
    for number in checked_numbers(record, agent.config, np.asarray(numbers, dtype=np.int64)):
        received = rewards(record, int(number), statistics)
        inputs = torch.from_numpy(agent_states(record, int(number), agent.config)).float()[None]
        actions = torch.from_numpy(record.trajectories.mixes[number, 1 : len(received) + 1]).float()[None]
        proposed = agent(inputs)
        candidates = torch.stack([actions, proposed], dim=2)
        logits = torch.stack([critic(inputs, candidates)[0] for critic in critics]).amin(dim=0)
        q = critics[0].values(logits).double().numpy()
        following = np.append(q[1:, 1], 0.0)
        values.append(q[:, 0])
        returns.append(returns_to_go(received, discount))
        errors.append(q[:, 0] - (received + discount * following))
        advantages.append((logits[:, 1] - logits[:, 0]).double().numpy())
        mixes.append(proposed[0].double().numpy())
        steps.append(np.arange(len(received)))
    value, followed, step = np.concatenate(values), np.concatenate(returns), np.concatenate(steps)
    mix = np.concatenate(mixes)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(mix > 0, mix * np.log(mix), 0.0).sum(axis=1)
    return HeldOutQ(
        bellman_error=float(np.sqrt(np.square(np.concatenate(errors)).mean())),
        rank_correlation=float(spearman(value, followed)),
        rank_correlation_within_steps=_within_steps(value, followed, step),
        advantage=float(np.concatenate(advantages).mean()),
        target_share=float(mix[:, is_target].sum(axis=1).mean()),
        effective_domains=float(np.exp(entropy).mean()),
        steps=len(value),
    )


def _within_steps(values: FloatArray, returns: FloatArray, steps: IntArray) -> float:
    total, weight = 0.0, 0
    for step in np.unique(steps):
        here = steps == step
        count = int(here.sum())
        correlation = float(spearman(values[here], returns[here])) if count >= FEWEST_IN_A_STEP else float("nan")
        if np.isfinite(correlation):
            total, weight = total + count * correlation, weight + count
    return total / weight if weight else float("nan")
