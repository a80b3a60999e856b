"""Gradients and temporary displacements of a model's parameters.

All functions work on *local* tensors: the whole parameter, or this rank's shard of it under FSDP 2. Results are in
float32, whatever the model's dtype.

Shapes: N local values of all trainable parameters, P trainable parameters, V directions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dmagent_loader.environment.scoring import scoring_state
from dmagent_loader.errors import ConfigurationError, InfluenceError
from dmagent_loader.mixture.simplex import FloatArray

Flat = list[Tensor]
"""One float32 tensor, (values,), for each trainable parameter."""


class Parameters:
    """The trainable parameters of a model.

    Attributes:
        is_sharded: Whether the parameters are sharded over ranks (FSDP 2), which then compute each gradient together.

    Args:
        model: Unwrapped model.

    Raises:
        ConfigurationError: The model is not a module, or has no trainable parameter.
        InfluenceError: The gradients cannot be computed without side effects, or the model is sharded in an unsupported
            way.
    """

    def __init__(self, model: object) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigurationError(
                f"a {type(model).__name__} has no parameters, so training cannot change it: pass a torch.nn.Module"
            )
        fsdp = sys.modules.get("torch.distributed.fsdp")  # nobody can have wrapped a model without it
        if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
            raise InfluenceError(
                "the model is wrapped in FullyShardedDataParallel (FSDP 1), whose flat parameters cannot be saved "
                "and restored: shard it with torch.distributed.fsdp.fully_shard (FSDP 2), or use the policy "
                "'question-topics'"
            )
        self.model = model
        self.tensors = [p for p in model.parameters() if p.requires_grad]
        if not self.tensors:
            raise ConfigurationError(
                "the model has no trainable parameter, so training cannot change it: pass the model that is trained"
            )
        if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in self.tensors):
            raise InfluenceError(
                "the optimizer steps inside the backward pass (post-accumulate-grad hooks), so computing a "
                "gradient would train the model: use an optimizer that steps after the backward pass, or the policy "
                "'question-topics'"
            )
        sharded = [is_distributed(p) for p in self.tensors]
        self.is_sharded = any(sharded)
        if self.is_sharded and not all(sharded):
            raise InfluenceError(
                f"{sharded.count(False)} of {len(sharded)} trainable parameters are not sharded by fully_shard, so "
                "their gradients are not reduced over ranks: shard the whole model, or use the policy 'question-topics'"
            )

    def local(self) -> list[Tensor]:
        """Local part of each parameter; writing to it changes the model."""
        return [_local(p.detach()) for p in self.tensors]

    def gradient(self) -> Flat:
        """A float32 copy of the current gradient; zeros where a parameter has none."""
        flat = []
        for parameter, local in zip(self.tensors, self.local(), strict=True):
            grad = parameter.grad
            if grad is None:
                flat.append(torch.zeros(local.numel(), dtype=torch.float32, device=local.device))
                continue
            grad = _local(grad.to_dense() if grad.is_sparse else grad)
            flat.append(grad.detach().reshape(-1).to(torch.float32, copy=True))
        return flat

    def clear_gradient(self) -> None:
        """Resets the gradient, so that the next backward pass starts from zero."""
        for parameter in self.tensors:
            parameter.grad = None

    def copies(self) -> FloatArray:
        """Number of ranks that hold each local value, (P,): a sum over ranks counts it this many times."""
        return np.array([_copies(p) for p in self.tensors], dtype=np.float64)

    def reset_after_failure(self) -> None:
        """Makes a sharded model usable again after a forward or backward pass that failed half-way.

        Raises:
            ConfigurationError: This version of torch cannot do it.
        """
        if not self.is_sharded:
            return
        for parameter in self.model.parameters():
            parameter.grad = None  # weights that are gathered just now would keep theirs for the next backward pass
        for root in _fsdp_roots(self.model):
            if not hasattr(root, "reset_iter_state"):
                raise ConfigurationError(
                    f"measuring influence failed inside a sharded model, which torch {torch.__version__} cannot reset "
                    "(FSDPModule.reset_iter_state), so training cannot continue: use a newer torch, fewer tokens per "
                    "call (batch_tokens=) or the policy 'question-topics'"
                )
            cast(Any, root).reset_iter_state()

    def reshard(self) -> None:
        """Frees gathered weights, so that the next forward pass gathers the current values."""
        for module in self.model.modules() if self.is_sharded else ():
            reshard = getattr(module, "reshard", None)
            if callable(reshard):
                reshard()


def products(directions: Sequence[Tensor], flat: Flat, copies: FloatArray) -> FloatArray:
    """This rank's share of the inner products of V directions with a gradient: (V,).

    Args:
        directions: For each parameter, (V, values).
        flat: Gradient.
        copies: See `Parameters.copies`.
    """
    total = np.zeros(len(directions[0]))
    for direction, part, count in zip(directions, flat, copies, strict=True):
        with torch.autocast(part.device.type, enabled=False):
            total += (direction @ part).double().cpu().numpy() / count
    return total


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, CUDA or torch's CPU allocator means out of memory."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """`scoring_state` with gradients enabled; restores each parameter's ``.grad`` on exit, as the same tensor object.

    Modules with activation checkpointing stay in training mode, because they save memory only in that mode; dropout
    modules do not.
    """
    # All parameters, not only trainable ones: an earlier backward pass may have reached parameters frozen since.
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    checkpointing = [m for m in model.modules() if m.training and getattr(m, "gradient_checkpointing", False) is True]
    with scoring_state(model), torch.enable_grad():
        try:
            for parameter, _ in kept:
                parameter.grad = None
            for module in checkpointing:
                module.training = True
            yield
        finally:
            for parameter, grad in kept:
                parameter.grad = grad


@contextmanager
def displaceable(parameters: Parameters, saved: Sequence[Tensor]) -> Iterator[Callable[[Flat | None, float], None]]:
    """Yields a function that sets the parameters to their start plus a multiple of a direction; None: to the start.

    On exit the parameters are restored bit for bit from a copy; subtracting the step would leave rounding errors.

    Args:
        parameters: Parameters of the model.
        saved: Copies of `Parameters.local`.
    """
    local = parameters.local()

    @torch.no_grad()
    def move(direction: Flat | None, factor: float) -> None:
        for tensor, start in zip(local, saved, strict=True):
            tensor.copy_(start)
        for tensor, part in zip(local, direction or [], strict=direction is not None):
            tensor.add_(part.view_as(tensor), alpha=factor)
        parameters.reshard()

    try:
        yield move
    finally:
        move(None, 0.0)


def adam_moments(optimizer: object, parameters: Parameters) -> Flat | None:
    """Square roots of the optimizer's bias-corrected second moments plus its epsilon; None if any is missing.

    Args:
        optimizer: `torch.optim.Optimizer` of the Adam family, possibly wrapped by accelerate; None: unknown.
        parameters: Parameters of the model.
    """
    state: Any = getattr(optimizer, "state", None)
    groups: Any = getattr(optimizer, "param_groups", None)
    if state is None or groups is None:
        return None
    group_of = {id(p): group for group in groups for p in group["params"]}
    found: Flat = []
    for parameter in parameters.tensors:
        group, own = group_of.get(id(parameter)), state.get(parameter, {})
        second, step = own.get("exp_avg_sq"), own.get("step")
        if group is None or step is None or not isinstance(second, Tensor) or second.shape != parameter.shape:
            return None
        if not float(step) > 0 or "betas" not in group:
            return None
        correction = 1.0 - float(group["betas"][1]) ** float(step)
        second = _local(second.detach()).reshape(-1).to(torch.float32, copy=True)
        found.append(second.div_(correction).sqrt_().add_(float(group.get("eps", 1e-8))))
    return found


def _fsdp_roots(module: nn.Module) -> list[nn.Module]:
    """The outermost modules that `fully_shard` was applied to."""
    if hasattr(module, "unshard") and hasattr(module, "reshard"):
        return [module]
    return [root for child in module.children() for root in _fsdp_roots(child)]


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`; not an isinstance check, since its module differs between torch versions."""
    return hasattr(tensor, "to_local")


def _local(tensor: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, tensor).to_local()) if is_distributed(tensor) else tensor


def _copies(parameter: Tensor) -> int:
    if not is_distributed(parameter):
        return 1
    mesh, placements = cast(Any, parameter).device_mesh, cast(Any, parameter).placements
    return int(np.prod([mesh.size(axis) for axis, place in enumerate(placements) if place.is_replicate()]))
