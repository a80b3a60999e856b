"""The only file that touches `torch.distributed`; without a process group every function acts for one process.

A rank that fails must not leave the others waiting, and ranks that differ must not continue training. Any work that can
fail or differ on one rank is therefore a step that all ranks end `together`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from dmagent_loader.errors import RankError

T = TypeVar("T")

_SHOWN_CHARACTERS = 200

_SHARDED_COLLECTIVES = ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor")
"""Functions of `torch.distributed` that FSDP 2 calls in its passes; older versions of torch have two of them."""


def is_active() -> bool:
    """Whether a process group exists in this process."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Rank of this process in the default group, 0 without one."""
    return dist.get_rank() if is_active() else 0


def get_world_size() -> int:
    """Number of processes in the default group, 1 without one."""
    return dist.get_world_size() if is_active() else 1


class Interrupted(RuntimeError):
    """Another rank failed inside `interruptible`."""


@contextmanager
def together(step: str, *, shared: tuple[type[Exception], ...] = ()) -> Iterator[dict[str, Any]]:
    """A step that succeeds on all ranks or on none, and compares facts between them.

    Args:
        step: Description of the step, for messages; the same on all ranks.
        shared: Errors, made from one text, that every rank raises if any rank does: those that all ranks handle in the
            same way. If several ranks fail in this way, all raise the error of the first of them.

    Yields:
        A dictionary for facts that must be the same on all ranks: name -> value, compared as text.

    Raises:
        RankError: Another rank failed, differs, is at another step, or does not answer. A rank that failed itself
            raises its own error.

    Example:
        >>> with together("loading the state") as facts:
        ...     facts["consumed"] = 640
    """
    facts: dict[str, Any] = {}
    if not is_active():
        yield facts
        return
    fault: Exception | None = None
    try:
        yield facts
    except Exception as error:
        fault = error
    report = (
        step,
        None if fault is None else f"{type(fault).__name__}: {fault}",
        {k: str(v) for k, v in facts.items()},
    )
    common = (type(fault), str(fault)) if isinstance(fault, shared) else None
    try:
        gathered = all_gather_object((report, common), step)
    except RankError as lost:
        raise (fault or lost) from None
    reports = [other for other, _ in gathered]
    if fault is not None and common is None:
        raise fault
    first = next((found for _, found in gathered if found is not None), None)
    if first is not None and all(
        other[0] == step and (found is not None or other[1] is None) for other, found in gathered
    ):
        kind, text = first
        raise fault if fault is not None and common == first else kind(text)
    _refuse_differences(step, reports)


def report(step: str, state: str, fault: BaseException | None = None) -> list[str]:
    """Tells all ranks the state of this one, in the middle of a step.

    Args:
        step: Description of the step, for messages; the same on all ranks.
        state: State of this rank.
        fault: Error that ends the step on this rank.

    Returns:
        The states of all ranks, in rank order.

    Raises:
        RankError: Another rank failed, is at another step, or does not answer. A rank that failed itself raises its
            own error.
    """
    text = None if fault is None else f"{type(fault).__name__}: {fault}"
    try:
        gathered = all_gather_object(((step, text, dict[str, str]()), state), step)
    except RankError as lost:
        raise (fault or lost) from None
    if fault is not None:
        raise fault
    _refuse_differences(step, [other for other, _ in gathered])
    return [other for _, other in gathered]


