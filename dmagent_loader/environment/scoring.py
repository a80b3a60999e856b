"""Log-probabilities of given tokens under any causal language model, without lasting changes to the model.

Shapes: B pairs in a call, T tokens of the longest pair, V vocabulary, S scored tokens of the call.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from dmagent_loader.environment.batches import Batch, ScoredWindow
from dmagent_loader.environment.calling import LogitsOf, ModelCaller
from dmagent_loader.environment.output_layer import CAN_FORCE_EAGER, StandIn, hooked, output_layer, scored_hidden
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.simplex import IntArray

Model: TypeAlias = Callable[..., Any]
"""Causal language model: takes token ids, (B, T) int64, padded on the right, and returns logits, (B, T, V).

Its signature says how it is called (`calling.ModelCaller`): ``forward(input_ids, attention_mask)``, ``forward(tokens)``
and ``forward(idx, targets=None)`` all work. The logits may be the output itself, its ``logits``, or the only tensor of
their shape in a tuple, mapping or dataclass.

If the model has a method ``token_log_probs(input_ids, following)``, that is called instead. Both arguments are (B, T)
int64, padded on the right. It returns the log-probability of each following token, (B, T), or None on a rank that does
not hold the output. A model whose logits are split over ranks thus never has to gather them.
"""

SLICE_POSITIONS = 128
"""Positions whose float32 logits are processed at a time: 26 MB with a vocabulary of 50k.

From 32 MB on, glibc requests every buffer from the kernel anew, and clearing it takes as long as the computation.
"""

BLOCK_POSITIONS = 512
BLOCK_VALUES, ACCELERATOR_BLOCK_VALUES = 1 << 19, 1 << 25
"""Logits per block when the scorer applies the output layer: 2 MB on a CPU, 128 MB on accelerators to save launches."""

LENGTH_ATTRIBUTES = (
    "n_positions",
    "max_position_embeddings",
    "n_ctx",
    "block_size",
    "max_seq_len",
    "max_seq_length",
    "sequence_len",
)


def unwrap(model: Model) -> Model:
    """The model inside DistributedDataParallel, DataParallel and torch.compile wrappers.

    Ranks score different pairs, so wrappers that communicate in each call must be bypassed.
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(model, nn.Module) and isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def model_max_length(model: Model) -> int | None:
    """Maximum number of tokens the model reads, from its configuration; None: unknown."""
    for config in reversed(_configs(model)):
        for name in LENGTH_ATTRIBUTES:
            if getattr(config, name, None) is not None:
                return int(getattr(config, name))
    return None


def model_vocabulary(model: Model) -> int | None:
    """Vocabulary size, from the model's configuration; None: unknown."""
    for config in reversed(_configs(model)):
        if getattr(config, "vocab_size", None) is not None:
            return int(config.vocab_size)
    return None


