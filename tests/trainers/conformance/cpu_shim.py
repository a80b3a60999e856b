"""Lets Megatron-core and NeMo train on a machine without a GPU, for tests only.

Both name ``device="cuda"`` and call `torch.cuda` in places that no setting reaches. Inside `cuda_on_cpu` these mean the
CPU. Only names of torch are replaced: what runs is Megatron-core's, NeMo's and this package's own code, on tensors of
another device. The GPU's random state is the CPU's, so that dropout and its states at resume are as in a real run.

Not undone by it, so that programs have to set it: fused kernels, the distributed optimizer and gradient clipping (which
call CUDA kernels), and ``backend="gloo"``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # lists the names of torch.cuda when it is loaded: before they are replaced
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


@contextlib.contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Within it, whatever asks for a GPU gets the CPU. With a GPU it does nothing.

    Use it around the whole program, and only in the main thread: the mode below is thread-local.
    """
    if torch.cuda.is_available():
        yield
        return
    with contextlib.ExitStack() as stack:
        for name, substitute in _CUDA.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, substitute))
        stack.enter_context(mock.patch.object(torch.nn.Module, "cuda", lambda module, device=None: module))
        for name in ("ByteTensor", "FloatTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "LongTensor"):
            stack.enter_context(mock.patch.object(torch.cuda, name, getattr(torch, name)))
        _keep_random_states(stack)
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compilers would look through what stands here
        stack.enter_context(_DevicesAreCpu())
        yield


class _DevicesAreCpu(TorchFunctionMode):
    """Sends tensors to the CPU that are made on, or moved to, a GPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "cuda":
            return args[0]
        if name == "pin_memory":
            return args[0]
        if name == "to":
            args = tuple(_on_cpu(argument) for argument in args)
        if "device" in given:
            given["device"] = _on_cpu(given["device"])
        if given.get("pin_memory"):
            given["pin_memory"] = False  # pinning needs a driver
        return func(*args, **given)


class _Stream:
    """A CUDA stream on which everything has been done already."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _done(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = record_event = synchronize = record = wait = _done


def _on_cpu(device: Any) -> Any:
    """A device as Megatron writes it: text, number, `torch.device`; anything else is left as it is."""
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, int) and not isinstance(device, bool):
        return CPU
    if isinstance(device, str) and device.split(":")[0] == "cuda":
        return CPU
    return device


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


class _Generators:
    """`torch.cuda.default_generators`, with the CPU's generator as that of every device."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


def _state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _restore(state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(state)


_CUDA: dict[str, Any] = {
    "device_count": lambda: 1,  # NeMo makes Megatron's random states where there is a GPU
    "current_device": lambda: 0,
    "is_initialized": lambda: True,  # so that what torch puts off until then is done at once
    "set_device": _nothing,
    "synchronize": _nothing,
    "empty_cache": _nothing,
    "reset_peak_memory_stats": _nothing,
    "manual_seed": torch.default_generator.manual_seed,
    "get_rng_state": _state,
    "set_rng_state": _restore,
    "default_generators": _Generators(),
    "is_current_stream_capturing": lambda: False,
    "Stream": _Stream,
    "Event": _Stream,
    "current_stream": lambda device=None: _Stream(),
    "default_stream": lambda device=None: _Stream(),
    "stream": lambda stream: contextlib.nullcontext(),
}


def _keep_random_states(stack: contextlib.ExitStack) -> None:
    """Megatron changes over to a random state of its own for dropout."""
    stack.enter_context(mock.patch.object(torch.cuda.random, "get_rng_state", _state))
    # It warns that the CPU's random state changed in the GPU's context, at every dropout.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
