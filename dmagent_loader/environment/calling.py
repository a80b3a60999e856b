"""Calls of any causal language model, and the logits in what it returns.

The signature of ``forward`` says how a model is called, so most models work as they are. All choices depend on the
model alone, not on the batch: ranks that share a model (FSDP) make the same number of calls.

Shapes: B pairs in a call, T tokens of the longest pair, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dmagent_loader.errors import ConfigurationError

LogitsOf: TypeAlias = Callable[[Any, Tensor, Tensor], Tensor]
"""Function from model, input ids and attention mask, both (B, T) int64, to logits (B, T, V)."""

REMEDY = "or pass logits_of=, a function of (model, input_ids, attention_mask), to the Environment"

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class ModelCaller:
    """Calls one model in the way that its signature asks for.

    Token ids are the first positional argument, unless ``input_ids`` stands elsewhere. A model that takes keywords only
    gets them by name: ``input_ids``, for ``forward(**batch)``. Of ``attention_mask``, ``logits_to_keep`` and
    ``targets``, the model gets those that it takes. Many models with ``targets`` return the logits of the last position
    only if they get none; those that return only a loss for them are called without.

    Args:
        model: Unwrapped model.
        logits_of: Function to call instead; None: the model itself.

    Raises:
        ConfigurationError: The model cannot be called with token ids alone.
    """

    def __init__(self, model: Callable[..., Any], logits_of: LogitsOf | None = None) -> None:
        self._model, self._logits_of = model, logits_of
        parameters = _parameters(model)
        names = list(parameters or ())
        takes_any = parameters is None or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._takes_mask = takes_any or "attention_mask" in names
        self._keeps_logits = "logits_to_keep" in names
        self._takes_targets = "targets" in names
        self._ids_name = _name_of_ids(parameters or {})
        if parameters is not None and logits_of is None:
            self._check(parameters)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor, *, num_kept: int) -> Any:
        """What the model returns.

        Args:
            input_ids: (B, T), padded on the right.
            attention_mask: (B, T), 0 on padding. A model that does not take it must be causal, so that padding affects
                no position that is scored.
            targets: (B, T), next token at each position.
            num_kept: Number of trailing positions whose logits are needed.
        """
        if self._logits_of is not None:
            return self._logits_of(self._model, input_ids, attention_mask)
        given: dict[str, Any] = {"attention_mask": attention_mask} if self._takes_mask else {}
        if self._keeps_logits:
            given["logits_to_keep"] = num_kept
        if self._takes_targets:
            given["targets"] = targets
        if self._ids_name is not None:
            return self._model(**{self._ids_name: input_ids}, **given)
        return self._model(input_ids, **given)

    def logits(self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor, *, num_kept: int) -> Tensor:
        """Logits of the model, (B, at least `num_kept`, V); arguments as for a call.

        Raises:
            ConfigurationError: The model does not return such a tensor, or returns several.
        """
        output = self(input_ids, attention_mask, targets, num_kept=num_kept)
        found = _logits_in(output, len(input_ids), num_kept)
        if not found and self._takes_targets:
            self._takes_targets = False
            output = self(input_ids, attention_mask, targets, num_kept=num_kept)
            found = _logits_in(output, len(input_ids), num_kept)
        if len(found) != 1:
            raise ConfigurationError(
                f"the model returned {_described(output)} for input of shape {tuple(input_ids.shape)}, with "
                f"{len(found) or 'no'} tensors that could be logits: it must return logits of shape (batch, length, "
                f"vocabulary), or an object, mapping or tuple with one such tensor or with 'logits'; {REMEDY}"
            )
        return found[0]

    def _check(self, parameters: Mapping[str, inspect.Parameter]) -> None:
        values = list(parameters.values())
        ids = self._ids_name or (values[0].name if values else None)
        given = {ids, "attention_mask", "logits_to_keep", "targets"}
        missing = [p.name for p in values if p.kind not in _VARIABLE and p.default is p.empty and p.name not in given]
        if missing or ids is None:
            fault = f"needs {missing}, which the environment cannot provide" if missing else "takes no token ids"
            raise ConfigurationError(
                f"the model's forward({', '.join(parameters)}) {fault}, so it cannot be scored: give it a forward that "
                f"takes token ids, and optionally attention_mask and targets; {REMEDY}"
            )


def _parameters(model: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """Parameters of the model's call; None: unknown. Wrappers (FSDP, DeepSpeed) pass everything on to ``module``."""
    while True:
        try:
            forward = model.forward if isinstance(model, nn.Module) else model
            parameters = inspect.signature(forward).parameters
        except (TypeError, ValueError):
            return None
        inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module) or any(p.kind not in _VARIABLE for p in parameters.values()):
            return parameters
        model = inner


def _name_of_ids(parameters: Mapping[str, inspect.Parameter]) -> str | None:
    """Name of the parameter that takes the token ids; None: they are the first positional argument."""
    if "input_ids" in list(parameters)[1:]:
        return "input_ids"
    first = next(iter(parameters.values()), None)
    if first is None or first.kind not in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        return None
    return first.name if first.kind is inspect.Parameter.KEYWORD_ONLY else "input_ids"


def _logits_in(output: Any, size: int, num_kept: int) -> list[Tensor]:
    """The tensors in a model's output that could be its logits; only the one of that name, if there is one."""
    parts = {name: part for name, part in _parts(output) if "hidden" not in str(name)}
    named = parts.get("logits")
    return [
        part
        for part in (parts.values() if named is None else [named])
        if isinstance(part, Tensor)
        and part.is_floating_point()
        and part.dim() == 3
        and len(part) == size
        and part.shape[1] >= num_kept
    ]


def _parts(output: Any) -> Iterator[tuple[Any, Any]]:
    """Name or position -> part of a model's output."""
    if isinstance(output, Tensor):
        yield 0, output
    elif isinstance(output, Mapping):
        yield from output.items()
    elif isinstance(output, (tuple, list)) and not hasattr(output, "logits"):
        yield from enumerate(output)
    elif hasattr(output, "logits"):
        yield "logits", output.logits
    elif dataclasses.is_dataclass(output):
        yield from ((field.name, getattr(output, field.name)) for field in dataclasses.fields(output))


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    shapes = {name: tuple(part.shape) for name, part in _parts(output) if isinstance(part, torch.Tensor)}
    return f"a {type(output).__name__}" + (f" with tensors of shapes {shapes}" if shapes else "")
