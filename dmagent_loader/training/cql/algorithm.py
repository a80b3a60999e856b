"""Conservative Q-Learning on the simplex as a d3rlpy algorithm (paper, C.4, Eq. 5-7).

From d3rlpy: episodes, replay buffer, the slicer that pads fragments on the left with masks and timesteps, the training
loop, loggers, optimizers and their wrapper, the Polyak update, configs that serialise.

Written here, because d3rlpy cannot express it:

- d3rlpy's CQL extends SAC: Gaussians squashed into a box, proposals drawn uniformly from that box, and an entropy
  target that no distribution over 52 domains can reach. Here an action is a point of the simplex, the actor is the
  agent with its softmax, and proposals are Dirichlet.
- d3rlpy's Q-learning algorithms see single transitions. The agent needs the whole history, so the parent class is the
  base of the transformer algorithms. It has no critics: they, their targets and the update are defined here.
- d3rlpy's buffer draws from numpy's global generator and rarely reaches the end of an episode, where the return is
  decided. `FragmentBuffer` has its own generator and draws every step at least equally often.
- d3rlpy's ``.d3`` files are pickles. Nothing is stored in them.

Shapes: B batch, T steps of the longest fragment, W trained steps at its end (whose update reads W + 1 rows),
N candidates, D domains.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.agent.critic import CriticConfig, MixingCritic
from dmagent_loader.errors import require_extra
from dmagent_loader.mixture.domains import TARGET
from dmagent_loader.training.cql.config import CQLConfig

require_extra("d3rlpy", "rl")

from d3rlpy.algos import (  # noqa: E402
    TorchTransformerInput,
    TransformerAlgoBase,
    TransformerAlgoImplBase,
    TransformerConfig,
)
from d3rlpy.base import DeviceArg, register_learnable  # noqa: E402
from d3rlpy.constants import ActionSpace  # noqa: E402
from d3rlpy.dataset import (  # noqa: E402
    BasicTrajectorySlicer,
    Episode,
    InfiniteBuffer,
    PartialTrajectory,
    ReplayBuffer,
)
from d3rlpy.logging import LoggerAdapter, LoggerAdapterFactory  # noqa: E402
from d3rlpy.optimizers import AdamFactory, OptimizerWrapper  # noqa: E402
from d3rlpy.torch_utility import Modules, TorchTrajectoryMiniBatch, soft_sync  # noqa: E402


class FragmentBuffer(ReplayBuffer):  # type: ignore[misc]
    """A replay buffer of whole prefixes with its own random generator.

    A fragment is the beginning of a trajectory up to some step; its last `window` steps are trained on. The end is
    drawn as if each trajectory had ``window - 1`` more steps, so that the last step is trained on as often as the
    others.

    Args:
        episodes: One for each trajectory.
        num_domains: D.
        window: W.
        rng: Source of the fragments.
    """

    def __init__(self, episodes: Sequence[Episode], num_domains: int, window: int, rng: np.random.Generator) -> None:
        super().__init__(
            InfiniteBuffer(),
            trajectory_slicer=BasicTrajectorySlicer(),
            episodes=episodes,
            # Given explicitly, because d3rlpy would infer discrete actions from a first trajectory of one-hot mixes.
            action_space=ActionSpace.CONTINUOUS,
            action_size=num_domains,
        )
        self._ends = np.cumsum([len(episode) + window - 1 for episode in episodes])
        self._rng = rng

    def sample_trajectory(self, length: int) -> PartialTrajectory:
        """A fragment of at most `length` steps, padded on the left."""
        drawn = int(self._rng.integers(self._ends[-1]))
        number = int(np.searchsorted(self._ends, drawn, side="right"))
        episode = self.episodes[number]
        end = drawn - (int(self._ends[number - 1]) if number else 0)
        return self.trajectory_slicer(episode, min(end, len(episode) - 1), length)


@dataclasses.dataclass()
class SimplexCQLConfig(TransformerConfig):  # type: ignore[misc]
    """The settings in the form that d3rlpy needs and its loggers write.

    Args:
        settings: Settings of the training; d3rlpy reads `batch_size`, `gamma` and `context_size` of the parent class.
        agent: `AgentConfig.to_dict` of the actor.
        critic: `dataclasses.asdict` of the critics' `CriticConfig`.
    """

    settings: CQLConfig = dataclasses.field(default_factory=CQLConfig)
    agent: dict[str, Any] = dataclasses.field(default_factory=dict)
    critic: dict[str, Any] = dataclasses.field(default_factory=dict)

    def create(self, device: DeviceArg = False, enable_ddp: bool = False) -> SimplexCQL:
        """The algorithm, without networks."""
        return SimplexCQL(self, device, enable_ddp)

    @staticmethod
    def get_type() -> str:
        """Name in d3rlpy's registry."""
        return "dmagent_simplex_cql"


