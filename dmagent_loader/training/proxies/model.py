"""Many nano LLaMA-style proxies trained at once, as one model with stacked weights (design section 8.3).

A proxy is trained from scratch along one trajectory. One at a time, models this small leave any machine idle: each
operation is tiny. Here every weight has a leading axis over proxies and every matrix product is one batched product, so
that one call works for all of them. No operation mixes two proxies, and the optimiser is elementwise: the result is the
same as training each alone, to float tolerance.

Shapes: P proxies, B rows, T tokens of a row, N = B * T, E width, F width of the feed-forward layer, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmagent_loader.errors import ConfigurationError, StateError


@dataclass(frozen=True, kw_only=True)
class ProxyConfig:
    """Size and optimiser of one proxy.

    The paper's proxies have 50M parameters; these defaults are about 300 times smaller, so that a set of trajectories
    takes minutes on one CPU core.

    Args:
        vocab_size: V.
        width: E.
        layers: Transformer blocks.
        heads: Attention heads; must divide `width` into an even number.
        feed_forward: F, of SwiGLU.
        rows_per_update: B, rows of one optimiser update.
        learning_rate: Of AdamW, constant after the warm-up.
        warmup_updates: Updates over which the learning rate rises linearly.
        weight_decay: Of AdamW.
        averaging: Share of the old average that an update leaves in the moving average of the weights, which is what
            is scored: steps of a constant learning rate shake the weights, and the scores with them. 0: no averaging.
        seed: Of the initial weights, which all proxies share: differences between them come from their data alone.
    """

    vocab_size: int = 1024
    width: int = 64
    layers: int = 2
    heads: int = 4
    feed_forward: int = 172
    rows_per_update: int = 2
    learning_rate: float = 3e-3
    warmup_updates: int = 10
    weight_decay: float = 0.01
    averaging: float = 0.98
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ConfigurationError(
                f"width {self.width} does not split into {self.heads} heads of even width: choose another number"
            )
        if not 0 <= self.averaging < 1:
            raise ConfigurationError(f"averaging is {self.averaging}: it must be at least 0 and below 1")

    @property
    def num_parameters(self) -> int:
        """Parameters of one proxy; input and output embedding are tied."""
        block = 4 * self.width**2 + 3 * self.width * self.feed_forward + 2 * self.width
        return self.vocab_size * self.width + self.layers * block + self.width


class StackedProxies(nn.Module):
    """P language models in one: LLaMA blocks (RMSNorm, RoPE, SwiGLU, no bias), tied embedding.

    All P start from the same weights.

    Args:
        num_proxies: P.
        config: Of one proxy.
    """

    def __init__(self, num_proxies: int, config: ProxyConfig) -> None:
        super().__init__()
        self.config = config
        self.num_proxies = num_proxies
        generator = torch.Generator().manual_seed(config.seed)
        e, f = config.width, config.feed_forward

        def matrix(rows: int, columns: int, std: float) -> nn.Parameter:
            one = torch.randn(rows, columns, generator=generator) * std
            return nn.Parameter(one.expand(num_proxies, rows, columns).clone())

        def ones() -> nn.Parameter:
            return nn.Parameter(torch.ones(num_proxies, 1, e))

        # The matrices that write into the residual stream start smaller, so that its scale does not grow with depth.
        std, residual_std = e**-0.5, (2 * config.layers * e) ** -0.5
        self.embedding = matrix(config.vocab_size, e, 0.05)
        self.qkv = nn.ParameterList([matrix(e, 3 * e, std) for _ in range(config.layers)])
        self.out = nn.ParameterList([matrix(e, e, residual_std) for _ in range(config.layers)])
        self.gate_up = nn.ParameterList([matrix(e, 2 * f, std) for _ in range(config.layers)])
        self.down = nn.ParameterList([matrix(f, e, residual_std) for _ in range(config.layers)])
        self.attention_norm = nn.ParameterList([ones() for _ in range(config.layers)])
        self.mlp_norm = nn.ParameterList([ones() for _ in range(config.layers)])
        self.final_norm = ones()

    def hidden(self, tokens: Tensor) -> Tensor:
        """Last hidden states.

        Args:
            tokens: (P, B, T) int64, each proxy its own; or (1, B, T), the same rows for all.

        Returns:
            (P, B * T, E).
        """
        proxies, (_, rows, length) = self.num_proxies, tokens.shape
        heads, head_width = self.config.heads, self.config.width // self.config.heads
        flat = tokens.reshape(tokens.shape[0], rows * length)
        offsets = torch.arange(proxies, device=tokens.device)[:, None] * self.config.vocab_size
        x = functional.embedding(flat + offsets, self.embedding.view(-1, self.config.width))
        cos, sin = rotary(length, head_width, x.device)
        for layer in range(self.config.layers):
            y = torch.bmm(rms_norm(x), scaled(self.qkv[layer], self.attention_norm[layer]))
            y = y.view(proxies * rows, length, 3 * heads, head_width).transpose(1, 2)
            qk, v = torch.split(y, [2 * heads, heads], dim=1)
            q, k = torch.split(rotate(qk, cos, sin), heads, dim=1)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            y = y.transpose(1, 2).reshape(proxies, rows * length, self.config.width)
            x = x + torch.bmm(y, self.out[layer])
            y = torch.bmm(rms_norm(x), scaled(self.gate_up[layer], self.mlp_norm[layer]))
            gate, up = y.chunk(2, dim=-1)
            x = x + torch.bmm(functional.silu(gate) * up, self.down[layer])
        return rms_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(P, N, E) -> (P, N, V)."""
        return torch.bmm(hidden, (self.embedding * self.final_norm).transpose(1, 2))

    def losses(self, tokens: Tensor) -> Tensor:
        """Mean next-token loss of each proxy in nats.

        Args:
            tokens: (P, B, T + 1) int64, each proxy its own rows.

        Returns:
            (P,).
        """
        logits = self.logits(self.hidden(tokens[:, :, :-1]))
        targets = tokens[:, :, 1:].reshape(-1)
        loss = functional.cross_entropy(logits.view(-1, self.config.vocab_size), targets, reduction="none")
        return loss.view(self.num_proxies, -1).mean(dim=1)


