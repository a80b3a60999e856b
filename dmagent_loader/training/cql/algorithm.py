"""Conservative Q-learning on the simplex as a d3rlpy algorithm (paper, C.4, Eq. 5-7).

What is d3rlpy's: episodes, replay buffer, the slicer that pads fragments on the left with masks and timesteps, the
training loop, loggers, optimizers and their wrapper, the Polyak update, configs that serialise.

What it cannot express, and so is ours:

- Its CQL extends SAC: Gaussians squashed into a box, proposals drawn uniformly from that box, and an entropy target
  that no distribution over 52 domains can reach. Here an action is a point of the simplex, the actor is the agent with
  its softmax, and proposals are Dirichlet.
- Its Q-learning algorithms see single transitions. The agent needs the whole history, so the parent is the base class
  of the transformer algorithms, which has no critics: those, their targets and the update are here.
- Its buffer draws from numpy's global generator, and seldom the steps at the end of an episode, where the return is
  decided; `FragmentBuffer` has a generator of its own and draws every step at least equally often.
- Its ``.d3`` files are pickles: nothing here is stored in them.

Shapes: B batch, T steps of the longest fragment, W the steps at its end that are trained on (W + 1 rows are looked at),
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
from dmagent_loader.training.cql.train import CQLConfig

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
    """A replay buffer of whole prefixes, drawn with a generator of its own.

    A fragment is a trajectory's beginning up to a step; its last `window` steps are trained on. Ends are drawn as if
    each trajectory went on for ``window - 1`` steps, so that the last step is trained on as often as any other.
    """

    def __init__(self, episodes: Sequence[Episode], num_domains: int, window: int, rng: np.random.Generator) -> None:
        super().__init__(
            InfiniteBuffer(),
            trajectory_slicer=BasicTrajectorySlicer(),
            episodes=episodes,
            # Left to itself d3rlpy takes a first trajectory of one-hot mixes for discrete actions.
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
    """d3rlpy's form of the settings, which its loggers write.

    Args:
        settings: See `CQLConfig`; `batch_size`, `gamma` and `context_size` are those of the parent.
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
    """Networks and optimizers of one training."""

    policy: MixingAgent
    critics: nn.ModuleList
    targets: nn.ModuleList
    policy_optim: OptimizerWrapper
    critic_optim: OptimizerWrapper


@dataclasses.dataclass(frozen=True)
class Fragments:
    """A batch without the columns in which every fragment is padding.

    Args:
        inputs: (B, T, D + K).
        valid: (B, T) bool.
        positions: (B, T) int64, absolute steps.
        actions: (B, W + 1, D) the mixes that followed, of the last rows; so are the rest.
        rewards: (B, W + 1).
        terminals: (B, W + 1), 1 at the last step of a trajectory.
        acted: (B, W + 1) bool, False on padding.
        judged: (B, W + 1) bool, True where what came after the action is in the fragment, or nothing came.
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
        """From d3rlpy's batch; `window` is W."""
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
            # d3rlpy counts from 1, and has 0 on padding.
            positions=(batch.timesteps[:, -length:] - 1).clamp(min=0),
            actions=batch.actions[:, -tail:],
            rewards=batch.rewards[:, -tail:, 0],
            terminals=terminals,
            acted=acted,
            judged=judged,
        )


