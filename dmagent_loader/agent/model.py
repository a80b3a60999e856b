"""The agent's network (paper, Eq. 3; block and widths reconstructed).

Shapes: B batch, T steps, D = 52 domains, K = 2 feedback values, d width.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dmagent_loader.agent.checkpoint import (
    WEIGHTS_FILE,
    default_card,
    name_of,
    read_agent_config,
    read_weights,
    resolve,
    write_checkpoint,
)
from dmagent_loader.agent.config import AgentConfig
from dmagent_loader.agent.layers import DecoderBlock, causal_mask, initialize, rotary_tables
from dmagent_loader.errors import CheckpointError, ConfigurationError, DomainError, FeedbackError
from dmagent_loader.mixture.history import FeedbackStatistics, History, Standardization, standardize
from dmagent_loader.mixture.simplex import FloatArray


class MixingAgent(nn.Module):
    """Maps the mix and the standardised feedback of each step so far to the next mix.

    x_i = [a_i ; f_i], h = CausalDecoder(W_in x_0 .. W_in x_{t-1}), a_t = softmax(W_out h_{t-1}) (Eq. 3). With the
    default configuration it has exactly 2,125,568 parameters; the paper says 2.1M.

    Example:
        >>> agent = MixingAgent(AgentConfig())
        >>> agent.num_parameters()
        2125568
    """

    def __init__(self, config: AgentConfig, *, name: str = "unnamed") -> None:
        super().__init__()
        self.config = config
        self.name = name
        self._warned_of_length = False
        self.embed = nn.Linear(config.input_dim, config.d_model, bias=False)
        self.blocks = nn.ModuleList(
            DecoderBlock(config.d_model, config.num_heads, config.d_ff, config.norm_eps)
            for _ in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.num_domains, bias=False)
        initialize(self)

    def num_parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.parameters())

    def logits(
        self, inputs: Tensor, mask: Tensor | None = None, positions: Tensor | None = None, *, tail: int | None = None
    ) -> Tensor:
        """Scores of the domains before the softmax.

        Args:
            inputs: (B, T, D + K), mix and standardised feedback of each step.
            mask: (B, T) bool, False on padding, which is usually on the left but may be anywhere; None: no padding.
            positions: (B, T) int64, the absolute step of each row; None: the valid rows are counted from 0.
            tail: Number of rows to return, from the end, which saves most of the last block's work; None: all.

        Returns:
            (B, tail or T, D); row t scores the mix of step t + 1 and depends on no later row. Rows of padding are
            finite but meaningless.

        Raises:
            ConfigurationError: The width of `inputs` is not D + K.
        """
        if inputs.ndim != 3 or inputs.shape[-1] != self.config.input_dim:
            raise ConfigurationError(
                f"the agent's input has shape {tuple(inputs.shape)}; expected (batch, steps, {self.config.input_dim}): "
                f"{self.config.num_domains} weights and {self.config.num_fields} feedback values for each step"
            )
        length = inputs.shape[1]
        if positions is None:
            if mask is None:
                positions = torch.arange(length, device=inputs.device)[None]
            else:
                positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        if mask is not None:
            # Padding may hold anything, even NaN, and 0 * NaN would reach the values of valid rows.
            inputs = torch.where(mask[..., None], inputs, torch.zeros((), dtype=inputs.dtype, device=inputs.device))
        x = self.embed(inputs)
        rotary = rotary_tables(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        allowed = None if mask is None else causal_mask(length, mask, inputs.device)
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, rotary, allowed, tail if number == len(self.blocks) else None)
        out: Tensor = self.head(self.norm(x))
        return out

    def forward(self, inputs: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Mixes of the next steps, (B, T, D), each summing to 1; see `logits` for the arguments."""
        return self.logits(inputs, mask, positions).softmax(dim=-1)

    def encode(self, history: History, *, standardization: Standardization | None = None) -> FloatArray:
        """Network inputs of a history: mixes joined with standardised feedback.

        Args:
            history: Mixes over the agent's own domains, feedback in the order of `config.feedback_roles`.
            standardization: Mode of `mixture.history.standardize`; None: that of the checkpoint.

        Returns:
            (T, D + K) float64.

        Raises:
            DomainError: The history is over other domains.
            FeedbackError: A feedback value or a weight is not finite.
            ConfigurationError: The number of feedback values differs, the history is empty, or the agent has no
                statistics.
        """
        if history.domains != self.config.domains:
            raise DomainError(
                f"the history is over {len(history.domains)} domains ({', '.join(history.domains[:3])}, ...), "
                f"but agent {self.name!r} was trained on {self.config.num_domains} "
                f"({', '.join(self.config.domains[:3])}, ...): "
                "use policies.AgentPolicy, which maps your domains to the agent's"
            )
        if len(history.fields) != self.config.num_fields:
            raise ConfigurationError(
                f"the history has feedback on {len(history.fields)} fields {list(history.fields)}, but agent "
                f"{self.name!r} reads {self.config.num_fields}, one for each role {list(self.config.feedback_roles)}: "
                "choose by deciding=DecisionConfig(roles=...)"
            )
        if len(history) == 0:
            raise ConfigurationError(
                "the history is empty: the agent needs the start state (the base model's own mix and its feedback)"
            )
        if not np.isfinite(history.feedback).all() or not np.isfinite(history.mixes).all():
            raise FeedbackError("the history holds values that are not finite: the agent can propose nothing from it")
        mode = self.config.standardization if standardization is None else standardization
        feedback = standardize(history.feedback, self._statistics(), mode, prior_weight=self.config.prior_weight)
        return np.concatenate([history.mixes, feedback], axis=1)

    @torch.inference_mode()
    def propose(self, history: History, *, standardization: Standardization | None = None) -> FloatArray:
        """The mix of the next step.

        A history longer than `config.max_steps`, which the agent never saw in training, is cut to its last `max_steps`
        rows. They keep their absolute steps, and feedback is standardised over the whole history first.

        Args:
            history: See `encode`.
            standardization: See `encode`.

        Returns:
            (D,) float64, sums to 1.

        Raises:
            DomainError, FeedbackError, ConfigurationError: See `encode`.
        """
        rows = self.encode(history, standardization=standardization)
        first = max(0, len(rows) - self.config.max_steps)
        if first and not self._warned_of_length:
            self._warned_of_length = True
            warnings.warn(
                f"the history has {len(rows)} steps, but agent {self.name!r} was trained on at most "
                f"{self.config.max_steps}: it sees the last {self.config.max_steps} only",
                stacklevel=2,
            )
        weight = self.embed.weight
        inputs = torch.from_numpy(rows[first:])[None].to(weight.device, weight.dtype)
        positions = torch.arange(first, len(rows), device=weight.device)[None]
        # The training loop that calls this may have autocast on; the mix must not be rounded to bfloat16.
        with torch.autocast(weight.device.type, enabled=False):
            scores = self.logits(inputs, None, positions, tail=1)[0, -1]
        mix = scores.double().softmax(dim=-1).cpu().numpy()
        return np.asarray(mix / mix.sum(), dtype=np.float64)

    def save_pretrained(self, directory: str | os.PathLike[str], *, card: str | None = None) -> None:
        """Writes a checkpoint; see `agent.checkpoint.write_checkpoint`.

        Args:
            directory: Created if missing; the files of an older checkpoint are replaced.
            card: Text of ``README.md``; None: a short generated one.

        Raises:
            CheckpointError: The agent has no feedback statistics, or a weight is not finite.
        """
        if self.config.statistics is None:
            raise CheckpointError(
                f"agent {self.name!r} has no feedback statistics, so that it could not propose after loading: "
                "set AgentConfig(statistics=...)"
            )
        if card is None:
            card = default_card(self.config, Path(directory).resolve().name, self.num_parameters())
        write_checkpoint(directory, self.config.to_dict(), self.state_dict(), owner=f"agent {self.name!r}", card=card)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> MixingAgent:
        """Loads an agent on the CPU in float32, without touching any random generator.

        Args:
            name_or_path: A bundled name, a directory or a Hub id; see `agent.checkpoint.resolve`.
            revision: Branch, tag or commit on the Hub.

        Raises:
            CheckpointError: Files are missing, changed, truncated, ill-shaped or of a newer schema, or a weight is not
                finite.
            MissingExtraError: ``huggingface_hub``, which a Hub id needs, is not installed.
        """
        directory = resolve(name_or_path, revision=revision)
        config, sha256 = read_agent_config(directory)
        # Meta parameters take neither memory nor random numbers; `assign` then puts the loaded ones in their place.
        with torch.device("meta"):
            agent = cls(config, name=name_of(name_or_path, directory))
        weights = read_weights(directory / WEIGHTS_FILE, sha256, agent.state_dict())
        agent.load_state_dict(weights, assign=True)
        return agent.eval()

    def _statistics(self) -> FeedbackStatistics:
        if self.config.statistics is None:
            raise ConfigurationError(
                f"agent {self.name!r} has no feedback statistics: build it with "
                "AgentConfig(statistics=FeedbackStatistics.of(feedback of the training trajectories))"
            )
        return self.config.statistics