@dataclasses.dataclass(frozen=True)
class SimplexCQLModules(Modules):  # type: ignore[misc]
    """Networks and optimizers of a training."""

    policy: MixingAgent
    critics: nn.ModuleList
    targets: nn.ModuleList
    policy_optim: OptimizerWrapper
    critic_optim: OptimizerWrapper


@dataclasses.dataclass(frozen=True)
class Fragments:
    """A batch, cut to the columns in which some fragment is not padding.

    Args:
        inputs: (B, T, D + K), mix and standardised feedback of each step.
        valid: (B, T) bool, False on padding.
        positions: (B, T) int64, absolute steps.
        actions: (B, W + 1, D), recorded next mixes of the last W + 1 rows. The entries below are of these rows, too.
        rewards: (B, W + 1).
        terminals: (B, W + 1), 1 at the last step of a trajectory.
        acted: (B, W + 1) bool, False on padding.
        judged: (B, W + 1) bool, True if the fragment contains the state after the action, or the trajectory ends there.
    """

    inputs: Tensor
    valid: Tensor
    positions: Tensor
    actions: Tensor
    rewards: Tensor
    terminals: Tensor
    acted: Tensor
    judged: Tensor

    @classmethod
    def of(cls, batch: TorchTrajectoryMiniBatch, window: int) -> Fragments:
        """Converts a batch of d3rlpy; `window` is W."""
        valid = batch.masks > 0
        length = int(valid.sum(dim=1).max())
        tail = min(window + 1, length)
        valid = valid[:, -length:]
        acted, terminals = valid[:, -tail:], batch.terminals[:, -tail:, 0]
        judged = acted.clone()
        judged[:, -1] &= terminals[:, -1] > 0
        return cls(
            inputs=batch.observations[:, -length:],
            valid=valid,
            # d3rlpy counts steps from 1 and writes 0 on padding.
            positions=(batch.timesteps[:, -length:] - 1).clamp(min=0),
            actions=batch.actions[:, -tail:],
            rewards=batch.rewards[:, -tail:, 0],
            terminals=terminals,
            acted=acted,
            judged=judged,
        )