@contextmanager
def scoring_state(model: Model) -> Iterator[None]:
    """Evaluation mode without gradients or key-value cache; restores the previous state on exit, also after an error.

    Restored: the mode of every submodule, ``config.use_cache``, the gradient mode, and the random states of torch (CPU
    and the model's GPUs), numpy and Python. Modes are set as flags, not by ``eval()``, because some modules override it
    with side effects (merging adapter weights). Compiled parts run uncompiled: they would be compiled anew for the
    shape of each call, and keep the hooks they were compiled with. Gradients are disabled by ``no_grad``: tensors
    cached by a model under ``inference_mode`` (rotary tables) would break the next backward pass.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    configs = [config for config in _configs(model) if hasattr(config, "use_cache")]
    caches = [config.use_cache for config in configs]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=_gpus(model)))
        stack.enter_context(torch.no_grad())
        # Nothing is compiled without this module, and importing it takes seconds.
        if CAN_FORCE_EAGER and "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module in modules:
                module.training = False
            for config in configs:
                config.use_cache = False
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for config, cache in zip(configs, caches, strict=True):
                config.use_cache = cache
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


class Scorer:
    """Computes log-probabilities of the scored tokens under a model.

    Args:
        model: Unwrapped model; call the methods inside `scoring_state`.
        logits_of: See `EnvironmentSettings`.

    Raises:
        ConfigurationError: The model cannot be called with token ids alone.
    """

    def __init__(self, model: Model, logits_of: LogitsOf | None = None) -> None:
        self.device = _device_of(model)
        self._model = model
        self._token_log_probs = getattr(model, "token_log_probs", None) if logits_of is None else None
        self._output_layer: nn.Linear | None = None
        self._is_called_directly = logits_of is None
        if self._token_log_probs is None:
            self._caller = ModelCaller(model, logits_of)

    def take_over_output_layer(self, windows: Sequence[ScoredWindow]) -> bool:
        """Makes later calls apply the output layer here, blockwise and only to the scored positions.

        With a vocabulary of 50k, this layer and the softmax cost more than all other layers of a small model, and the
        logits of one call can take more memory than the model. A hook, registered only during the call, reads the
        layer's input. This is done only if a trial call with a few tokens shows that the model exposes its output layer
        (``get_output_embeddings``), uses it once, and returns its output unchanged, whatever the logits: the way of
        scoring must not depend on how far the model is trained.

        Args:
            windows: Pairs of this evaluation.

        Returns:
            Whether the output layer is applied here.
        """
        may_look_inside = self._token_log_probs is None and self._is_called_directly
        layer = output_layer(self._model) if may_look_inside else None
        if layer is None:
            return False
        # Rows of different length and scored part expose swapped rows or columns and shifts by the padding.
        trial = [windows[0].tokens[:8], windows[-1].tokens[:5]]
        batch = Batch([ScoredWindow(tokens=tokens, num_scored=(len(tokens) + 1) // 2) for tokens in trial])
        seen: list[Tensor] = []

        def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            hidden = scored_hidden(module, inputs, batch)
            if hidden is not None:
                seen.append(module.forward(hidden))

        with hooked(layer, look), StandIn(layer) as stand_in:
            logits = self._logits(batch)
        if len(seen) == len(stand_in.outputs) == 1:
            scored = batch.rows, batch.columns
            returned, given = logits[scored], stand_in.replacements[0][scored]
            is_returned = returned.shape == given.shape and bool((returned == given.to(returned.device)).all())
            if is_returned and _alike(seen[0], stand_in.outputs[0][scored]):
                self._output_layer = layer
        return self._output_layer is not None

    def log_probs(self, windows: Sequence[ScoredWindow]) -> Tensor | None:
        """Log-probabilities of the scored tokens of one batch, in nats.

        Pairs are padded on the right and masked. Unscored positions skip the softmax. They also skip the output layer
        if `take_over_output_layer` succeeded, or, before the first scored column, if the model has ``logits_to_keep``.

        Args:
            windows: B pairs.

        Returns:
            (S,) on the model's device, in the order of the windows. None: the model's output is on another rank.

        Raises:
            ConfigurationError: The model does not return logits of the expected shape.
        """
        batch = Batch(windows)
        if self._token_log_probs is not None:
            found = self._token_log_probs(self._tensor(batch.input_ids), self._tensor(batch.following))
            if found is None:
                return None
            chosen: Tensor = found[batch.rows, batch.columns]
            return chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        if self._output_layer is None:
            logits = self._logits(batch)
            return _log_probs(lambda part: logits[batch.rows[part], batch.columns[part]], batch.targets)
        scored: list[Tensor] = []

        def score(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = scored_hidden(module, inputs, batch)
            assert hidden is not None, "the output layer's input differs from the trial call"
            assert isinstance(module, nn.Linear)
            scored.append(_linear_log_probs(module, hidden, batch.targets))
            # The layer and the rest of the model run on the last position of each row, as in generation.
            return inputs[0][:, -1:], *inputs[1:]

        with hooked(self._output_layer, score):
            self._call(batch)
        return scored[0]

    def _call(self, batch: Batch) -> Any:
        return self._caller(*self._inputs(batch), num_kept=batch.num_kept)

    def _logits(self, batch: Batch) -> Tensor:
        """Logits of the model, (B, at least `batch.num_kept`, V)."""
        logits = self._caller.logits(*self._inputs(batch), num_kept=batch.num_kept)
        largest = int(batch.targets.max())
        if logits.shape[2] <= largest:
            raise ConfigurationError(
                f"the model's logits are for {logits.shape[2]} tokens, but token id {largest} is to be scored: build "
                "the environment with the model's own tokenizer, and let the model return logits, not hidden states"
            )
        return logits

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return self._tensor(batch.input_ids), self._tensor(batch.mask), self._tensor(batch.following)

    def _tensor(self, values: IntArray) -> Tensor:
        return torch.from_numpy(values).to(self.device)


def _log_probs(logits: Callable[[slice], Tensor], targets: IntArray) -> Tensor:
    """Log-probabilities in at least float32, computed one slice of positions at a time.

    Args:
        logits: Function from a slice of the S positions to its logits, (n, V), of any float type.
        targets: (S,), target tokens.

    Returns:
        (S,), in nats.
    """
    picked = []
    for start in range(0, len(targets), SLICE_POSITIONS):
        part = slice(start, start + SLICE_POSITIONS)
        scores = logits(part)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        wanted = torch.from_numpy(targets[part]).to(scores.device)
        picked.append(-nn.functional.cross_entropy(scores, wanted, reduction="none"))
    return torch.cat(picked)


def _linear_log_probs(layer: nn.Linear, hidden: Tensor, targets: IntArray) -> Tensor:
    """Log-probabilities from hidden states, computed one block of the vocabulary at a time.

    Each block of logits is used while it is in the processor's cache; the full logits are never in memory.

    Args:
        layer: Output layer, (V, d).
        hidden: (S, d), hidden states.
        targets: (S,), target tokens.

    Returns:
        (S,), in nats, at least float32.
    """
    wanted = torch.from_numpy(targets).to(hidden.device)
    values = BLOCK_VALUES if hidden.device.type == "cpu" else ACCELERATOR_BLOCK_VALUES
    found = []
    for start in range(0, len(hidden), BLOCK_POSITIONS):
        part, sought = hidden[start : start + BLOCK_POSITIONS], wanted[start : start + BLOCK_POSITIONS]
        width = max(1, values // len(part))
        sums, picked = [], torch.zeros((), device=hidden.device)
        for first in range(0, layer.out_features, width):
            rows = slice(first, first + width)
            scores = nn.functional.linear(part, layer.weight[rows], None if layer.bias is None else layer.bias[rows])
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            sums.append(scores.logsumexp(dim=1))
            place = sought - first
            is_here = (place >= 0) & (place < scores.shape[1])
            here = scores.gather(1, place.clamp(0, scores.shape[1] - 1)[:, None])[:, 0]
            picked = torch.where(is_here, here, picked)
        found.append(picked - torch.stack(sums).logsumexp(dim=0))
    return torch.cat(found)


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Whether logits are equal up to rounding."""
    largest = float(expected.abs().max())
    if not math.isfinite(largest):
        return False  # The model diverged; `Environment.evaluate` reports it.
    tolerance = largest * max(1e-4, 4 * torch.finfo(expected.dtype).eps)
    return found.shape == expected.shape and torch.allclose(found.to(expected.dtype), expected, rtol=0, atol=tolerance)


def _configs(model: Model) -> list[Any]:
    """The model's configuration, and that of its text part if there is one."""
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", None)
    return [entry for entry in (config, text) if entry is not None]


def _gpus(model: Model) -> list[torch.device]:
    """GPUs whose random state a model call may change."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    devices = {torch.device("cuda", torch.cuda.current_device())}
    if isinstance(model, nn.Module):
        devices |= {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return sorted(devices, key=str)


def _device_of(model: Model) -> torch.device:
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            return parameter.device
    device = getattr(model, "device", None)
    return torch.device(device) if isinstance(device, str | torch.device) else torch.device("cpu")
