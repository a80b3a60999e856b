"""Gradients and small displacements of a model's parameters, none of which stays behind.

Everything here works on *local* tensors: the whole of a parameter, or this rank's shard of it under FSDP2. All of it is
kept in float32, whatever the model's type.

Shapes: N local values of all trainable parameters, P trainable parameters, V directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from dmagent_loader.environment.scoring import scoring_state
from dmagent_loader.errors import ConfigurationError, InfluenceError
from dmagent_loader.mixture.simplex import FloatArray

Flat = list[Tensor]
"""One float32 tensor, (values,), for each trainable parameter."""


class Parameters:
    """The trainable parameters of a model.

    Attributes:
        is_sharded: Whether they lie on several ranks (FSDP2): ranks then compute each gradient together.

    Args:
        model: Unwrapped.

    Raises:
        ConfigurationError: The model is no module or has no trainable parameter.
        InfluenceError: Its gradients cannot be taken without side effects.
    """

    def __init__(self, model: object) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigurationError(
                f"a {type(model).__name__} has no parameters, so that no training can move it: pass a torch.nn.Module"
            )
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise InfluenceError(
                "the model is wrapped in FullyShardedDataParallel (FSDP 1), whose flat parameters cannot be set aside: "
                "shard it with torch.distributed.fsdp.fully_shard (FSDP 2), or use the policy 'question-topics'"
            )
        self.model = model
        self.tensors = [p for p in model.parameters() if p.requires_grad]
        if not self.tensors:
            raise ConfigurationError(
                "the model has no trainable parameter, so that no domain can change it: pass the model as it is trained"
            )
        if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in self.tensors):
            raise InfluenceError(
                "the optimizer steps inside the backward pass (hooks after the accumulation of gradients), so that "
                "taking a gradient would train the model: use an optimizer that steps afterwards, or the policy "
                "'question-topics'"
            )
        sharded = [is_distributed(p) for p in self.tensors]
        self.is_sharded = any(sharded)
        if self.is_sharded and not all(sharded):
            raise InfluenceError(
                f"{sharded.count(False)} of {len(sharded)} trainable parameters are left out of fully_shard, so that "
                "nobody adds their gradients over ranks: shard the whole model, or use the policy 'question-topics'"
            )

    def local(self) -> list[Tensor]:
        """The local part of each parameter; writing to it changes the model."""
        return [_local(p.detach()) for p in self.tensors]

    def gradient(self) -> Flat:
        """A float32 copy of the gradient now in place; zeros where there is none."""
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
        """Lets the next backward pass begin at zero."""
        for parameter in self.tensors:
            parameter.grad = None

    def copies(self) -> FloatArray:
        """How many ranks hold each local value, (P,): their sum over ranks counts it so often."""
        return np.array([_copies(p) for p in self.tensors], dtype=np.float64)

    def reshard(self) -> None:
        """Frees gathered weights, so that the next forward pass gathers those of now."""
        for module in self.model.modules() if self.is_sharded else ():
            reshard = getattr(module, "reshard", None)
            if callable(reshard):
                reshard()


def products(directions: Sequence[Tensor], flat: Flat, copies: FloatArray) -> FloatArray:
    """Inner products of directions with a gradient, this rank's share of the sum: (V,).

    Args:
        directions: For each parameter (V, values).
        flat: The gradient.
        copies: See `Parameters.copies`.
    """
    total = np.zeros(len(directions[0]))
    for direction, part, count in zip(directions, flat, copies, strict=True):
        total += (direction @ part).double().cpu().numpy() / count
    return total


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """`scoring_state` with gradients: on leaving, parameters' ``.grad`` is what it was, the very same tensors.

    Modules that checkpoint activations stay in training mode, because they save memory in that mode only; dropout
    modules do not.
    """
    # By module and not by parameter list: a backward pass may also reach parameters that are frozen afterwards.
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
def displaceable(parameters: Parameters) -> Iterator[Callable[[Flat | None, float], None]]:
    """Yields a function that moves the parameters by a multiple of a direction from where they are, or back (None).

    On leaving they are copied back from a copy made on entering, bit for bit: subtracting would leave rounding errors.
    """
    local = parameters.local()
    saved = [tensor.clone() for tensor in local]

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
    """Square roots of the optimizer's bias-corrected second moments plus its epsilon; None if it has not got them all.

    Args:
        optimizer: A `torch.optim.Optimizer` of the Adam family, perhaps wrapped by accelerate; None: no optimizer.
        parameters: The model's.
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


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a `DTensor`, whose module has another name in each version of torch."""
    return hasattr(tensor, "to_local")


def _local(tensor: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, tensor).to_local()) if is_distributed(tensor) else tensor


def _copies(parameter: Tensor) -> int:
    if not is_distributed(parameter):
        return 1
    mesh, placements = cast(Any, parameter).device_mesh, cast(Any, parameter).placements
    return int(np.prod([mesh.size(axis) for axis, place in enumerate(placements) if place.is_replicate()]))
