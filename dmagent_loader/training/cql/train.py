"""Conservative Q-Learning of the agent on recorded trajectories of every quality (paper, C.4).

The actor is the agent after its supervised warm-up; the critics are trained from scratch beside it. `CQLConfig` states
the losses, `algorithm` runs them on d3rlpy. d3rlpy is imported when training starts, because the import loads gym and
changes settings of the whole process, which are restored afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from dmagent_loader.agent import MixingAgent
from dmagent_loader.agent.critic import CriticConfig, MixingCritic
from dmagent_loader.errors import require_extra
from dmagent_loader.mixture.simplex import IntArray
from dmagent_loader.training.cql.config import CQLConfig
from dmagent_loader.training.cql.rewards import (
    agent_states,
    checked_numbers,
    required_statistics,
    returns_to_go,
    rewards,
    value_range,
)
from dmagent_loader.training.record import FeedbackRecord


@dataclass(frozen=True, kw_only=True)
class CQLResult:
    """A trained agent, its critics and the course of the training.

    Args:
        agent: The trained agent, with the config and statistics of the initial one.
        critics: The critics; their config holds the range of values.
        curve: One row for each `log_every` updates, with means over them: ``updates``; ``bellman_error`` (root mean
            square), ``penalty`` (value of proposals minus value of recorded actions) and ``value_of_data``, in units of
            the standardised reward; ``gradient_ratio`` (conservative term over Bellman error); ``objective`` (the
            actor's logit, once the actor moves); ``target_share`` and ``effective_domains`` of the actor's mixes;
            d3rlpy's times in seconds.
        trajectories: Numbers of the trajectories that were trained on.
        seconds: Duration of the training.
    """

    agent: MixingAgent
    critics: tuple[MixingCritic, ...]
    curve: tuple[dict[str, float], ...]
    trajectories: IntArray
    seconds: float


def train_cql(
    record: FeedbackRecord,
    agent: MixingAgent,
    config: CQLConfig,
    *,
    trajectories: IntArray | None = None,
    progress: bool = True,
    on_update: Callable[[], object] | None = None,
) -> CQLResult:
    """Trains the agent further, to propose mixes that raise the feedback instead of imitating the experts.

    The same seed gives the same weights, bit for bit, on the same machine and with the same number of threads. The
    caller's agent and random generators are left unchanged.

    Args:
        record: Trajectories with feedback, good and bad.
        agent: The agent after the supervised warm-up, with feedback statistics.
        config: Settings.
        trajectories: Numbers of the trajectories to train on; None: all.
        progress: Whether to show a progress bar.
        on_update: Called after each update.

    Raises:
        ConfigurationError: The agent cannot be trained on the record, see `rewards.checked_numbers`.
        MissingExtraError: d3rlpy is not installed.
    """
    statistics = required_statistics(agent.config)
    everything = np.arange(len(record.trajectories.lengths), dtype=np.int64)
    numbers = checked_numbers(
        record, agent.config, everything if trajectories is None else np.asarray(trajectories, dtype=np.int64)
    )
    received = [rewards(record, int(number), statistics) for number in numbers]
    low, span = value_range([returns_to_go(r, config.discount) for r in received], config.range_margin)
    critic = CriticConfig.for_agent(agent.config, low=low, span=span)
    started = time.perf_counter()
    with _d3rlpy_contained(), torch.random.fork_rng(devices=[]):
        from d3rlpy.dataset import Episode

        from dmagent_loader.training.cql.algorithm import CurveLoggerFactory, FragmentBuffer, SimplexCQLConfig

        torch.manual_seed(config.seed)
        episodes = [
            Episode(
                observations=agent_states(record, int(number), agent.config).astype(np.float32),
                actions=record.trajectories.mixes[number, 1 : len(r) + 1].astype(np.float32),
                rewards=r[:, None].astype(np.float32),
                terminated=True,
            )
            for number, r in zip(numbers, received, strict=True)
        ]
        algorithm = SimplexCQLConfig(
            batch_size=config.batch_size,
            gamma=config.discount,
            context_size=max(len(r) for r in received),
            max_timestep=agent.config.max_steps,
            settings=config,
            agent=agent.config.to_dict(),
            critic=dataclasses.asdict(critic),
        ).create()
        algorithm.create_impl((agent.config.input_dim,), agent.config.num_domains)
        modules = algorithm.impl.modules
        modules.policy.load_state_dict(agent.state_dict())
        curve = CurveLoggerFactory()
        with tqdm(total=config.updates, desc="cql", unit="update", disable=not progress) as bar:

            def after_update(*_: object) -> None:
                bar.update()
                if on_update is not None:
                    on_update()

            algorithm.fit(
                FragmentBuffer(episodes, agent.config.num_domains, config.window, np.random.default_rng(config.seed)),
                n_steps=config.updates,
                n_steps_per_epoch=config.log_every,
                logger_adapter=curve,
                show_progress=False,
                callback=after_update,
            )
    trained = copy.deepcopy(agent)
    trained.load_state_dict(modules.policy.state_dict())
    return CQLResult(
        agent=trained.eval(),
        critics=tuple(modules.critics.eval()),
        curve=tuple(curve.logger.rows),
        trajectories=numbers,
        seconds=time.perf_counter() - started,
    )


@contextlib.contextmanager
def _d3rlpy_contained() -> Iterator[None]:
    """Imports d3rlpy and limits its effects on the whole process to the duration of the context.

    The import configures structlog, lowers the precision of matrix products on machines with CUDA, and loads gym, which
    prints a notice. Its replay buffer draws from numpy's global generator, and its training logs every setting.

    Raises:
        MissingExtraError: d3rlpy is not installed.
    """
    structlog = require_extra("structlog", "rl")
    before = structlog.get_config() if structlog.is_configured() else None
    precision = torch.get_float32_matmul_precision()
    with contextlib.redirect_stderr(io.StringIO()):
        require_extra("d3rlpy", "rl")
    torch.set_float32_matmul_precision(precision)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    numpy_state = np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        structlog.reset_defaults()
        if before is not None:
            structlog.configure(**before)
