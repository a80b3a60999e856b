"""The only file that touches `torch.distributed`; without a process group every function is the one-process case."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from dmagent_loader.simplex import FloatArray

T = TypeVar("T")


def is_active() -> bool:
    """Whether a process group exists in this process."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Rank of this process in the default group, 0 without one."""
    return dist.get_rank() if is_active() else 0


def get_world_size() -> int:
    """Number of processes in the default group, 1 without one."""
    return dist.get_world_size() if is_active() else 1


def broadcast_object(value: T, source: int = 0) -> T:
    """The value of the `source` rank, on every rank. Only small, trusted objects of our own processes."""
    if not is_active():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, device=_device())
    return box[0]


def all_gather_object(value: T) -> list[T]:
    """The values of all ranks, in rank order."""
    if not is_active():
        return [value]
    values: list[T | None] = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return [v for v in values if v is not None]


def all_reduce_sum(values: FloatArray) -> FloatArray:
    """The element-wise sum over all ranks, in float64."""
    if not is_active():
        return values
    tensor = torch.from_numpy(np.array(values, dtype=np.float64)).to(_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return np.asarray(tensor.cpu().numpy(), dtype=np.float64)


def all_reduce_max(value: int) -> int:
    """The largest value of all ranks."""
    if not is_active():
        return value
    tensor = torch.tensor([value], dtype=torch.int64, device=_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())


def barrier() -> None:
    """Waits for all ranks."""
    if is_active():
        dist.barrier()


def _device() -> torch.device:
    """Where collectives run: NCCL needs tensors on the GPU, gloo takes the CPU."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
