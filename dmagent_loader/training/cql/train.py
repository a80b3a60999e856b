"""Conservative Q-learning of the agent on recorded trajectories of every quality (paper, C.4, Eq. 5-7).

The actor is the agent after its supervised warm-up; two critics are trained from scratch beside it. The paper says
what is minimised (Eq. 5), what is rewarded (Eq. 6) and what a critic looks like (Eq. 7). It gives no discount, alpha,
learning rate, number of proposals or value range: those are ours, and each says so.

d3rlpy trains; `pipeline.simplex_cql` says what it cannot express. It is imported when training starts, because it
brings gym and changes global settings, which are put back.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from dmagent_loader.agent import MixingAgent
from dmagent_loader.agent.critic import CriticConfig, MixingCritic
from dmagent_loader.errors import ConfigurationError, require_extra
from dmagent_loader.mixture.simplex import IntArray
from dmagent_loader.training.cql import rewards as process
from dmagent_loader.training.record import FeedbackRecord


@dataclass(frozen=True, kw_only=True)
class CQLConfig:
    """Settings of the training; none of the figures is in the paper.

    Args:
        updates: Of the critics; a multiple of `log_every`.
        warmup_updates: The actor rests for so many updates, until the critics know more than their random weights
            (extension).
        batch_size: Fragments of an update.
        window: Steps of a fragment that are trained on; the state is always the whole prefix before them.
        discount: gamma.
        trace: lambda of the Bellman targets: 0 is Eq. 5, see `simplex_cql.bellman_targets`.
        alpha: Weight of the conservative term of Eq. 5, in units of the critic's sigmoid, whatever the rewards' scale.
            Calibrate it: in a made-up world (``tests/integration/test_cql.py``, mean of 3 seeds, 400 updates) the gain
            is 1.36 with 0.001, 0.72 with 0.005 and 0.19 with 0.02.
        num_proposals: Actions drawn from mu for each state.
        proposal_sharpness: k of the proposals around the actor's mix, see `simplex_cql.draw_proposals`.
        num_critics: 2 takes the lower of twins (extension); 1 is the paper's.
        bc_weight: Of the squared distance to the recorded next mix in the actor's loss (extension).
        polyak: Share of the critics that the target networks take over at each update.
        actor_learning_rate: Of Adam.
        critic_learning_rate: Of Adam.
        range_margin: Widens the range of values, see `rewards.value_range`.
        log_every: Updates of a row of the curve.
        seed: Of critics, fragments and proposals.

    Raises:
        ConfigurationError: A value that cannot work.
    """

    updates: int = 1200
    warmup_updates: int = 200
    batch_size: int = 8
    window: int = 16
    discount: float = 0.99
    trace: float = 0.0
    alpha: float = 0.001
    num_proposals: int = 2
    proposal_sharpness: float = 200.0
    num_critics: int = 2
    bc_weight: float = 0.0
    polyak: float = 0.005
    actor_learning_rate: float = 1e-4
    critic_learning_rate: float = 3e-4
    range_margin: float = 0.25
    log_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("updates", "batch_size", "window", "num_proposals", "num_critics", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("discount", "trace", "polyak"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        for name in ("alpha", "proposal_sharpness", "bc_weight", "range_margin", "warmup_updates"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("actor_learning_rate", "critic_learning_rate"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be more than 0")
        if self.updates % self.log_every:
            raise ConfigurationError(
                f"{self.updates} updates are no multiple of log_every {self.log_every}: the last ones would be left "
                "out; choose numbers that fit"
            )
        if self.warmup_updates >= self.updates:
            raise ConfigurationError(
                f"warmup_updates {self.warmup_updates} leaves nothing of {self.updates} updates for the actor: lower it"
            )


@dataclass(frozen=True, kw_only=True)
class CQLResult:
    """A trained agent, its critics, and what was measured.

    Args:
        agent: With the config and statistics of the one that training began with.
        critics: Their config holds the range of values.
        curve: One row for each `log_every` updates, means over them: ``updates``; ``bellman_error`` (root mean square)
            and ``penalty`` (value of proposals less value of recorded actions), ``value_of_data``, all in units of the
            standardised reward; ``gradient_ratio`` (conservative term over Bellman error); ``objective`` (the actor's
            logit, once it moves); ``target_share`` and ``effective_domains`` of the actor's mixes; d3rlpy's times in
            seconds.
        trajectories: Numbers of those trained on.
        seconds: Time of the training.
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
    """Trains the agent further, to propose what raises feedback instead of what the expert set did.

    The same seed gives the same weights, bit for bit, on the same machine and with the same number of threads. The
    caller's random generators, and the agent that is passed, are left as they were.

    Args:
        record: Trajectories with feedback, good and bad.
        agent: After the supervised warm-up, with feedback statistics.
        config: Settings.
        trajectories: Numbers of those to train on; None: all.
        progress: Whether to show a progress bar.
        on_update: Called after each update.

    Raises:
        ConfigurationError: A record that the agent cannot be trained on, see `rewards.usable`.
        MissingExtraError: d3rlpy is not installed.
    """
    statistics = process.required_statistics(agent.config)
    everything = np.arange(len(record.trajectories.lengths), dtype=np.int64)
    numbers = process.usable(
        record, agent.config, everything if trajectories is None else np.asarray(trajectories, dtype=np.int64)
    )
    received = [process.rewards(record, int(number), statistics) for number in numbers]
    low, span = process.value_range([process.returns_to_go(r, config.discount) for r in received], config.range_margin)
    critic = CriticConfig.for_agent(agent.config, low=low, span=span)
    started = time.perf_counter()
    with _d3rlpy_contained(), torch.random.fork_rng(devices=[]):
        from d3rlpy.dataset import Episode

        from dmagent_loader.training.cql import algorithm as simplex_cql

        torch.manual_seed(config.seed)
        episodes = [
            Episode(
                observations=process.agent_states(record, int(number), agent.config).astype(np.float32),
                actions=record.trajectories.mixes[number, 1 : len(r) + 1].astype(np.float32),
                rewards=r[:, None].astype(np.float32),
                terminated=True,
            )
            for number, r in zip(numbers, received, strict=True)
        ]
        algorithm = simplex_cql.SimplexCQLConfig(
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
        curve = simplex_cql.CurveLoggerFactory()
        with tqdm(total=config.updates, desc="cql", unit="update", disable=not progress) as bar:

            def after_update(*_: object) -> None:
                bar.update()
                if on_update is not None:
                    on_update()

            algorithm.fit(
                simplex_cql.FragmentBuffer(
                    episodes, agent.config.num_domains, config.window, np.random.default_rng(config.seed)
                ),
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
    """Imports d3rlpy, and keeps what it does to the whole process to the time that it is needed.

    On import it sets up structlog, lowers the precision of matrix products on machines with CUDA, and brings gym, which
    prints a notice; a replay buffer draws from numpy's global generator; in training it logs every setting.

    Raises:
        MissingExtraError: It is not installed.
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
