"""Access to the input of a model's output layer, through public hooks of torch and transformers.

Shapes: B pairs in a call, T tokens of the longest, d width, S scored tokens of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dmagent_loader.environment.batches import Batch

CAN_FORCE_EAGER = hasattr(torch.compiler, "set_stance")
"""Whether this torch (2.6 or newer) can run compiled modules uncompiled."""


def output_layer(model: object) -> nn.Linear | None:
    """The model's output layer, if the model exposes it and it is a plain `nn.Linear`.

    None for other layer types and for layers with their own ``forward`` (adapters; quantised, offloaded or sharded
    weights): these may communicate, and ranks would call them an unequal number of times. Before torch 2.6, also None
    inside compiled code, which cannot be run uncompiled there and keeps the hooks it was compiled with.
    """
    named = getattr(model, "get_output_embeddings", None)
    if not isinstance(model, nn.Module) or not callable(named):
        return None
    try:
        layer = named()
    except (AttributeError, NotImplementedError):
        return None
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return None
    if not CAN_FORCE_EAGER and any(
        _compiled(module) and any(part is layer for part in module.modules()) for module in model.modules()
    ):
        return None
    return layer


def scored_hidden(layer: nn.Module, inputs: tuple[Any, ...], batch: Batch) -> Tensor | None:
    """Hidden states of the scored positions, (S, d); None if the layer's input is not the whole batch.

    Args:
        layer: Layer returned by `output_layer`.
        inputs: Positional arguments of the layer's call.
        batch: Batch the model was called with.
    """
    hidden = inputs[0] if inputs else None
    # Tensor subclasses are shards of tensors that span several ranks.
    if type(hidden) is not Tensor or type(layer.weight) not in (Tensor, nn.Parameter):
        return None
    if hidden.dim() != 3 or len(hidden) != len(batch) or hidden.shape[1] < batch.num_kept:
        return None
    chosen: Tensor = hidden[batch.rows, batch.columns]
    return chosen


class StandIn:
    """Replaces the output of a layer during one call of its model, to show whether the model returns it unchanged.

    Comparing real logits cannot show that: a cap on logits is the identity, up to rounding, as long as they are small.

    Args:
        layer: Layer returned by `output_layer`.

    Attributes:
        outputs: The layer's own outputs, one for each time the model used it.
        replacements: Random values of many magnitudes (up to thousands), which the model got instead.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self.outputs: list[Tensor] = []
        self.replacements: list[Tensor] = []

    def __enter__(self) -> StandIn:
        # First of the hooks, so that any other acts on the replacement.
        self._handle = self._layer.register_forward_hook(self._replace, prepend=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _replace(self, module: nn.Module, inputs: tuple[Any, ...], output: object) -> Tensor | None:
        if type(output) is not Tensor:
            return None  # a shard of a tensor that spans several ranks
        self.outputs.append(output)
        self.replacements.append(torch.randn_like(output).pow(5) * 10)
        return self.replacements[-1]


@contextmanager
def hooked(layer: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...]], Any]) -> Iterator[None]:
    """Registers a forward pre-hook that runs after the existing ones, which may gather the layer's weights."""
    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _compiled(module: nn.Module) -> bool:
    return (
        module._compiled_call_impl is not None
        or hasattr(module, "_orig_mod")
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )
