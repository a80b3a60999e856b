"""Tries Megatron-core, Megatron-LM and NeMo programs on a machine without a GPU.

    python -m dmagent_loader.testing.on_cpu SCRIPT [OPTIONS]
    torchrun --nproc-per-node 2 -m dmagent_loader.testing.on_cpu SCRIPT [OPTIONS]

SCRIPT is a file with a function ``main()``, such as `examples/megatron_pretrain.py` and `examples/nemo_pretrain.py`.

These frameworks name ``device="cuda"`` and call `torch.cuda` in places that no setting reaches. Within `cuda_on_cpu`
such calls use the CPU. Only names of torch are replaced: the code that runs is the framework's, the script's and this
package's own, on tensors of another device. The GPU's random state is the CPU's, so dropout and its states at resume
behave as in a real run.

Settings that the script must choose itself, because they call CUDA kernels: no fused kernels, no distributed optimizer,
no gradient clipping, and gloo as the backend.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import multiprocessing
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # lists the names of torch.cuda when it is loaded: before they are replaced
from torch.overrides import TorchFunctionMode

from dmagent_loader.errors import ConfigurationError

__all__ = ["cuda_on_cpu", "main"]

CPU = torch.device("cpu")


@contextlib.contextmanager
def cuda_on_cpu(*, available: bool = False) -> Iterator[None]:
    """Within it, code that requests a GPU gets the CPU. On a machine with a GPU it does nothing.

    Put it around the whole program, in the main thread only: one of its parts is local to the thread.

    Args:
        available: Whether `torch.cuda.is_available` returns True and the driver's properties are made up. Megatron-LM's
            ``pretrain()`` needs it; Lightning and NeMo would then select a GPU.
    """
    if torch.cuda.is_available():
        yield
        return
    with contextlib.ExitStack() as stack:
        for name, substitute in {**_CUDA, **(_DRIVER if available else {})}.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, substitute))
        stack.enter_context(mock.patch.object(torch.nn.Module, "cuda", lambda module, device=None: module))
        for name in ("ByteTensor", "FloatTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "LongTensor"):
            stack.enter_context(mock.patch.object(torch.cuda, name, getattr(torch, name)))
        if available:  # a torch built for CUDA would query the driver in each optimizer step
            stack.enter_context(mock.patch.object(torch.accelerator, "current_accelerator", _nothing))
        _keep_random_states(stack)
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compilers would look through these substitutes
        stack.enter_context(_DevicesAreCpu())
        yield


def main(arguments: Sequence[str] | None = None) -> None:
    """Calls the function ``main()`` of a script within `cuda_on_cpu`.

    The script is imported instead of run, because distributed checkpointing starts helper processes, which import the
    main program again.

    Args:
        arguments: Path of the script, and its options; None: those of the command line.

    Raises:
        ConfigurationError: There is no such script, or it has no function ``main()``.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or not os.path.isfile(arguments[0]):
        raise ConfigurationError(
            f"{arguments[0] if arguments else 'no file'} cannot be run: pass the path of a Python script, then its "
            "options"
        )
    spec = importlib.util.spec_from_file_location("script", arguments[0])
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"{arguments[0]} is not a Python file: pass the path of a Python script")
    with cuda_on_cpu():
        sys.argv = arguments
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        if not hasattr(script, "main"):
            raise ConfigurationError(
                f"{arguments[0]} has no function main(), which is what would be run: put the program into one"
            )
        script.main()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()


def _leave() -> None:
    """Stops the helpers of distributed checkpointing, and ends a gloo process in a way that never aborts."""
    for helper in multiprocessing.active_children():
        helper.terminate()
        helper.join(5)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


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
    """A CUDA stream on which all work is done already."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _done(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = record_event = synchronize = record = wait = _done


def _on_cpu(device: Any) -> Any:
    """The CPU for a GPU, given as text, number or `torch.device`; anything else unchanged."""
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
    "is_initialized": lambda: True,  # so what torch defers until then is done at once
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


_DRIVER: dict[str, Any] = {
    "is_available": lambda: True,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: SimpleNamespace(total_memory=1 << 34, name="", major=9, minor=0),
    "memory_stats": lambda device=None: defaultdict(int),
    **dict.fromkeys(
        ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), lambda device=None: 0
    ),
}


def _keep_random_states(stack: contextlib.ExitStack) -> None:
    """Megatron switches to a random state of its own for dropout."""
    stack.enter_context(mock.patch.object(torch.cuda.random, "get_rng_state", _state))
    # It warns that the CPU's random state changed in the GPU's context, at every dropout.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
    _leave()
