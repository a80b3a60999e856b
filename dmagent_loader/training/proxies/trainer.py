"""Training of stacked proxies: AdamW, a moving average of the weights, and a state that can be saved and restored.

No operation mixes two proxies and the optimiser is elementwise, so each proxy is trained as if it were alone, to float
tolerance.

Shapes: P proxies, R rows of a step, T tokens of a row.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.training.proxies.model import ProxyConfig, StackedProxies

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""The state that AdamW keeps for each parameter, besides its step count."""


class ProxyTrainer:
    """Trains P stacked proxies, each on its own rows.

    Attributes:
        model: The proxies.
        averaged: Proxies with the moving average of the weights; `model` itself if `ProxyConfig.averaging` is 0.
        device: Device of both.
        updates: Number of updates so far.

    Args:
        num_proxies: P.
        config: Size and optimiser of each proxy.
        start: Initial weights, (P, ...) each; None: drawn from the seed.
        device: ``"cpu"``, ``"cuda"`` and so on. On CUDA, matrix products are computed in bfloat16.
        schedule: Function from the number of updates done to the learning rate as a part of `config.learning_rate`,
            multiplied by the warm-up; None: constant.
    """

    def __init__(
        self,
        num_proxies: int,
        config: ProxyConfig,
        *,
        start: Mapping[str, Tensor] | None = None,
        device: str | torch.device = "cpu",
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        self.config = config
        self._schedule = schedule or (lambda _: 1.0)
        self.device = torch.device(device)
        self.model = StackedProxies(num_proxies, config).to(self.device)
        if start is not None:
            self.model.load_state_dict(dict(start))
        self.averaged = copy.deepcopy(self.model) if config.averaging else self.model
        self.updates = 0
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.95),
            fused=True,
        )

    def train(self, rows: Tensor) -> Tensor:
        """Trains on the rows of one step, in updates of `rows_per_update` rows.

        Args:
            rows: (P, R, T + 1) int64; R must be a multiple of `rows_per_update`.

        Returns:
            (P,) mean loss of each proxy in nats per token.

        Raises:
            ConfigurationError: The rows do not divide into updates.
        """
        if rows.shape[1] % self.config.rows_per_update:
            raise ConfigurationError(
                f"a step of {rows.shape[1]} rows does not divide into updates of {self.config.rows_per_update} rows: "
                "choose tokens_per_step as a multiple of row_tokens * rows_per_update"
            )
        mean = torch.zeros(self.model.num_proxies, device=self.device)
        batches = torch.split(rows.to(self.device), self.config.rows_per_update, dim=1)
        for batch in batches:
            factor = self._schedule(self.updates)
            self.updates += 1
            warmup = min(1.0, self.updates / self.config.warmup_updates)
            for group in self._optimizer.param_groups:
                group["lr"] = self.config.learning_rate * warmup * factor
            self._optimizer.zero_grad()
            with mixed_precision(self.device):
                losses = self.model.losses(batch)
            # The sum and not the mean: the gradient of a proxy must not depend on the number of proxies.
            torch.autograd.backward(losses.sum())
            self._optimizer.step()
            mean += losses.detach() / len(batches)
            self._average()
        return mean.cpu()

    @torch.no_grad()
    def _average(self) -> None:
        if self.averaged is self.model:
            return
        # The first averages weigh all updates equally; otherwise the initial weights would dominate them.
        share = max(1 - self.config.averaging, 1 / (self.updates + 1))
        averages: list[Tensor] = list(self.averaged.parameters())
        torch._foreach_lerp_(averages, list(self.model.parameters()), share)

    def keep(self, positions: Sequence[int]) -> None:
        """Drops all proxies except those at some positions, which continue in the given order."""
        if list(positions) == list(range(self.model.num_proxies)):
            return
        index = torch.tensor(list(positions), device=self.device)
        for parameter in self.model.parameters():
            state = self._optimizer.state[parameter]
            for name in _MOMENTS:
                if name in state:
                    state[name] = state[name][index]
            parameter.grad = None
        for model in {id(self.model): self.model, id(self.averaged): self.averaged}.values():
            for parameter in model.parameters():
                parameter.data = parameter.data[index]
            model.num_proxies = len(index)

    def state(self) -> dict[str, Tensor]:
        """Weights, averages, moments and update count: flat name -> tensor on the CPU."""
        result = {"updates": torch.tensor(self.updates)}
        for name, parameter in self.model.named_parameters():
            result[name] = parameter.detach()
            for moment in _MOMENTS:
                if moment in self._optimizer.state[parameter]:
                    result[f"{name}.{moment}"] = self._optimizer.state[parameter][moment]
        if self.averaged is not self.model:
            result |= {f"{name}.average": parameter.detach() for name, parameter in self.averaged.named_parameters()}
        return {name: tensor.cpu() for name, tensor in result.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores the result of `state`, including its number of proxies.

        Raises:
            StateError: The saved proxies have another size, or only one of the two averages its weights.
        """
        expected = {name: tuple(parameter.shape[1:]) for name, parameter in self.model.named_parameters()}
        found = {name: tuple(state[name].shape[1:]) for name in expected if name in state}
        averaged = self.averaged is not self.model
        if expected != found or averaged != ("embedding.average" in state):
            raise StateError(
                "the saved proxies have another size or averaging: continue with the settings they were started with"
            )
        self.updates = int(state["updates"])
        for name, parameter in self.model.named_parameters():
            parameter.data = state[name].clone().to(self.device)
            self.model.num_proxies = len(parameter)
            if self.updates:
                moments = {moment: state[f"{name}.{moment}"].clone().to(self.device) for moment in _MOMENTS}
                step = torch.tensor(float(self.updates), device=self.device)
                self._optimizer.state[parameter] = {"step": step, **moments}
        if averaged:
            for name, parameter in self.averaged.named_parameters():
                parameter.data = state[f"{name}.average"].clone().to(self.device)
            self.averaged.num_proxies = self.model.num_proxies


def mixed_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Context in which matrix products run in bfloat16 on CUDA; it changes nothing on other devices."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
