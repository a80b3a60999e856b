"""Inner products of directions with the gradient of each row of a batch, from one backward pass over the whole batch.

A layer f with parameters p adds <b, (df/dp) v> to the inner product of v with a row's gradient, where b is the gradient
at the layer's output for that row ("ghost" products; Wang et al., In-Run Data Shapley, arXiv 2406.11011; Wang et al.,
GREATS). So no gradient of the whole model is stored, and one batch mixes rows of all domains. There are three rules:

- `nn.Linear`: the row's weight gradient, sum over tokens of b x^T, one layer at a time, times all directions.
- `nn.Embedding`: rows of the direction in place of rows of the weight.
- any other layer without sublayers (norms, convolutions): its own backward pass for each row.

Other layers are refused, and before the first use a trial compares the products with those of whole gradients.

Parameters are frozen during the pass, so autograd computes the gradients of activations only. A layer's input is saved
as autograd saves it, so checkpointing of activations keeps its savings.

Shapes: B rows of a batch, V directions, P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from dmagent_loader.environment.gradients import Flat, Parameters, is_lack_of_memory
from dmagent_loader.errors import InfluenceError

BLOCK_VALUES = 1 << 22
"""Values of the rows' weight gradients that are in memory at a time (16 MB), or those of one row if that is more."""

TOLERANCE, NOISE = 0.1, 1e-4
"""Allowed error of an inner product in the trial, relative to the norms of the parameter's and of the whole gradients.

A part that is missing or belongs to another row is an error of about 1; 16-bit rounding is one of about 0.01. Rounding
alone decides gradients that are 0 in theory, as that of the bias of attention keys.
"""

_SAVED = object()
"""In place of a tensor that autograd saves."""


class NoRule(InfluenceError):
    """The inner products cannot be computed layer by layer in this model."""