class SimplexCQLImpl(TransformerAlgoImplBase):  # type: ignore[misc]
    """The update of critics and actor."""

    _modules: SimplexCQLModules

    def __init__(
        self,
        observation_shape: Sequence[int],
        action_size: int,
        modules: SimplexCQLModules,
        settings: CQLConfig,
        value_range: CriticConfig,
    ) -> None:
        super().__init__(observation_shape, action_size, modules, "cpu:0")
        self._settings = settings
        self._low, self._span = value_range.low, value_range.span
        self._is_target = torch.tensor([float(name.startswith(f"{TARGET}/")) for name in modules.policy.config.domains])

    def inner_predict(self, inpt: TorchTransformerInput) -> Tensor:
        """(D,) the mix that the actor proposes after the last row."""
        positions = (inpt.timesteps - 1).clamp(min=0)
        logits = self._modules.policy.logits(inpt.observations, inpt.masks > 0, positions, tail=1)
        return logits[0, -1].softmax(dim=-1)

    def inner_update(self, batch: TorchTrajectoryMiniBatch, grad_step: int) -> dict[str, float]:
        """Updates the critics, the actor and the target networks, in this order; returns the logged metrics."""
        data = Fragments.of(batch, self._settings.window)
        acting = grad_step >= self._settings.warmup_updates
        # One pass of the actor serves the Bellman targets, the proposals and its own update.
        with torch.set_grad_enabled(acting):
            mixes = self.propose(data)
        metrics = self._describe(data, mixes.detach()) | self._update_critics(data, mixes.detach(), grad_step)
        if acting:
            metrics |= self._update_actor(data, mixes)
        soft_sync(self._modules.targets, self._modules.critics, self._settings.polyak)
        return metrics

    def propose(self, data: Fragments) -> Tensor:
        """The actor's mixes after the last rows: (B, W + 1, D)."""
        logits = self._modules.policy.logits(data.inputs, data.valid, data.positions, tail=data.actions.shape[1])
        return logits.softmax(dim=-1)

    @torch.no_grad()
    def bellman(self, data: Fragments, mixes: Tensor) -> Tensor:
        """Targets for the recorded actions, B^pi Q of Eq. 5 on the sigmoid's scale: (B, W + 1) in [0, 1].

        Args:
            data: The fragments.
            mixes: (B, W + 1, D) the actor's proposals.
        """
        following = [_logits(target, data, mixes[:, :, None])[..., 0] for target in self._modules.targets]
        values = self._low + self._span * torch.stack(following).amin(dim=0).sigmoid()
        targets = bellman_targets(data.rewards, values, data.terminals, self._settings.discount, self._settings.trace)
        return ((targets - self._low) / self._span).clamp(0.0, 1.0)

    def _update_critics(self, data: Fragments, mixes: Tensor, grad_step: int) -> dict[str, float]:
        """Takes a step on Eq. 5 in units of the sigmoid, so that alpha does not depend on the scale of the rewards."""
        settings, modules = self._settings, self._modules
        targets = self.bellman(data, mixes)
        proposals = draw_proposals(mixes, settings.num_proposals, settings.proposal_sharpness)
        candidates = torch.cat([data.actions[:, :, None], proposals], dim=2)
        errors, penalties, recorded = [], [], []
        for critic in modules.critics:
            values = _logits(critic, data, candidates).sigmoid()
            errors.append(0.5 * _mean((values[..., 0] - targets).square(), data.judged))
            penalties.append(_mean(values[..., 1:].mean(dim=-1) - values[..., 0], data.acted))
            recorded.append(_mean(values[..., 0].detach(), data.judged))
        error, penalty = torch.stack(errors).sum(), settings.alpha * torch.stack(penalties).sum()
        metrics = {
            "bellman_error": self._span * math.sqrt(2 * float(error.detach()) / len(errors)),
            "penalty": self._span * float(torch.stack(penalties).detach().mean()),
            "value_of_data": self._low + self._span * float(torch.stack(recorded).mean()),
        }
        if grad_step % settings.log_every == 0:
            weights = list(modules.critics.parameters())
            pull, fit = (_norm(torch.autograd.grad(x, weights, retain_graph=True)) for x in (penalty, error))
            metrics["gradient_ratio"] = pull / max(fit, 1e-12)
        modules.critic_optim.zero_grad()
        (error + penalty).backward()  # type: ignore[no-untyped-call]
        modules.critic_optim.step()
        return metrics

    def _update_actor(self, data: Fragments, mixes: Tensor) -> dict[str, float]:
        """Takes a step up the lowest of the critics' logits, which do not saturate as their sigmoids do."""
        settings, modules = self._settings, self._modules
        proposed = mixes.detach().requires_grad_()
        logits = torch.stack([_logits(critic, data, proposed[:, :, None]) for critic in modules.critics])
        objective = _mean(logits.amin(dim=0)[..., 0], data.acted)
        # The gradient with respect to the mixes is enough; the critics' weights need none.
        (uphill,) = torch.autograd.grad(objective, proposed)
        imitation = settings.bc_weight * _mean((mixes - data.actions).square().sum(dim=-1), data.acted)
        modules.policy_optim.zero_grad()
        (imitation - (uphill * mixes).sum()).backward()  # type: ignore[no-untyped-call]
        modules.policy_optim.step()
        return {"objective": float(objective.detach())}

    def _describe(self, data: Fragments, mixes: Tensor) -> dict[str, float]:
        """Metrics of the actor's mixes that reveal a collapse."""
        share = (mixes * self._is_target).sum(dim=-1)
        entropy = -torch.xlogy(mixes, mixes).sum(dim=-1)
        return {
            "target_share": float(_mean(share, data.acted)),
            "effective_domains": float(_mean(entropy.exp(), data.acted)),
        }


