"""Several processes that train one model: choices of the first, and sums over all."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Choice = TypeVar("Choice")


def agreed(choice: Choice) -> Choice:
    """What the first rank has chosen, on every rank; without a process group, one's own.

    Ranks differ: their batch norms have seen other data, and their random numbers are others. Every
    rank must call it, so all must prune.
    """
    if alone():
        return choice
    choices = [choice]
    dist.broadcast_object_list(choices, src=0)
    return choices[0]


@torch.no_grad()
def copy_first(model: nn.Module) -> None:
    """Give the model the parameters and buffers that it has on the first rank, in place."""
    if alone():
        return
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = agreed({name: tensor.detach().cpu() for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def summed(values: Tensor) -> Tensor:
    """The sum over the values of all ranks; without a process group, the values.

    Every rank must call it, with values of one shape and type. NCCL sums on GPUs only.
    """
    if alone():
        return values
    nccl = dist.get_backend() == dist.Backend.NCCL
    total = values.to("cuda" if nccl else values.device, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


def averaged(values: Tensor) -> Tensor:
    """The mean over the values of all ranks, as `summed` adds them up."""
    return values if alone() else summed(values) / dist.get_world_size()


def alone() -> bool:
    """Whether there is no process group, or one of a single process."""
    group = dist.is_available() and dist.is_initialized()
    return not group or dist.get_world_size() == 1
