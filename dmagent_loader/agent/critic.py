"""The critic of the agent's training, which predicts the gain of feedback after a mix (paper, Eq. 7; reconstructed).

It is trained beside the agent and not needed to use it. Checkpoints contain it so that a training can be judged and
continued.

Shapes: B batch, T steps, W of them with candidates, N candidates of a step, D domains, K feedback values, d width.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmagent_loader._validation import is_finite_number, shown
from dmagent_loader.agent.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_config, read_weights, write_checkpoint
from dmagent_loader.agent.config import MAX_WIDTH, AgentConfig
from dmagent_loader.agent.layers import DecoderBlock, initialize, rotary_tables
from dmagent_loader.errors import CheckpointError, ConfigurationError

SCHEMA_VERSION = 1
"""Version of the JSON form; raised when an older reader would misunderstand a newer file."""

MAX_CRITICS = 16
"""Limit on the critics of one folder; two are usual."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """Everything that defines a critic except its weights.

    Args:
        num_domains: D.
        num_fields: K.
        d_model: Width of the residual stream.
        num_heads: Number of attention heads; the width of a head must be even.
        d_ff: Inner width of the SwiGLU feed-forward layer.
        rope_theta: Base of the rotary embedding.
        norm_eps: Epsilon of RMSNorm.
        low: Lowest value, in units of the standardised reward: Q = low + span * sigmoid(u).
        span: Highest value minus lowest.

    Raises:
        ConfigurationError: A value is outside its range.
    """

    num_domains: int = 52
    num_fields: int = 2
    d_model: int = 256
    num_heads: int = 4
    d_ff: int = 1024
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    low: float = 0.0
    span: float = 1.0

    def __post_init__(self) -> None:
        for name in ("num_domains", "num_fields", "d_model", "num_heads", "d_ff"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(f"{name} is {shown(value)}; it must be a whole number of at least 1")
            if value > MAX_WIDTH:
                raise ConfigurationError(f"{name} is {shown(value)}; at most {MAX_WIDTH} is supported")
        for name in ("rope_theta", "norm_eps", "span"):
            value = getattr(self, name)
            if not is_finite_number(value) or value <= 0:
                raise ConfigurationError(f"{name} is {shown(value)}; it must be a positive finite number")
        if not is_finite_number(self.low):
            raise ConfigurationError(f"low is {shown(self.low)}; it must be a finite number")
        if self.d_model % (2 * self.num_heads):
            raise ConfigurationError(
                f"d_model {self.d_model} over {self.num_heads} heads gives no even head width, which the rotary "
                "embedding needs: choose d_model as a multiple of 2 * num_heads"
            )

    @classmethod
    def for_agent(cls, agent: AgentConfig, *, low: float, span: float) -> CriticConfig:
        """A critic of the agent's width, with one decoder layer (paper, C.4)."""
        return cls(
            num_domains=agent.num_domains,
            num_fields=agent.num_fields,
            d_model=agent.d_model,
            num_heads=agent.num_heads,
            d_ff=agent.d_ff,
            rope_theta=float(agent.rope_theta),
            norm_eps=float(agent.norm_eps),
            low=low,
            span=span,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CriticConfig:
        """Reads the form of `dataclasses.asdict`.

        Raises:
            ConfigurationError: Keys are missing or unknown, or a value is outside its range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        missing, unknown = sorted(known - set(values)), sorted(set(values) - known)
        if missing or unknown:
            raise ConfigurationError(
                f"the critic's config lacks {missing} and has unknown {unknown}: it was edited or is of another model"
            )
        return cls(**values)


class MixingCritic(nn.Module):
    """Q(s_t, a_t) = low + span * sigmoid(u), u = w . Decoder_1(x_0 .. x_{t-1}, a_t) + b (Eq. 7; range an extension).

    The sequence consists of the history's tokens and one token for each candidate mix. A candidate attends to the
    history before its step and to itself, never to another candidate, so one pass serves all steps and candidates.
    Candidates have a separate embedding, because they are mixes that have not been trained on. With the agent's default
    widths the critic has 1,076,737 parameters.

    Example:
        >>> sum(p.numel() for p in MixingCritic(CriticConfig()).parameters())
        1076737
    """

    def __init__(self, config: CriticConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.num_domains + config.num_fields, config.d_model, bias=False)
        self.embed_candidate = nn.Linear(config.num_domains, config.d_model, bias=False)
        self.block = DecoderBlock(config.d_model, config.num_heads, config.d_ff, config.norm_eps)
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, 1)
        initialize(self)

    def forward(
        self, inputs: Tensor, candidates: Tensor, valid: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Logits u of the candidates' values.

        Args:
            inputs: (B, T, D + K), mix and standardised feedback of each step, as in `MixingAgent.logits`.
            candidates: (B, W, N, D) with W <= T. The candidates at [:, w] would follow row T - W + w of the history;
                they see this row and the earlier ones.
            valid: (B, T) bool, False on padding; None: no padding.
            positions: (B, T) int64, the absolute step of each row; None: the valid rows are counted from 0.

        Returns:
            (B, W, N); values at rows of padding are finite but meaningless.

        Raises:
            ConfigurationError: The shapes do not match the config or each other.
        """
        batch, length = inputs.shape[:2]
        window, count = candidates.shape[1:3]
        widths = (self.embed.in_features, self.embed_candidate.in_features)
        if (inputs.shape[-1], candidates.shape[-1]) != widths or candidates.shape[0] != batch or window > length:
            raise ConfigurationError(
                f"the critic's inputs have shape {tuple(inputs.shape)} and the candidates {tuple(candidates.shape)}; "
                f"expected (batch, steps, {widths[0]}) and (batch, the last of these steps, candidates, {widths[1]})"
            )
        if valid is None:
            valid = torch.ones(batch, length, dtype=torch.bool, device=inputs.device)
        if positions is None:
            positions = (valid.long().cumsum(dim=1) - 1).clamp(min=0)
        # Padding may hold anything, even NaN, and 0 * NaN would reach the values of valid rows.
        inputs = torch.where(valid[..., None], inputs, torch.zeros((), dtype=inputs.dtype, device=inputs.device))
        x = torch.cat([self.embed(inputs), self.embed_candidate(candidates).flatten(1, 2)], dim=1)
        following = (positions[:, length - window :] + 1).repeat_interleave(count, dim=1)
        positions = torch.cat([positions.expand(batch, -1), following.expand(batch, -1)], dim=1)
        rotary = rotary_tables(positions, x.shape[-1] // self.config.num_heads, self.config.rope_theta, x.dtype)
        x = self.block(x, rotary, _candidate_mask(valid, window, count), window * count)
        logits: Tensor = self.head(self.norm(x)).view(batch, window, count)
        return logits

    def values(self, logits: Tensor) -> Tensor:
        """Converts logits u to Q, in units of the standardised reward."""
        return self.config.low + self.config.span * logits.sigmoid()


def save_critics(critics: Sequence[MixingCritic], directory: str | os.PathLike[str]) -> None:
    """Writes the critics of one training, which share their config; see `agent.checkpoint.write_checkpoint`.

    Raises:
        CheckpointError: A weight is not finite.
        ConfigurationError: There are none, too many, or their configs differ.
    """
    if not 1 <= len(critics) <= MAX_CRITICS or any(critic.config != critics[0].config for critic in critics):
        raise ConfigurationError(
            f"{len(critics)} critics with {len({critic.config for critic in critics})} configs cannot be saved in one "
            f"folder: give 1 to {MAX_CRITICS} of one config"
        )
    config = {
        "schema_version": SCHEMA_VERSION,
        **dataclasses.asdict(critics[0].config),
        "num_critics": len(critics),
    }
    write_checkpoint(directory, config, nn.ModuleList(critics).state_dict(), owner="the critic")


def load_critics(directory: str | os.PathLike[str]) -> tuple[MixingCritic, ...]:
    """Loads critics that `save_critics` wrote onto the CPU; never unpickles, and verifies the digest.

    Raises:
        CheckpointError: Files are missing, changed, truncated, ill-shaped or of another schema, or a weight is not
            finite.
    """
    folder = Path(directory)
    values = read_config(folder)
    version, count, sha256 = (values.pop(name, None) for name in ("schema_version", "num_critics", "weights_sha256"))
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} has schema version {shown(version)}, but this version reads {SCHEMA_VERSION}: "
            "it is not a critic, or was written by another version of dmagent-loader"
        )
    if not isinstance(count, int) or not 1 <= count <= MAX_CRITICS or not isinstance(sha256, str):
        raise CheckpointError(
            f"{folder / CONFIG_FILE} says num_critics {shown(count)} and weights_sha256 {shown(sha256)}: "
            "it was not written by save_critics"
        )
    try:
        config = CriticConfig.from_dict(values)
    except ConfigurationError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from error
    with torch.device("meta"):
        critics = nn.ModuleList(MixingCritic(config) for _ in range(count))
    critics.load_state_dict(read_weights(folder / WEIGHTS_FILE, sha256, critics.state_dict()), assign=True)
    return tuple(critics.eval())  # type: ignore[arg-type]


def _candidate_mask(valid: Tensor, window: int, count: int) -> Tensor:
    """Attention mask: a candidate attends to the valid history before its step and to itself.

    The rows of history tokens stay False, because the block never computes their output.

    Args:
        valid: (B, T) bool.
        window: W.
        count: N.

    Returns:
        (B, 1, T + W N, T + W N) bool.
    """
    batch, length = valid.shape
    tokens = window * count
    reach = torch.ones(window, length, dtype=torch.bool, device=valid.device).tril(length - window)
    history = reach.repeat_interleave(count, dim=0)[None] & valid[:, None, :]
    itself = torch.eye(tokens, dtype=torch.bool, device=valid.device).expand(batch, -1, -1)
    rows = torch.cat([history, itself], dim=2)
    unread = torch.zeros(batch, length, length + tokens, dtype=torch.bool, device=valid.device)
    return torch.cat([unread, rows], dim=1)[:, None]