class SimplexCQL(TransformerAlgoBase):  # type: ignore[misc]
    """The algorithm: builds networks and optimizers; d3rlpy's `fit` trains them."""

    def inner_create_impl(self, observation_shape: Sequence[int], action_size: int) -> None:
        """Creates networks with random weights; `train_cql` then loads the warmed-up agent into the actor."""
        settings = self._config.settings
        policy = MixingAgent(AgentConfig.from_dict(self._config.agent))
        critic = CriticConfig.from_dict(self._config.critic)
        critics = nn.ModuleList(MixingCritic(critic) for _ in range(settings.num_critics))
        modules = SimplexCQLModules(
            policy=policy,
            critics=critics,
            targets=copy.deepcopy(critics).requires_grad_(False),
            policy_optim=AdamFactory().create(policy.named_modules(), settings.actor_learning_rate, compiled=False),
            critic_optim=AdamFactory().create(critics.named_modules(), settings.critic_learning_rate, compiled=False),
        )
        self._impl = SimplexCQLImpl(observation_shape, action_size, modules, settings, critic)

    def get_action_type(self) -> ActionSpace:
        """Mixes are continuous."""
        return ActionSpace.CONTINUOUS


class CurveLogger(LoggerAdapter):  # type: ignore[misc]
    """Keeps the metrics that d3rlpy logs in memory, one row for each `log_every` updates."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def before_write_metric(self, epoch: int, step: int) -> None:
        """Starts a row."""
        self.rows.append({"updates": float(step)})

    def write_metric(self, epoch: int, step: int, name: str, value: float) -> None:
        """Adds a metric to the row."""
        self.rows[-1][name] = float(value)


class CurveLoggerFactory(LoggerAdapterFactory):  # type: ignore[misc]
    """Gives d3rlpy a logger that the caller can read afterwards."""

    def __init__(self) -> None:
        self.logger = CurveLogger()

    def create(self, algo: Any, experiment_name: str, n_steps_per_epoch: int) -> CurveLogger:
        """The logger."""
        return self.logger


def bellman_targets(rewards: Tensor, values: Tensor, terminals: Tensor, discount: float, trace: float) -> Tensor:
    """Targets of the recorded actions from the values of the states that followed.

    G_t = r_t + discount * ((1 - trace) V_{t+1} + trace * G_{t+1}); a trace of 0 gives the one-step target of Eq. 5. A
    larger trace (extension) propagates the end of a run to its beginning in fewer updates, but relies on the recorded
    next actions instead of the actor's.

    Args:
        rewards: (B, W + 1).
        values: (B, W + 1), value of the state in each row under the actor.
        terminals: (B, W + 1), 1 where the trajectory ends with the row's action.
        discount: gamma.
        trace: lambda.

    Returns:
        (B, W + 1). The last entry of a fragment that does not end the trajectory is its value, not a target.
    """
    following = torch.where(terminals[:, -1] > 0, rewards[:, -1], values[:, -1])
    targets = [following]
    for row in range(rewards.shape[1] - 2, -1, -1):
        following = rewards[:, row] + discount * ((1.0 - trace) * values[:, row + 1] + trace * following)
        targets.append(following)
    return torch.stack(targets[::-1], dim=1)


def draw_proposals(mixes: Tensor, count: int, sharpness: float) -> Tensor:
    """Draws the actions a ~ mu whose values Eq. 5 lowers (extension): half Dir(1), half Dir(1 + sharpness * pi(s)).

    Every parameter is at least 1, so the mode is exactly pi(s) and no weight collapses to 0. Uniform draws alone would
    miss most of the simplex: over 52 domains their target share stays near 0.5.

    Args:
        mixes: (B, W, D), the actor's proposals pi(s).
        count: N; if it is odd, the additional action is drawn around pi(s).
        sharpness: Concentration around pi(s).

    Returns:
        (B, W, N, D), drawn with the global torch generator.
    """
    around = mixes[:, :, None].expand(-1, -1, count, -1)
    sharp = torch.full((count, 1), sharpness, dtype=mixes.dtype)
    sharp[: count // 2] = 0.0
    drawn: Tensor = torch._sample_dirichlet(1.0 + sharp * around)
    return drawn


def _logits(critic: Callable[..., Tensor], data: Fragments, candidates: Tensor) -> Tensor:
    return critic(data.inputs, candidates, data.valid, data.positions)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean over the rows where `where` is True; 0 if there are none."""
    return (values * where).sum() / where.sum().clamp(min=1)


def _norm(gradients: Sequence[Tensor]) -> float:
    return float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())


register_learnable(SimplexCQLConfig)
