"""The hidden states that a model is about to give to its output layer, by public hooks of torch and transformers.

Shapes: B pairs in a call, T tokens of the longest, d width, S scored tokens of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dmagent_loader.environment.batches import Batch


def output_layer(model: object) -> nn.Linear | None:
    """The layer that turns hidden states into logits, if the model names it and applying it is nothing but a product.

    None for layers of other types and with a ``forward`` of their own (adapters, quantised, offloaded or sharded
    weights), which may communicate: ranks would do so in unequal numbers. None too inside compiled code, which keeps
    the hook that it was compiled with.
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
    if any(_compiled(module) and any(part is layer for part in module.modules()) for module in model.modules()):
        return None
    return layer


def scored_hidden(layer: nn.Module, inputs: tuple[Any, ...], batch: Batch) -> Tensor | None:
    """The hidden states of the scored positions, (S, d), where the layer is given those of the whole batch.

    Args:
        layer: See `output_layer`.
        inputs: What it is about to be called with.
        batch: What the model was called with.
    """
    hidden = inputs[0] if inputs else None
    # Subclasses of tensors are parts of something that lies on several ranks.
    if type(hidden) is not Tensor or type(layer.weight) not in (Tensor, nn.Parameter):
        return None
    if hidden.dim() != 3 or len(hidden) != len(batch) or hidden.shape[1] < batch.num_kept:
        return None
    chosen: Tensor = hidden[batch.rows, batch.columns]
    return chosen


@contextmanager
def hooked(layer: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...]], Any]) -> Iterator[None]:
    """Calls `hook` before the layer, after the hooks that are there already (they may gather its weights)."""
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
