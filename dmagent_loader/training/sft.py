"""Supervised warm-up of the agent, which learns to predict the next mix of expert trajectories (paper, Eq. 4).

Shapes: M trajectories, T steps, D = 52 domains, K feedback values.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.history import FeedbackStatistics, Standardization, standardize
from dmagent_loader.mixture.simplex import FloatArray, IntArray
from dmagent_loader.training.record import FeedbackRecord


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Settings of the warm-up.

    Args:
        expert_candidates: N of the set to imitate; the paper uses the one with the most candidates.
        expert_share: Share of all trajectories to imitate instead of a set: those with the highest return among the
            trajectories of the same start state (extension). None: the set is imitated.
        updates: Number of optimiser updates.
        evaluate_every: Updates between two evaluations on the validation trajectories; the weights with the lowest
            validation error are kept (extension).
        batch_size: Trajectories of an update.
        learning_rate: Initial learning rate of AdamW; falls to 0 along a half cosine.
        weight_decay: Weight decay of AdamW.
        validation: Number of trajectories excluded from training, which select the weights.
        test: Number of trajectories excluded from training and selection, which measure the error.
        seed: Seed of the split, the weights and the batches.
    """

    expert_candidates: int = 10_000
    expert_share: float | None = None
    updates: int = 600
    evaluate_every: int = 20
    batch_size: int = 8
    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    validation: int = 4
    test: int = 4
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class HeldOutError:
    """Next-mix mean squared error on the test trajectories, which were used neither to train nor to select weights.

    The error of a step is the squared Euclidean distance between the predicted and the actual mix; it is averaged over
    the steps of each trajectory. Each entry has shape (trajectories,).

    Args:
        agent: Error of the agent.
        repeat_last: Error of proposing the present mix again.
        mean_at_step: Error of proposing the mean mix of the training trajectories at that step.
    """

    agent: FloatArray
    repeat_last: FloatArray
    mean_at_step: FloatArray


@dataclass(frozen=True, kw_only=True)
class SFTResult:
    """A trained agent and its errors.

    Args:
        agent: The agent, with the feedback statistics of the record.
        error: Errors on the test trajectories.
        validation_curve: (updates so far, training loss, validation error) of each evaluation.
        best_update: Number of updates after which the weights were kept.
        training: Numbers of the training trajectories.
        validation: Numbers of the validation trajectories.
        test: Numbers of the test trajectories.
    """

    agent: MixingAgent
    error: HeldOutError
    validation_curve: tuple[tuple[int, float, float], ...]
    best_update: int
    training: IntArray
    validation: IntArray
    test: IntArray


def agent_inputs(
    record: FeedbackRecord, statistics: FeedbackStatistics, numbers: IntArray, standardization: Standardization
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, next mixes and validity of some trajectories, padded on the right.

    The agent is causal, so padding on the right needs no attention mask. Feedback is standardised as at inference, with
    the statistics of the whole record (paper, C.3).

    Args:
        record: Trajectories and feedback.
        statistics: Feedback statistics.
        numbers: Numbers of the trajectories.
        standardization: Mode of the agent.

    Returns:
        inputs: (M, T, D + K).
        targets: (M, T, D), row t is the mix of step t + 1.
        valid: (M, T) bool.
    """
    longest = int(record.trajectories.lengths[numbers].max())
    mixes = record.trajectories.mixes[numbers, : longest + 1]
    valid = np.arange(longest)[None] < record.trajectories.lengths[numbers][:, None]
    feedback = np.stack([standardize(f, statistics, standardization) for f in record.feedback[numbers, :longest]])
    inputs = np.concatenate([mixes[:, :-1], np.where(valid[..., None], feedback, 0.0)], axis=-1)
    return (
        torch.from_numpy(inputs).float(),
        torch.from_numpy(np.ascontiguousarray(mixes[:, 1:])).float(),
        torch.from_numpy(valid),
    )


def train_sft(
    record: FeedbackRecord,
    config: SFTConfig,
    agent_config: AgentConfig,
    *,
    on_update: Callable[[], object] | None = None,
) -> SFTResult:
    """Trains an agent from scratch to predict the next mix of the expert set.

    Args:
        record: Trajectories with feedback. All sets enter the feedback statistics; the experts are imitated.
        config: Settings.
        agent_config: Shape of the agent; its statistics are replaced by those of the record.
        on_update: Called after each update, for a progress bar.

    Raises:
        ConfigurationError: There are too few expert trajectories for the split.
    """
    if config.expert_share is None:
        experts = record.trajectories.members(config.expert_candidates)
    else:
        experts = highest_returns(record, config.expert_share)
    if min(config.validation, config.test) < 1 or len(experts) <= config.validation + config.test:
        raise ConfigurationError(
            f"the expert set has {len(experts)} trajectories, of which {config.validation} are for validation and "
            f"{config.test} for the test: keep one or more for each, and some for training"
        )
    order = np.random.default_rng(config.seed).permutation(experts)
    test, validation, training = np.split(order, [config.test, config.test + config.validation])
    statistics = record.statistics()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        agent = MixingAgent(dataclasses.replace(agent_config, statistics=statistics))
        curve, best_update, best = _fit(agent, record, statistics, config, training, validation, on_update)
    agent.load_state_dict(best)
    agent.eval()
    return SFTResult(
        agent=agent,
        error=held_out_error(agent, record, statistics, training, test),
        validation_curve=tuple(curve),
        best_update=best_update,
        training=training,
        validation=validation,
        test=test,
    )


def highest_returns(record: FeedbackRecord, share: float) -> IntArray:
    """Numbers of the trajectories with the highest return, as a share of those of each start state.

    The return is the change of feedback from start to end in units of its spread, averaged over the fields: the sum of
    the rewards of Eq. 6. Start states are ranked separately, because a base model that knows less gains more.
    """
    lengths, starts = record.trajectories.lengths, record.trajectories.starts
    change = record.feedback[np.arange(len(lengths)), lengths] - record.feedback[:, 0]
    returns = (change / np.array(record.statistics().std)).mean(axis=1)
    chosen = []
    for start in np.unique(starts):
        members = np.flatnonzero(starts == start)
        best = members[np.argsort(-returns[members], kind="stable")]
        chosen.append(best[: max(1, round(share * len(members)))])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def held_out_error(
    agent: MixingAgent, record: FeedbackRecord, statistics: FeedbackStatistics, training: IntArray, held_out: IntArray
) -> HeldOutError:
    """Errors of the agent and of two baselines on the held-out trajectories; see `HeldOutError`."""
    inputs, targets, valid = agent_inputs(record, statistics, held_out, agent.config.standardization)
    with torch.no_grad():
        predicted = agent(inputs)
    mixes, lengths = record.trajectories.mixes, record.trajectories.lengths
    means = np.zeros((targets.shape[1], targets.shape[2]))
    for step in range(1, len(means) + 1):
        reached = training[lengths[training] >= step]
        # Beyond the end of all training trajectories the last mean is used.
        means[step - 1] = mixes[reached, step].mean(axis=0) if len(reached) else means[step - 2]
    return HeldOutError(
        agent=_errors(predicted, targets, valid),
        repeat_last=_errors(inputs[..., : targets.shape[-1]], targets, valid),
        mean_at_step=_errors(torch.from_numpy(means).float().expand_as(targets), targets, valid),
    )


def _fit(
    agent: MixingAgent,
    record: FeedbackRecord,
    statistics: FeedbackStatistics,
    config: SFTConfig,
    training: IntArray,
    validation: IntArray,
    on_update: Callable[[], object] | None,
) -> tuple[list[tuple[int, float, float]], int, dict[str, Tensor]]:
    """Trains the agent; returns the validation curve, the best update and the weights after it."""
    inputs, targets, valid = agent_inputs(record, statistics, training, agent.config.standardization)
    unseen_inputs, unseen_targets, unseen_valid = agent_inputs(
        record, statistics, validation, agent.config.standardization
    )
    optimizer = torch.optim.AdamW(agent.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.updates)
    curve: list[tuple[int, float, float]] = []
    best_error, best_update, best = float("inf"), 0, copy.deepcopy(agent.state_dict())
    recent: list[float] = []
    for update in range(1, config.updates + 1):
        chosen = torch.randperm(len(training))[: config.batch_size]
        squares = (agent(inputs[chosen]) - targets[chosen]).square().sum(dim=-1)
        loss = squares[valid[chosen]].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        recent.append(float(loss.detach()))
        if update % config.evaluate_every == 0 or update == config.updates:
            with torch.no_grad():
                error = float(_errors(agent(unseen_inputs), unseen_targets, unseen_valid).mean())
            curve.append((update, float(np.mean(recent)), error))
            recent = []
            if error < best_error:
                best_error, best_update, best = error, update, copy.deepcopy(agent.state_dict())
        if on_update is not None:
            on_update()
    return curve, best_update, best


def _errors(predicted: Tensor, targets: Tensor, valid: Tensor) -> FloatArray:
    squares = (predicted - targets).square().sum(dim=-1)
    return np.asarray(((squares * valid).sum(dim=1) / valid.sum(dim=1)).double().numpy(), dtype=np.float64)