@contextmanager
def interruptible(step: str) -> Iterator[None]:
    """An action in which the ranks share one sharded model (FSDP 2): a rank that fails stops the others.

    Otherwise they would wait for it in the model's next collective without end. Before each collective of FSDP, the
    ranks vote on whether one of them has failed; a rank that fails casts its vote on the way out. All ranks must call
    the model equally often.

    Args:
        step: Description of the step, for messages; the same on all ranks.

    Raises:
        Interrupted: Another rank failed. The rank that failed raises its own error.
    """

    def vote(failed: bool) -> None:
        if all_reduce_max(int(failed), step) and not failed:
            raise Interrupted(f"{step}: another rank failed")

    def voted(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            vote(failed=False)
            return collective(*args, **kwargs)

        return call

    original = {name: getattr(dist, name) for name in _SHARDED_COLLECTIVES if hasattr(dist, name)}
    try:
        for name, collective in original.items():
            setattr(dist, name, voted(collective))
        yield
    except (Interrupted, RankError):
        raise
    except Exception:
        vote(failed=True)
        raise
    else:
        vote(failed=False)
    finally:
        for name, collective in original.items():
            setattr(dist, name, collective)


def _refuse_differences(step: str, reports: list[tuple[str, str | None, dict[str, str]]]) -> None:
    elsewhere = [f"rank {rank} is at {other!r}" for rank, (other, _, _) in enumerate(reports) if other != step]
    if elsewhere:
        raise RankError(
            f"rank {get_rank()} is at {step!r}, but {', '.join(elsewhere)}: all ranks must take the same steps, "
            "in the same order and at the same number of consumed samples"
        )
    failed = [f"rank {rank}: {fault}" for rank, (_, fault, _) in enumerate(reports) if fault is not None]
    if failed:
        raise RankError(f"{step} failed on {len(failed)} of {len(reports)} ranks; {'; '.join(failed)}")
    for name in reports[0][2]:
        by_value: dict[str, list[int]] = {}
        for rank, (_, _, facts) in enumerate(reports):
            by_value.setdefault(facts.get(name, "missing"), []).append(rank)
        if len(by_value) > 1:
            values = "; ".join(f"{_ranks(ranks)}: {_short(value)}" for value, ranks in by_value.items())
            raise RankError(
                f"{step}: the ranks differ in {name} ({values}), so they would train on samples twice or never: start "
                "all ranks with the same shards, settings and state"
            )


def broadcast_object(value: T, step: str, source: int = 0) -> T:
    """The value of the `source` rank, on every rank. For small, trusted objects only: they are pickled.

    Args:
        value: Value of this rank; only that of `source` counts.
        step: Description of the step, for the message if other ranks are gone.
        source: Rank that provides the value.

    Raises:
        RankError: Another rank does not answer.
    """
    if not is_active():
        return value
    box = [value]
    _collective(step, lambda: dist.broadcast_object_list(box, src=source, device=_device()))
    return box[0]


def broadcast_bytes(data: bytes | None, size: int, step: str, source: int) -> bytes:
    """The bytes of the `source` rank, on every rank.

    Args:
        data: The bytes; None on the other ranks.
        size: Their number, which all ranks know.
        step: Description of the step, for the message if other ranks are gone.
        source: Rank that provides them.

    Raises:
        RankError: Another rank does not answer.
    """
    if not is_active():
        return data or b""
    own = np.zeros(size, np.uint8) if data is None else np.frombuffer(data, np.uint8).copy()
    tensor = torch.from_numpy(own).to(_device())

    def broadcast() -> bytes:
        dist.broadcast(tensor, src=source)
        return tensor.cpu().numpy().tobytes()  # on a GPU, a failure surfaces only here

    return _collective(step, broadcast)


def all_gather_object(value: T, step: str) -> list[T]:
    """The values of all ranks, in rank order; arguments and errors as in `broadcast_object`."""
    if not is_active():
        return [value]
    values: list[Any] = [None] * get_world_size()
    _collective(step, lambda: dist.all_gather_object(values, value))
    return values


def all_reduce_sum(values: NDArray[np.float64], step: str) -> NDArray[np.float64]:
    """The element-wise sum over all ranks, in float64; errors as in `broadcast_object`."""
    if not is_active():
        return values
    tensor = torch.from_numpy(np.array(values, dtype=np.float64)).to(_device())
    return np.asarray(_all_reduce(tensor, dist.ReduceOp.SUM, step).numpy(), dtype=np.float64)


def sum_over_ranks(tensors: Sequence[torch.Tensor], step: str) -> None:
    """Replaces each tensor by its sum over all ranks, where it lies; errors as in `broadcast_object`."""
    if is_active():
        _collective(step, lambda: [dist.all_reduce(tensor) for tensor in tensors])


def all_reduce_max(value: int, step: str) -> int:
    """The largest value of all ranks; errors as in `broadcast_object`."""
    if not is_active():
        return value
    tensor = torch.tensor([value], dtype=torch.int64, device=_device())
    return int(_all_reduce(tensor, dist.ReduceOp.MAX, step).item())


def barrier(step: str) -> None:
    """Waits for all ranks; errors as in `broadcast_object`."""
    if is_active():
        _collective(step, lambda: dist.barrier())


def _all_reduce(tensor: torch.Tensor, operation: Any, step: str) -> torch.Tensor:
    def reduce() -> torch.Tensor:
        dist.all_reduce(tensor, op=operation)
        return tensor.cpu()  # on a GPU, a failure surfaces only here

    return _collective(step, reduce)


def _collective(step: str, action: Callable[[], T]) -> T:
    started = time.monotonic()
    try:
        return action()
    except RuntimeError as error:
        seconds = time.monotonic() - started
        raise RankError(
            f"{step}: rank {get_rank()} of {get_world_size()} waited {seconds:.1f} s for the other ranks, but one does "
            "not answer: it has died, hangs, or is elsewhere in the program. Look for the first error in the logs of "
            "all ranks, then start the run again from its newest checkpoint; init_process_group(timeout=...) bounds "
            f"the wait. Error of the process group: {_short(str(error).strip().splitlines()[0])}"
        ) from error


def _device() -> torch.device:
    """Device of the collectives: NCCL needs tensors on the GPU, gloo uses the CPU."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(str(number) for number in numbers[:8])}" + (
        f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    )


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