class Ghost:
    """Computes inner products of V directions with the gradients of single rows.

    Args:
        parameters: Parameters of the model, not sharded.
        directions: For each parameter, (V, values).
    """

    def __init__(self, parameters: Parameters, directions: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._directions = directions
        self._numbers = {id(p): number for number, p in enumerate(parameters.tensors)}
        self._rows = 0
        self._scores: list[Tensor | None] = []
        self._is_replaying = False

    def products(self, backward: Callable[[], object], rows: int) -> list[Tensor | None]:
        """Inner products for the rows of one batch.

        Args:
            backward: Runs the model forward on the batch and the sum over rows of each row's objective backward.
            rows: B, size of the first axis of the input and output of every layer.

        Returns:
            For each parameter, (V, B) in float32; None: no layer used it.

        Raises:
            NoRule: A layer's input or output does not have the batch's rows as its first axis.
        """
        self._rows, self._scores = rows, [None] * len(self._numbers)
        with self._attached():
            backward()
        scores, self._scores = self._scores, []
        return scores

    @contextmanager
    def _attached(self) -> Iterator[None]:
        tensors = self._parameters.tensors
        # The layers' outputs still need gradients: each tap has an input that requires one.
        anchor = torch.zeros((), requires_grad=True)
        handles = []
        try:
            for name, module in self._parameters.model.named_modules():
                own = {key: p for key, p in module.named_parameters(recurse=False) if id(p) in self._numbers}
                if own and next(module.children(), None) is not None:
                    raise NoRule(f"layer {name!r} ({type(module).__name__}) has parameters of its own beside sublayers")
                if own:
                    handles.append(module.register_forward_hook(self._tap(name, own, anchor), with_kwargs=True))
            for parameter in tensors:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in tensors:
                parameter.requires_grad_(True)
            for handle in handles:
                handle.remove()

    def _tap(self, name: str, own: dict[str, nn.Parameter], anchor: Tensor) -> Callable[..., Tensor | None]:
        """A forward hook that computes the layer's products in the backward pass."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            # The first pass of reentrant checkpointing runs without gradients; the second one counts.
            if self._is_replaying or not torch.is_grad_enabled():
                return None
            inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if not isinstance(output, Tensor) or not inputs:
                raise NoRule(f"layer {name!r} ({type(module).__name__}) does not map tensors to one tensor")
            if output.dim() and len(output) == 1 < self._rows:
                output = output.expand(self._rows, *output.shape[1:])  # as position embeddings, the same for all rows
            elif not output.dim() or len(output) != self._rows or inputs[0].shape[:1] != output.shape[:1]:
                raise NoRule(
                    f"layer {name!r} ({type(module).__name__}) maps {tuple(inputs[0].shape)} to {tuple(output.shape)} "
                    f"in a batch of {self._rows} rows, so its positions cannot be assigned to rows"
                )

            # `record` must not hold the tensors: checkpointing frees them until the backward pass.
            given = [_SAVED if isinstance(value, Tensor) else value for value in (*args, *kwargs.values())]
            positional, names = len(args), list(kwargs)

            def record(saved: Sequence[Tensor], gradient: Tensor) -> None:
                tensors = iter(saved)
                filled = [next(tensors) if value is _SAVED else value for value in given]
                named = dict(zip(names, filled[positional:], strict=True))
                self._record(module, own, filled[:positional], named, gradient)

            return cast(Tensor, cast(Any, _Tap).apply(anchor, output, record, *inputs))

        return hook

    @torch.no_grad()
    def _record(
        self, module: nn.Module, own: dict[str, nn.Parameter], args: list[Any], kwargs: dict[str, Any], gradient: Tensor
    ) -> None:
        """Adds one use of a layer to the scores."""
        gradient = gradient.float()
        directions = {name: self._directions[self._numbers[id(p)]].view(-1, *p.shape) for name, p in own.items()}
        with torch.autocast(gradient.device.type, enabled=False):
            if _is(module, nn.Linear) and not kwargs:
                found = _linear(args[0].float(), gradient, directions)
            elif _is(module, nn.Embedding) and not kwargs:
                found = _embedding(cast(nn.Embedding, module), args[0], gradient, directions)
            else:
                self._is_replaying = True
                try:
                    found = _any_layer(module, args, kwargs, gradient, directions)
                finally:
                    self._is_replaying = False
        for name, scores in found.items():
            number = self._numbers[id(own[name])]
            known = self._scores[number]
            self._scores[number] = scores if known is None else known + scores


class _Tap(torch.autograd.Function):
    """Identity whose backward pass reports the layer's inputs and its output gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor, record: Callable[..., None], *inputs: Tensor) -> Tensor:
        ctx.record = record
        ctx.save_for_backward(*inputs)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors  # checkpointing lets a pass read them once
        ctx.record(inputs, gradients[0])
        return None, gradients[0], None, *[None for _ in inputs]


def check(parameters: Parameters, backward: Callable[[Sequence[int]], object], rows: int) -> None:
    """Compares the inner products of some rows' gradients with each other by layers with those by whole gradients.

    A row's own gradient is the direction in which a part that is missing, or assigned to another row, shows most.

    Args:
        parameters: Parameters of the model.
        backward: Runs the model forward and backward on some of the rows, given by number.
        rows: Number of rows.

    Raises:
        NoRule: They differ; the message names the parameter.
    """
    gradients: list[Flat] = []
    for row in range(rows):
        backward([row])
        gradients.append(parameters.gradient())
        parameters.clear_gradient()
    directions = [torch.stack(parts) for parts in zip(*gradients, strict=True)]
    try:
        found = Ghost(parameters, directions).products(lambda: backward(range(rows)), rows)
    except NoRule:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        if is_lack_of_memory(error):
            raise
        # The model itself works: it ran above.
        raise NoRule(f"the model fails with access to its layers ({type(error).__name__}: {error})") from error
    exact = torch.stack([direction @ direction.T for direction in directions])
    squares = exact.diagonal(dim1=1, dim2=2)
    names = {id(p): name for name, p in parameters.model.named_parameters()}
    total = squares.sum(dim=0)
    for parameter, scores, expected, square in zip(parameters.tensors, found, exact, squares, strict=True):
        name = names[id(parameter)]
        if scores is None:
            if bool(square.any()):
                raise NoRule(f"parameter {name!r} has a gradient, but the layer that holds it is not called")
            continue
        allowed = TOLERANCE * square.outer(square).sqrt() + NOISE * total.outer(total).sqrt()
        if not bool(((scores - expected).abs() <= allowed).all()):
            raise NoRule(f"the gradient of {name!r} does not follow from its layer's input and output in each row")


def _is(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what this kind of layer computes."""
    return isinstance(module, kind) and type(module).forward is kind.forward and "forward" not in vars(module)


def _linear(inputs: Tensor, gradient: Tensor, directions: dict[str, Tensor]) -> dict[str, Tensor]:
    rows, width = len(gradient), gradient.shape[-1]
    inputs = inputs.reshape(rows, -1, inputs.shape[-1])
    gradient = gradient.reshape(rows, -1, width)
    found = {}
    if "weight" in directions:
        flat = directions["weight"].flatten(1)
        block = max(1, BLOCK_VALUES // flat.shape[1])
        parts = []
        for start in range(0, rows, block):
            part = slice(start, start + block)
            weights = torch.bmm(gradient[part].transpose(1, 2), inputs[part])
            parts.append(flat @ weights.flatten(1).T)
        found["weight"] = torch.cat(parts, dim=1)
    if "bias" in directions:
        found["bias"] = directions["bias"] @ gradient.sum(dim=1).T
    return found


def _embedding(module: nn.Embedding, ids: Tensor, gradient: Tensor, directions: dict[str, Tensor]) -> dict[str, Tensor]:
    if module.padding_idx is not None:
        gradient = gradient * (ids != module.padding_idx)[..., None]
    # The ids may be the same for all rows, without an axis of the batch's size.
    looked_up = (nn.functional.embedding(ids, direction) for direction in directions["weight"])
    return {"weight": torch.stack([(part * gradient).flatten(1).sum(dim=1) for part in looked_up])}


def _any_layer(
    module: nn.Module, args: list[Any], kwargs: dict[str, Any], gradient: Tensor, directions: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Products with the layer's gradient for each row, which it computes in float32 on a batch of this row."""
    rows = len(gradient)
    given = [_raised(value) for value in (*args, *kwargs.values())]
    # An input without rows, as the positions of position embeddings, is the same for all.
    by_row = [isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows for value in given]
    weights = {name: p.detach().float() for name, p in module.named_parameters(recurse=False)}

    def row_gradient(row_gradient: Tensor, *row: Tensor) -> dict[str, Tensor]:
        parts = iter(row)
        filled = [next(parts)[None] if has_rows else value for has_rows, value in zip(by_row, given, strict=True)]
        named = dict(zip(kwargs, filled[len(args) :], strict=True))

        def output(own: dict[str, Tensor]) -> Tensor:
            return cast(Tensor, functional_call(module, {**weights, **own}, tuple(filled[: len(args)]), named))[0]

        return cast(dict[str, Tensor], vjp(output, {name: weights[name] for name in directions})[1](row_gradient)[0])

    block = max(1, BLOCK_VALUES // sum(weight.numel() for weight in weights.values()))
    inputs = [value for has_rows, value in zip(by_row, given, strict=True) if has_rows]
    gradients = vmap(row_gradient, chunk_size=block)(gradient, *inputs)
    return {name: stacked.flatten(1) @ gradients[name].flatten(1).T for name, stacked in directions.items()}


def _raised(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