class SimplexCQLImpl(TransformerAlgoImplBase):  # type: ignore[misc]
    """One update of critics and actor."""

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
        """Critics first, then the actor, then the targets; returns what is logged."""
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
        """(B, W + 1, D) the actor's mixes after the last rows."""
        logits = self._modules.policy.logits(data.inputs, data.valid, data.positions, tail=data.actions.shape[1])
        return logits.softmax(dim=-1)

    @torch.no_grad()
    def bellman(self, data: Fragments, mixes: Tensor) -> Tensor:
        """What the critics should say of the recorded actions: B^pi Q of Eq. 5 as a sigmoid, (B, W + 1) in [0, 1].

        Args:
            data: The fragments.
            mixes: (B, W + 1, D) the actor's proposals.
        """
        following = [_logits(target, data, mixes[:, :, None])[..., 0] for target in self._modules.targets]
        values = self._low + self._span * torch.stack(following).amin(dim=0).sigmoid()
        targets = bellman_targets(data.rewards, values, data.terminals, self._settings.discount, self._settings.trace)
        return ((targets - self._low) / self._span).clamp(0.0, 1.0)

    def _update_critics(self, data: Fragments, mixes: Tensor, grad_step: int) -> dict[str, float]:
        """Eq. 5 in units of the sigmoid, so that alpha does not depend on the scale of the rewards."""
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
        """Raises the least of the critics' logits; unlike their sigmoids, logits do not saturate."""
        settings, modules = self._settings, self._modules
        proposed = mixes.detach().requires_grad_()
        logits = torch.stack([_logits(critic, data, proposed[:, :, None]) for critic in modules.critics])
        objective = _mean(logits.amin(dim=0)[..., 0], data.acted)
        # Only the gradient with respect to the mixes is needed: the critics' weights get none.
        (uphill,) = torch.autograd.grad(objective, proposed)
        imitation = settings.bc_weight * _mean((mixes - data.actions).square().sum(dim=-1), data.acted)
        modules.policy_optim.zero_grad()
        (imitation - (uphill * mixes).sum()).backward()  # type: ignore[no-untyped-call]
        modules.policy_optim.step()
        return {"objective": float(objective.detach())}

    def _describe(self, data: Fragments, mixes: Tensor) -> dict[str, float]:
        """Where the actor's mixes lie, for an eye on collapse."""
        share = (mixes * self._is_target).sum(dim=-1)
        entropy = -torch.xlogy(mixes, mixes).sum(dim=-1)
        return {
            "target_share": float(_mean(share, data.acted)),
            "effective_domains": float(_mean(entropy.exp(), data.acted)),
        }


class SimplexCQL(TransformerAlgoBase):  # type: ignore[misc]
    """The algorithm: builds networks and optimizers; d3rlpy's `fit` trains them."""

    def inner_create_impl(self, observation_shape: Sequence[int], action_size: int) -> None:
        """Fresh networks; `train_cql` puts the warmed-up agent's weights into the actor."""
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
    """Keeps in memory what d3rlpy logs, one row for each `log_every` updates."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def before_write_metric(self, epoch: int, step: int) -> None:
        """Begins a row."""
        self.rows.append({"updates": float(step)})

    def write_metric(self, epoch: int, step: int, name: str, value: float) -> None:
        """Adds to the row."""
        self.rows[-1][name] = float(value)


class CurveLoggerFactory(LoggerAdapterFactory):  # type: ignore[misc]
    """Hands d3rlpy one logger that the caller can read afterwards."""

    def __init__(self) -> None:
        self.logger = CurveLogger()

    def create(self, algo: Any, experiment_name: str, n_steps_per_epoch: int) -> CurveLogger:
        """The logger."""
        return self.logger


def bellman_targets(rewards: Tensor, values: Tensor, terminals: Tensor, discount: float, trace: float) -> Tensor:
    """Targets of the recorded actions from the values of the states that followed.

    G_t = r_t + discount * ((1 - trace) V_{t+1} + trace * G_{t+1}); with trace 0 the one-step target of Eq. 5. A larger
    one (extension) carries the end of a run to its beginning in fewer updates, and leans on what the recorded
    trajectory did next instead of on what the actor would do.

    Args:
        rewards: (B, W + 1).
        values: (B, W + 1) of the state in each row, under the actor.
        terminals: (B, W + 1), 1 where the trajectory ends with the row's action.
        discount: gamma.
        trace: lambda.

    Returns:
        (B, W + 1); the last entry of a fragment that goes on is its value, no target.
    """
    following = torch.where(terminals[:, -1] > 0, rewards[:, -1], values[:, -1])
    targets = [following]
    for row in range(rewards.shape[1] - 2, -1, -1):
        following = rewards[:, row] + discount * ((1.0 - trace) * values[:, row + 1] + trace * following)
        targets.append(following)
    return torch.stack(targets[::-1], dim=1)


def draw_proposals(mixes: Tensor, count: int, sharpness: float) -> Tensor:
    """The actions a ~ mu that Eq. 5 holds down (extension): half Dir(1), half Dir(1 + sharpness * pi(s)).

    Every parameter is at least 1: the mode is exactly pi(s), and no weight collapses to 0. Uniform draws alone would
    leave out most of the simplex: over 52 domains their target share hardly leaves 0.5.

    Args:
        mixes: (B, W, D) the actor's proposals pi(s).
        count: N; with an odd number one more is drawn around pi(s).
        sharpness: k.

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
    """Mean over the rows that count; 0 if there are none."""
    return (values * where).sum() / where.sum().clamp(min=1)


def _norm(gradients: Sequence[Tensor]) -> float:
    return float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())


register_learnable(SimplexCQLConfig)
