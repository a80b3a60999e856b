"""Offline reinforcement learning on recorded runs, in the state of `dmagent-plus`, with the algorithms of d3rlpy.

Actions are three numbers around the influence policy's mix p with the natural shares n, so that the algorithms can be
used as they are:

    log odds of the target share - log odds of p's target share, in [-3, 3]
    alpha_f in [-2, 1] for source and target: weights inside a field proportional to p (p / n)^alpha_f (-1: natural)

A state is the run's token and, for each of the two fields, the mean of its domain tokens weighted by p. Feedback is
averaged over weights, so an action shows in it only later: transitions span several steps
(`d3rlpy.dataset.MultiStepTransitionPicker`). Rewards are changes of the balanced gain as a share of the attainable
range; every run is relabelled with several balances.

Shapes: B batch, T steps, D domains, K = 2 fields (keep, acquire).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmagent_loader.agent.plus.network import corrected
from dmagent_loader.agent.plus.observation import Facts, Memory, Moment, horizon_of, of_fields, tokens
from dmagent_loader.errors import ConfigurationError, require_extra
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.plus.surrogate import Decide

LOW, HIGH = np.array([-3.0, -2.0, -2.0]), np.array([3.0, 1.0, 1.0])
"""Bounds of the actions."""
BALANCES = (0.25, 0.5, 0.75)
"""Balances that every recorded run is labelled with."""
ALGORITHMS = ("CQL", "IQL", "TD3PlusBC", "ReBRAC", "AWAC")


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """A run of a real proxy with source and target domains.

    Args:
        facts: Of the run, without batch dimension.
        mixes: (T, D).
        feedback: (T, K), after each step, against the base model, in nats.
        attainable: (K,), attainable range.
        passes: (D,), passes over a domain if the whole run were trained on it; 0 if unknown.
    """

    facts: Facts
    mixes: FloatArray
    feedback: FloatArray
    attainable: FloatArray
    passes: FloatArray


def states(facts: Facts, moment: Moment) -> FloatArray:
    """States of the module docstring: (..., features)."""
    domain_tokens, run_token = tokens(facts, moment)
    mass = of_fields(facts.fields, facts.prior)
    means = facts.fields @ (facts.prior[..., None] * domain_tokens) / np.maximum(mass, 1e-9)[..., None]
    return np.concatenate([run_token, means.reshape(*means.shape[:-2], -1)], axis=-1)


def actions_of(facts: Facts, mixes: FloatArray) -> FloatArray:
    """The actions nearest to recorded mixes, by least squares of log weights inside each field: (T, D) -> (T, 3)."""
    found = np.zeros((len(mixes), 3))
    target = facts.fields[1] > 0
    share = np.clip(mixes[:, target].sum(axis=1), 0.01, 0.99)
    own = float(facts.prior[target].sum())
    found[:, 0] = np.log(share / (1 - share)) - np.log(own / (1 - own))
    for f in (0, 1):
        members = (facts.fields[f] > 0) & (facts.natural > 0) & (facts.prior > 0)
        weights = facts.natural[members] / facts.natural[members].sum()
        tilt = np.log(facts.prior[members] / facts.natural[members])
        moved = np.log(np.maximum(mixes[:, members], 1e-5) / facts.natural[members])
        tilt, moved = tilt - weights @ tilt, moved - (moved @ weights)[:, None]
        spread = float(weights @ tilt**2)
        found[:, 1 + f] = (moved @ (weights * tilt)) / spread - 1 if spread > 1e-9 else 0.0
    return np.clip(found, LOW, HIGH)


def acted(facts: Facts, actions: FloatArray) -> FloatArray:
    """Mixes of actions: (..., D)."""
    has_weight = (facts.prior > 0) & (facts.natural > 0)
    tilt = np.log(np.where(has_weight, facts.prior, 1.0) / np.where(has_weight, facts.natural, 1.0))
    alpha = (actions[..., None, 1:] @ facts.fields)[..., 0, :]
    return corrected(facts, alpha * tilt, facts.acquires * actions[..., :1])


def moments(run: RecordedRun, balance: float) -> list[Moment]:
    """What a policy would have known before each step."""
    total = len(run.mixes)
    used = np.vstack([np.zeros(len(run.passes)), np.cumsum(run.mixes * run.passes / total, axis=0)])
    found = []
    for step in range(total):
        memory = Memory.of(run.mixes[:step], run.feedback[:step], horizon_of(total))
        found.append(
            Moment(
                exposure=memory.exposure,
                gains=memory.gains(),
                progress=np.array(step / total),
                progress_known=np.ones(()),
                age=np.array(step / total),
                passes=used[step],
                final_passes=run.passes * run.facts.prior,
                rows_left=np.ones(len(run.passes)),
                learning_rate=np.ones(()),
                learning_rate_known=np.zeros(()),
                balance=np.array(balance),
            )
        )
    return found


def episodes(runs: Sequence[RecordedRun]) -> list[dict[str, FloatArray]]:
    """States, actions and rewards of all runs and balances."""
    found = []
    for run in runs:
        actions = actions_of(run.facts, run.mixes)
        changes = np.diff(run.feedback, axis=0, prepend=0.0) / run.attainable
        for balance in BALANCES:
            seen = np.stack([states(run.facts, moment) for moment in moments(run, balance)])
            reward = (1 - balance) * changes[:, 0] + balance * changes[:, 1]
            found.append({"observations": seen, "actions": actions, "rewards": reward[:, None]})
    return found


def train_offline(
    name: str, runs: Sequence[Mapping[str, FloatArray]], *, updates: int, seed: int, span: int = 8
) -> Decide:
    """Trains one of `ALGORITHMS` on episodes.

    Args:
        name: Name of the algorithm in d3rlpy.
        runs: Return value of `episodes`.
        updates: Gradient steps.
        seed: Seed.
        span: Steps that a transition spans.

    Raises:
        ConfigurationError: The name is not one of `ALGORITHMS`.
        MissingExtraError: d3rlpy is not installed.
    """
    if name not in ALGORITHMS:
        raise ConfigurationError(f"there is no offline algorithm {name!r} here: choose one of {', '.join(ALGORITHMS)}")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        d3rlpy = require_extra("d3rlpy", "rl")
        d3rlpy.seed(seed)
        encoder = d3rlpy.models.VectorEncoderFactory([64, 64])
        settings: dict[str, Any] = {
            "gamma": 0.99,
            "batch_size": 128,
            "actor_encoder_factory": encoder,
            "critic_encoder_factory": encoder,
            "action_scaler": d3rlpy.preprocessing.MinMaxActionScaler(minimum=LOW, maximum=HIGH),
        }
        algorithm = getattr(d3rlpy.algos, f"{name}Config")(**settings).create(device=False)
        parts = [
            d3rlpy.dataset.Episode(
                observations=run["observations"].astype(np.float32),
                actions=run["actions"].astype(np.float32),
                rewards=run["rewards"].astype(np.float32),
                terminated=True,
            )
            for run in runs
        ]
        buffer = d3rlpy.dataset.ReplayBuffer(
            d3rlpy.dataset.InfiniteBuffer(),
            episodes=parts,
            transition_picker=d3rlpy.dataset.MultiStepTransitionPicker(n_steps=span, gamma=settings["gamma"]),
        )
        algorithm.fit(
            buffer,
            n_steps=updates,
            n_steps_per_epoch=updates,
            logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
            show_progress=False,
        )
    return decided_by(algorithm.predict)


def decided_by(predict: Callable[[FloatArray], FloatArray]) -> Decide:
    """A policy on batches of tasks, from a function from states to actions."""

    def decide(facts: Facts, moment: Moment) -> FloatArray:
        actions = np.clip(predict(states(facts, moment).astype(np.float32)), LOW, HIGH)
        return acted(facts, actions.astype(facts.prior.dtype))

    return decide