def rms_norm(x: Tensor) -> Tensor:
    """Root mean square normalisation over the last axis, without weight: (..., E)."""
    return functional.rms_norm(x, x.shape[-1:], eps=1e-6)


def scaled(matrix: Tensor, weight: Tensor) -> Tensor:
    """A matrix that takes in a norm's weight: the product over a few rows is cheaper than over all tokens.

    (P, E, columns), (P, 1, E) -> (P, E, columns).
    """
    return matrix * weight.transpose(1, 2)


def rotary(length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of the rotary angles, (T, head_width) each; see `rotate`."""
    frequencies = 10_000.0 ** (-torch.arange(0, head_width, 2, device=device) / head_width)
    angles = torch.arange(length, device=device)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: (..., T, head_width)."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class ProxyTrainer:
    """Trains P stacked proxies, each on its own rows.

    Attributes:
        model: The proxies.
        averaged: Proxies with the moving average of the weights; the model itself where `ProxyConfig.averaging` is 0.
        device: Where both lie.

    Args:
        num_proxies: P.
        config: Of each proxy.
        start: Weights to start from, (P, ...) each; None: drawn from the seed.
        device: ``"cpu"``, ``"cuda"`` and so on. On CUDA, matrix products are computed in bfloat16.
    """

    def __init__(
        self,
        num_proxies: int,
        config: ProxyConfig,
        *,
        start: Mapping[str, Tensor] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config = config
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
        """Trains on the rows of one step, `rows_per_update` at a time.

        Args:
            rows: (P, R, T + 1) int64; R must be a multiple of `rows_per_update`.

        Returns:
            (P,) mean loss of each proxy in nats.

        Raises:
            ConfigurationError: A number of rows that does not divide into updates.
        """
        if rows.shape[1] % self.config.rows_per_update:
            raise ConfigurationError(
                f"a step of {rows.shape[1]} rows does not divide into updates of {self.config.rows_per_update} rows: "
                "choose tokens_per_step as a multiple of row_tokens * rows_per_update"
            )
        mean = torch.zeros(self.model.num_proxies, device=self.device)
        batches = torch.split(rows.to(self.device), self.config.rows_per_update, dim=1)
        for batch in batches:
            self.updates += 1
            warmup = min(1.0, self.updates / self.config.warmup_updates)
            for group in self._optimizer.param_groups:
                group["lr"] = self.config.learning_rate * warmup
            self._optimizer.zero_grad()
            with mixed_precision(self.device):
                losses = self.model.losses(batch)
            # The sum: each proxy's gradient is that of its own loss, whatever the number of proxies.
            torch.autograd.backward(losses.sum())
            self._optimizer.step()
            mean += losses.detach() / len(batches)
            self._average()
        return mean.cpu()

    @torch.no_grad()
    def _average(self) -> None:
        if self.averaged is self.model:
            return
        # The first averages are over the updates so far: the weights that training started from would linger in them.
        share = max(1 - self.config.averaging, 1 / (self.updates + 1))
        averages: list[Tensor] = list(self.averaged.parameters())
        torch._foreach_lerp_(averages, list(self.model.parameters()), share)

    def keep(self, positions: Sequence[int]) -> None:
        """Goes on with some of the proxies only, in the given order; the others have ended."""
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
        """Weights, averages, moments and update count, as tensors on the CPU under flat names."""
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
        """Takes over what `state` gave; the number of proxies becomes the saved one.

        Raises:
            StateError: The state of proxies of another size.
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
    """Matrix products in bfloat16 on CUDA; elsewhere nothing changes."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


_MOMENTS = ("exp_avg", "exp_avg_sq")
