"""Recorded trajectories as a decision process: the agent's states, rewards and returns (paper, section 2).

Shapes: L steps of one trajectory, D = 52 domains, K feedback values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dmagent_loader.agent import AgentConfig
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.history import FeedbackStatistics, standardize
from dmagent_loader.mixture.simplex import FloatArray, IntArray
from dmagent_loader.training.record import FeedbackRecord

OUTER_PERCENTILES = (0.1, 99.9)
"""Percentiles of the recorded returns that bound their range; values outside are treated as noise of the feedback."""


def required_statistics(config: AgentConfig) -> FeedbackStatistics:
    """Feedback statistics of the agent.

    Raises:
        ConfigurationError: The agent has none.
    """
    if config.statistics is None:
        raise ConfigurationError(
            "the agent has no feedback statistics, which scale its rewards and its inputs: train it with train_sft, or "
            "set AgentConfig(statistics=record.statistics())"
        )
    return config.statistics


def agent_states(record: FeedbackRecord, number: int, config: AgentConfig) -> FloatArray:
    """Input rows of agent and critic along one trajectory.

    Feedback is standardised in the mode that the agent uses in a run, which need not be the paper's (``frozen``): a
    policy learnt on one scale is of little use on another.

    Args:
        record: Trajectories and feedback.
        number: Number of the trajectory.
        config: Config of the agent.

    Returns:
        (L, D + K): row t holds the mix of step t and the feedback after it. Nothing follows the last step, so it has no
        row.
    """
    length = int(record.trajectories.lengths[number])
    feedback = standardize(
        record.feedback[number, :length],
        required_statistics(config),
        config.standardization,
        prior_weight=config.prior_weight,
    )
    return np.concatenate([record.trajectories.mixes[number, :length], feedback], axis=1)


def rewards(record: FeedbackRecord, number: int, statistics: FeedbackStatistics) -> FloatArray:
    """r_t = sum_k lambda_k (f_t,k - f_{t-1,k}) / std_k with lambda_k = 1 / K (Eq. 6, reconstructed).

    The scale is always that of the training trajectories, so that a nat has the same value at every step. Without
    discount the sum telescopes to the standardised gain of the run.

    Returns:
        (L,): entry t is the reward for the mix of step t + 1.
    """
    feedback = record.feedback[number, : int(record.trajectories.lengths[number]) + 1]
    return np.asarray((np.diff(feedback, axis=0) / np.array(statistics.std)).mean(axis=1), dtype=np.float64)


def returns_to_go(received: FloatArray, discount: float) -> FloatArray:
    """Discounted sum of the rewards from each step on: (L,)."""
    result = np.zeros_like(received)
    following = 0.0
    for step in reversed(range(len(received))):
        following = float(received[step]) + discount * following
        result[step] = following
    return result


def value_range(returns: Sequence[FloatArray], margin: float) -> tuple[float, float]:
    """Lowest value and span of a critic (extension; the paper's sigmoid has the range 0 to 1).

    Rewards are signed and have a scale, so a bare sigmoid could not fit them.

    Args:
        returns: Returns of all steps of the training trajectories.
        margin: Margin on either side, as a share of the distance between the outer percentiles.

    Raises:
        ConfigurationError: All returns are equal.
    """
    low, high = (float(x) for x in np.percentile(np.concatenate(list(returns)), OUTER_PERCENTILES))
    width = high - low
    if not width > 0:
        raise ConfigurationError(f"all returns are {low:g}: there is nothing to learn from this record's feedback")
    return low - margin * width, (1.0 + 2.0 * margin) * width


def checked_numbers(record: FeedbackRecord, config: AgentConfig, numbers: IntArray) -> IntArray:
    """Returns the numbers of some trajectories after checking that the agent can be trained on them.

    Raises:
        ConfigurationError: There are no numbers or unknown ones, the record has other domains or fields than the agent,
            or a trajectory has no steps, more than the agent reads, or feedback that is not finite.
    """
    mixes, lengths = record.trajectories.mixes, record.trajectories.lengths
    if mixes.shape[-1] != config.num_domains or len(record.fields) != config.num_fields:
        raise ConfigurationError(
            f"the record has {mixes.shape[-1]} domains and {len(record.fields)} fields, the agent {config.num_domains} "
            f"and {config.num_fields}: use the agent that was trained on this record"
        )
    if not len(numbers) or numbers.min() < 0 or numbers.max() >= len(lengths):
        raise ConfigurationError(
            f"trajectories {numbers.tolist()[:6]} were asked for, of {len(lengths)} recorded: give numbers from 0 to "
            f"{len(lengths) - 1}"
        )
    chosen = lengths[numbers]
    if chosen.min() < 1 or chosen.max() > config.max_steps:
        raise ConfigurationError(
            f"trajectories have {chosen.min()} to {chosen.max()} steps, but the agent reads histories of 1 to "
            f"{config.max_steps}: leave out the others, or train an agent with a larger max_steps"
        )
    for number in numbers:
        if not np.isfinite(record.feedback[number, : lengths[number] + 1]).all():
            raise ConfigurationError(
                f"trajectory {number} has feedback that is not finite within its {lengths[number]} steps: its proxy "
                "diverged, or was not scored; leave it out"
            )
    return numbers
