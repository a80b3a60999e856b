"""Log-probabilities of given tokens under any causal language model, leaving the model as it was.

Shapes: B pairs in a call, T tokens of the longest, V vocabulary, S scored tokens of the call.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from dmagent_loader.environment.batches import ScoredWindow
from dmagent_loader.errors import ConfigurationError

Model: TypeAlias = Callable[..., Any]
"""Called as ``model(input_ids, attention_mask=...)``; returns logits, or an object that has them as ``.logits``.

A model with a method ``token_log_probs(input_ids, following)``, both (B, T) int64 and padded on the right, is asked by
it instead: for the log-probability of each following token, (B, T), or None on a rank that does not hold the output. So
a model whose logits lie on several ranks never has to gather them.
"""

SLICE_ELEMENTS = 1 << 22
"""How many logits are turned into float32 at a time (16 MiB)."""

LENGTH_ATTRIBUTES = ("n_positions", "max_position_embeddings", "n_ctx")


def unwrap(model: Model) -> Model:
    """The model inside DistributedDataParallel, DataParallel and torch.compile.

    Ranks score different pairs, so a wrapper that communicates in each call must not be entered; and a compiled model
    would be compiled anew for the shape of each call.
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(model, nn.Module) and isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def model_max_length(model: Model) -> int | None:
    """The most tokens that the model reads, by its configuration."""
    for config in reversed(_configs(model)):
        for name in LENGTH_ATTRIBUTES:
            if getattr(config, name, None) is not None:
                return int(getattr(config, name))
    return None


def model_vocabulary(model: Model) -> int | None:
    """The number of tokens that the model knows, by its configuration."""
    for config in reversed(_configs(model)):
        if getattr(config, "vocab_size", None) is not None:
            return int(config.vocab_size)
    return None


@contextmanager
def scoring_state(model: Model) -> Iterator[None]:
    """Evaluation mode without gradients or key-value cache; on leaving, everything is as it was, also after an error.

    Put back: the mode of every submodule, ``config.use_cache``, whether gradients are on, and the random states of
    torch (CPU and the model's GPUs), numpy and Python. Modes are set as flags and not by ``eval()``, because modules
    override that with effects of their own (merging adapter weights). Gradients are off by ``no_grad``: tensors that a
    model caches under ``inference_mode`` (rotary tables) would break the next backward pass.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    configs = [config for config in _configs(model) if hasattr(config, "use_cache")]
    caches = [config.use_cache for config in configs]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=_gpus(model)))
        stack.enter_context(torch.no_grad())
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
    """Calls a model and picks the log-probabilities of the scored tokens.

    Args:
        model: Unwrapped, and inside `scoring_state`.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._device = _device_of(model)
        self._token_log_probs = getattr(model, "token_log_probs", None)
        forward = model.forward if isinstance(model, nn.Module) else model
        try:
            self._keeps_logits = "logits_to_keep" in inspect.signature(forward).parameters
        except (TypeError, ValueError):
            self._keeps_logits = False

    def log_probs(self, batch: Sequence[ScoredWindow]) -> Tensor | None:
        """Log-probabilities of the scored tokens of one batch, in nats.

        Pairs are padded on the right and masked. Positions that are not scored cost no softmax, and no output layer
        where the model can leave it out (``logits_to_keep``).

        Args:
            batch: B windows.

        Returns:
            (S,) on the model's device: the scored tokens of the first window, then of the second, and so on. None: the
            model's output is on another rank.

        Raises:
            ConfigurationError: The model does not return logits of the right shape.
        """
        width = max(window.num_inputs for window in batch)
        input_ids = np.zeros((len(batch), width), dtype=np.int64)
        mask = np.zeros((len(batch), width), dtype=np.int64)
        rows, columns, targets = [], [], []
        for row, window in enumerate(batch):
            input_ids[row, : window.num_inputs] = window.tokens[:-1]
            mask[row, : window.num_inputs] = 1
            rows.append(np.full(window.num_scored, row))
            columns.append(np.arange(window.num_inputs - window.num_scored, window.num_inputs))
            targets.append(window.tokens[-window.num_scored :])
        if self._token_log_probs is not None:
            following = np.zeros_like(input_ids)
            for row, window in enumerate(batch):
                following[row, : window.num_inputs] = window.tokens[1:]
            found = self._token_log_probs(self._tensor(input_ids), self._tensor(following))
            if found is None:
                return None
            chosen: Tensor = found[np.concatenate(rows), np.concatenate(columns)]
            return chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        kept = width - min(int(column[0]) for column in columns)
        arguments: dict[str, Any] = {"attention_mask": self._tensor(mask)}
        if self._keeps_logits:
            arguments["logits_to_keep"] = kept
        output = self._model(self._tensor(input_ids), **arguments)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or len(logits) != len(batch) or logits.shape[1] < kept:
            shown = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
            raise ConfigurationError(
                f"the model returned {shown} for input of shape ({len(batch)}, {width}): it must return logits of "
                "shape (batch, length, vocabulary), or an object with such a tensor as .logits"
            )
        # Counted from the right: a model may return only the last positions, or put virtual tokens before the first.
        columns_from_right = np.concatenate(columns) - width + logits.shape[1]
        return _picked_log_probs(
            logits,
            torch.from_numpy(np.concatenate(rows)).to(logits.device),
            torch.from_numpy(columns_from_right).to(logits.device),
            torch.from_numpy(np.concatenate(targets)).to(logits.device),
        )

    def _tensor(self, values: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def _picked_log_probs(logits: Tensor, rows: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of `targets` at (`rows`, `columns`), in float32 or better, a slice of positions at a time.

    Args:
        logits: (B, T, V), any float type.
        rows: (S,).
        columns: (S,).
        targets: (S,).

    Returns:
        (S,).
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    size = max(1, SLICE_ELEMENTS // logits.shape[-1])
    picked = []
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        scores = logits[rows[part], columns[part]].to(dtype)
        picked.append(-nn.functional.cross_entropy(scores, targets[part], reduction="none"))
    return torch.cat(picked)


def _configs(model: Model) -> list[Any]:
    """The model's configuration, and that of its text part where it has one."""
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", None)
    return [entry for entry in (config, text) if entry is not None]


def _gpus(model: Model) -> list[torch.device]:
    """The GPUs whose random state a call of the model may change."""
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
