"""Which channels are zero, and which kernels are used: sweeps over a `ChannelGraph`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..channels.graph import ChannelGraph, Kind
from .jit import inlined, jit
from .rows import rows_of


def zero_channels(
    graph: ChannelGraph, keep: NDArray[np.bool_], *, redundancy: bool = True
) -> NDArray[np.bool_]:
    """Channels that are zero for every input once their biases and batch norms are masked.

    Args:
        graph: the wiring, n channels.
        keep: shape (k,), True for kernels that survive.
        redundancy: a kernel that reads a zero channel counts as pruned; without it only a
            channel whose kernels are all pruned is zero, and what hangs on it by fixed edges.

    Returns:
        Shape (n,), True for zero channels. Channels of one group are zero together or not at
        all, since they share what has to be masked.
    """
    rows = rows_of(graph)
    blocked = np.zeros(graph.num_channels, dtype=bool)
    while True:
        zero, candidate = _sweep_zero(rows, keep, blocked, redundancy)
        in_blocked_group = np.zeros_like(blocked)
        in_blocked_group[graph.ties[~candidate]] = True
        in_blocked_group = in_blocked_group[graph.ties]
        if not (zero & in_blocked_group).any():
            found: NDArray[np.bool_] = zero
            return found
        blocked = in_blocked_group


def used_kernels(graph: ChannelGraph, keep: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Kept kernels that are not redundant: they read a live channel and something reads them.

    Args:
        graph: the wiring, k kernels.
        keep: shape (k,), True for kernels that survive.

    Returns:
        Shape (k,), a subset of `keep` that fulfils the definition in itself: removing the
        redundant kernels leaves no new ones.
    """
    rows = rows_of(graph)
    while True:
        zero = zero_channels(graph, keep)
        used: NDArray[np.bool_] = _sweep_used(rows, graph.outputs | graph.opaque, keep, zero)
        if used.sum() == keep.sum():
            return used
        keep = used


@jit
def _sweep_zero(rows, keep, blocked, redundancy):
    """One forward pass: what is zero, and what would be if its group allowed it."""
    zero = np.zeros(len(rows.sizes), dtype=np.bool_)
    candidate = np.zeros(len(rows.sizes), dtype=np.bool_)
    for v in range(len(rows.sizes)):
        candidate[v] = _can_be_zero(rows, v, zero, keep, redundancy)
        zero[v] = candidate[v] and not blocked[v]
    return zero, candidate


@inlined
def _can_be_zero(rows, v, zero, keep, redundancy):
    """Whether channel v is zero, given which channels before it are; its group is not asked."""
    kind, size, kernel = rows.kinds[v], rows.sizes[v], rows.kernel_start[v]
    if kind == Kind.LIVE:
        return False
    if kind == Kind.DEAD and redundancy:
        return True
    for j in range(size):
        silent = zero[rows.sources[rows.source_start[v] + j]]
        if kind == Kind.PRODUCT:
            if silent:
                return True
        elif kernel < 0:
            if not silent:
                return False
        elif keep[kernel + j] and not (redundancy and silent):
            return False
    return kind != Kind.PRODUCT


@jit
def _sweep_used(rows, needed, keep, zero):
    """One backward pass from what must stay to the kernels that it depends on."""
    needed = needed.copy()
    used = np.zeros(len(keep), dtype=np.bool_)
    for v in range(len(rows.sizes) - 1, -1, -1):
        if zero[v] or not needed[v]:
            continue
        kernel = rows.kernel_start[v]
        for j in range(rows.sizes[v]):
            u = rows.sources[rows.source_start[v] + j]
            if zero[u]:
                continue
            if kernel < 0:
                needed[u] = True
            elif keep[kernel + j]:
                used[kernel + j] = True
                needed[u] = True
    return used
