"""`Flow`: which channel stands at every position of a value, and how values move it.

A flow carries a tensor of channel numbers that broadcasts to the value's shape (size 1 along
dimensions where the channel does not vary) and a gain of the same form. An operator that only
moves data is run on these small tensors as it was run on the data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Flow:
    """The channels of one value.

    Attributes:
        ids: channel numbers, int64 on the CPU, as many dimensions as the value.
        gain: what the value is scaled by since its channel was made, float64, likewise.
        shape: the value's shape.
    """

    ids: Tensor
    gain: Tensor
    shape: tuple[int, ...]

    def channels(self) -> Tensor:
        """The distinct channel numbers, sorted."""
        return distinct(self.ids)[0]

    def varies(self, dim: int) -> bool:
        """Whether the channel changes along a dimension."""
        return self.ids.shape[dim] > 1

    def varies_only(self, dims: Sequence[int]) -> bool:
        """Whether channel and gain change along these dimensions at most."""
        rank = len(self.shape)
        others = set(range(rank)) - {dim % rank for dim in dims}
        return all(self.ids.shape[dim] == self.gain.shape[dim] == 1 for dim in others)


def distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct values, sorted, and the place of every element among them.

    By numpy, which takes a seventh of the time of `torch.unique` here.
    """
    values, inverse = np.unique(ids.numpy(), return_inverse=True)
    return torch.from_numpy(values), torch.from_numpy(inverse.reshape(ids.shape))


def make_flow(ids: Tensor, gain: Tensor, shape: Sequence[int]) -> Flow:
    """A flow with ids and gain compressed, and with leading dimensions added as needed.

    A value without elements is given channel 0, which is always zero.
    """
    rank = len(shape)
    if 0 in shape:
        return Flow(torch.zeros((1,) * rank, dtype=torch.int64), scalar_gain(rank), tuple(shape))
    return Flow(_compress(_to_rank(ids, rank)), _compress(_to_rank(gain, rank)), tuple(shape))


def _to_rank(tensor: Tensor, rank: int) -> Tensor:
    return tensor.reshape((1,) * (rank - tensor.dim()) + tuple(tensor.shape))


def _compress(tensor: Tensor) -> Tensor:
    """The same values with size 1 along every dimension where they do not vary."""
    for dim in range(tensor.dim()):
        if tensor.shape[dim] > 1:
            first = tensor.narrow(dim, 0, 1)
            if torch.equal(tensor, first.expand_as(tensor)):  # which stops at the first difference
                tensor = first
    return tensor.contiguous()


def move(
    flows: Sequence[Flow],
    apply: Callable[[Sequence[Tensor]], Tensor],
    shape: Sequence[int],
    dims: Collection[int] | None,
) -> Flow:
    """The flow after an operator that moves data, by running it on ids and gains.

    Args:
        flows: the operands, all of the same rank.
        apply: the operator, from tensors like the operands to one tensor.
        shape: the result's shape.
        dims: the dimensions whose size matters to the operator; None for all.
    """
    ids = apply(_expand([flow.ids for flow in flows], flows, dims))
    gains = [flow.gain for flow in flows]
    if all(gain.numel() == 1 for gain in gains) and len({gain.item() for gain in gains}) == 1:
        return make_flow(ids, gains[0].reshape((1,) * len(shape)), shape)
    return make_flow(ids, apply(_expand(gains, flows, dims)), shape)


def _expand(
    tensors: Sequence[Tensor], flows: Sequence[Flow], dims: Collection[int] | None
) -> list[Tensor]:
    """Full size along `dims`, and along other dimensions the size that the operands share."""
    if dims is None:
        return [tensor.expand(flow.shape) for tensor, flow in zip(tensors, flows, strict=True)]
    rank = tensors[0].dim()
    wanted = [dim % rank for dim in dims]
    sizes = [max(tensor.shape[dim] for tensor in tensors) for dim in range(rank)]
    return [
        tensor.expand([flow.shape[d] if d in wanted else sizes[d] for d in range(rank)])
        for tensor, flow in zip(tensors, flows, strict=True)
    ]


def reshape(flow: Flow, shape: Sequence[int]) -> Flow:
    """The flow of `value.reshape(shape)`, expanding only the dimensions that it mixes."""
    before: list[int] = []
    after: list[int] = []
    expanded: list[int] = []
    for old, new in _aligned(flow.shape, shape):
        varies = any(flow.varies(dim) or flow.gain.shape[dim] > 1 for dim in old)
        before += [flow.shape[dim] if varies else 1 for dim in old]
        after += [shape[dim] if varies else 1 for dim in new]
        expanded += old if varies else []

    def apply(tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        return tensor.expand(before).reshape(after)

    return move([flow], apply, shape, expanded)


def _aligned(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions with equal products: (1, 6, 4) to (1, 2, 3, 4) is 1|1, 6|2 3, 4|4."""
    if 0 in old:
        return [(list(range(len(old))), list(range(len(new))))]
    runs = []
    i = j = 0
    while i < len(old) and j < len(new):
        first, second = i, j
        size, other = old[i], new[j]
        while size != other:
            if size < other:
                i += 1
                size *= old[i]
            else:
                j += 1
                other *= new[j]
        i, j = i + 1, j + 1
        runs.append((list(range(first, i)), list(range(second, j))))
    return [*runs, (list(range(i, len(old))), list(range(j, len(new))))]


def meet(
    flows: Sequence[Flow], shape: Sequence[int]
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """Which channels of several flows meet where they are broadcast to a shape.

    Returns:
        The number of the tuple of channels at every position, counting from 0; the ids of each
        flow there; and their gains. All have one shape, which broadcasts to the one given.
    """
    rank = len(shape)
    padded = [
        make_flow(flow.ids, flow.gain, (1,) * (rank - len(flow.shape)) + tuple(flow.shape))
        for flow in flows
    ]
    tensors = torch.broadcast_tensors(*[t for flow in padded for t in (flow.ids, flow.gain)])
    key = torch.zeros_like(tensors[0])
    for ids in tensors[::2]:
        key = distinct(key * (int(ids.max()) + 1) + ids)[1]
    return key, tensors[::2], tensors[1::2]


def reduce_to(tensor: Tensor, like: Tensor, combine: Callable[..., Tensor]) -> Tensor:
    """A tensor of the shape of `like`, combined over the dimensions where `like` has size 1.

    `like` is given leading dimensions where `tensor` has more of them.
    """
    like = _to_rank(like, tensor.dim())
    dims = [dim for dim in range(like.dim()) if like.shape[dim] == 1 and tensor.shape[dim] > 1]
    return combine(tensor, dim=dims, keepdim=True) if dims else tensor


def scalar_gain(rank: int) -> Tensor:
    """A gain of 1 everywhere."""
    return torch.ones((1,) * rank, dtype=torch.float64)
