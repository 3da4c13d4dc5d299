"""Edge lengths: the norms of the kernels, with gains and batch norms folded in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..channels.graph import ChannelGraph
from ..channels.weights import Weight
from ..channels.wiring import Block
from ..errors import ArgumentError
from ..norms.operator import operator_norms
from ..tracing.sandbox import on_cpu
from .prunable import Network


@on_cpu()
def with_norms(
    network: Network,
    norm: str = "spectral",
    *,
    gains: bool = True,
    advance: Callable[[int], object] = lambda kernels: None,
) -> ChannelGraph:
    """The graph with the length of every kernel and of every linear edge.

    Args:
        network: whose graph it is.
        norm: order of the operator norm, see `operator_norms`.
        gains: whether gains, those of batch norms among them, multiply the norms.
        advance: called with the number of kernels after each weight.

    Raises:
        ArgumentError: weights or batch norms hold NaN or infinity; names the layers.
    """
    lengths = network.graph.lengths.copy()
    done: dict[tuple[object, ...], NDArray[np.float32]] = {}
    broken: list[str] = []
    for block in network.blocks:
        weight = block.weight
        key = (weight.value.data_ptr(), weight.value.stride(), *_geometry(weight))
        if key not in done:
            done = {key: kernel_norms(weight, norm).float().cpu().numpy()}
        values = _scaled(done[key], block) if gains else done[key]
        if not np.isfinite(values.sum(dtype=np.float64)):
            broken.append(weight.layer_name)
        lengths[block.start : block.start + values.size] = values.reshape(-1)
        advance(values.size)
    if broken:
        raise ArgumentError(
            f"weights, or the batch norm behind them, hold NaN or infinity in: "
            f"{', '.join(dict.fromkeys(broken))}. Repair or reload these layers before pruning."
        )
    return network.graph.with_lengths(lengths)


def kernel_norms(weight: Weight, norm: str) -> Tensor:
    """Norm of every kernel of a weight, shape (out, in of the group)."""
    kernels = weight.kernels(weight.value.detach())
    if weight.columns is None:
        return operator_norms(kernels, weight.stride, dilation=weight.dilation, order=norm)
    return _column_norms(kernels, weight.columns, 1 if norm == "l1" else 2)


def _column_norms(matrix: Tensor, columns: Tensor, power: int) -> Tensor:
    """Norm, in every row, of the entries with the same column number; shape (rows, numbers)."""
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    order, times = columns.argsort(stable=True), columns.bincount()
    result = matrix.new_zeros(len(matrix), len(times), dtype=dtype)
    for count in times[times > 0].unique().tolist():
        numbers = times == count
        chosen = order[numbers[columns[order]]]
        in_order = torch.equal(chosen, torch.arange(matrix.shape[1]))
        part = matrix if in_order else matrix.index_select(1, chosen.to(matrix.device))
        together = part.unflatten(1, (-1, count))
        norms = torch.linalg.vector_norm(together, power, dim=2, dtype=dtype)
        result.index_copy_(1, numbers.nonzero()[:, 0].to(matrix.device), norms)
    return result


def _geometry(weight: Weight) -> tuple[object, ...]:
    return (weight.value.shape, weight.transposed, weight.stride, weight.dilation, weight.columns)


def _scaled(norms: NDArray[np.float32], block: Block) -> NDArray[np.float32]:
    """Norms times the gain behind every output and before every input channel."""
    groups = len(block.gain_in)
    if (block.gain_in == 1).all() and (block.gain_out == 1).all():
        return norms
    grouped = norms.reshape(groups, -1, block.columns)
    gain_out = block.gain_out.reshape(groups, -1, 1).astype(np.float32)
    gain_in = block.gain_in.reshape(groups, 1, -1).astype(np.float32)
    return grouped * gain_out * gain_in
