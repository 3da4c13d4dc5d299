"""Which channels are zero, and which kernels are used: sweeps over a `ChannelGraph`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..channels.graph import ChannelGraph
from .jit import jit


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
    blocked = np.zeros(graph.num_channels, dtype=bool)
    while True:
        zero, candidate = _sweep_zero(
            graph.sizes,
            graph.source_start,
            graph.kernel_start,
            graph.sources,
            graph.kinds,
            keep,
            blocked,
            redundancy,
        )
        alive_groups = np.unique(graph.groups[~candidate])
        newly_blocked = np.zeros_like(blocked)
        newly_blocked[alive_groups] = True
        if not (zero & newly_blocked[graph.groups]).any():
            found: NDArray[np.bool_] = zero
            return found
        blocked = newly_blocked[graph.groups]


def used_kernels(graph: ChannelGraph, keep: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Kept kernels that are not redundant: they read a live channel and something reads them.

    Args:
        graph: the wiring, k kernels.
        keep: shape (k,), True for kernels that survive.

    Returns:
        Shape (k,), a subset of `keep` that fulfils the definition in itself: removing the
        redundant kernels leaves no new ones.
    """
    while True:
        zero = zero_channels(graph, keep)
        used: NDArray[np.bool_] = _sweep_used(
            graph.sizes,
            graph.source_start,
            graph.kernel_start,
            graph.sources,
            graph.outputs | graph.opaque,
            keep,
            zero,
        )
        if used.sum() == keep.sum():
            return used
        keep = used


@jit
def _sweep_zero(sizes, source_start, kernel_start, sources, kinds, keep, blocked, redundancy):
    """One forward pass: what is zero, and what would be if its group allowed it."""
    zero = np.zeros(len(sizes), dtype=np.bool_)
    candidate = np.zeros(len(sizes), dtype=np.bool_)
    for channel in range(len(sizes)):
        kind = kinds[channel]
        if kind == 0:
            continue
        size, kernel = sizes[channel], kernel_start[channel]
        row = sources[source_start[channel] : source_start[channel] + size]
        if kind == 2:
            candidate[channel] = zero[row].any()
        elif kind == 3 and (redundancy or size == 0):
            candidate[channel] = True
        else:
            dead = True
            for j in range(size):
                if kernel < 0:
                    carries = not zero[row[j]]
                else:
                    carries = keep[kernel + j] and not (redundancy and zero[row[j]])
                if carries:
                    dead = False
                    break
            candidate[channel] = dead
        zero[channel] = candidate[channel] and not blocked[channel]
    return zero, candidate


@jit
def _sweep_used(sizes, source_start, kernel_start, sources, needed, keep, zero):
    """One backward pass from what must stay to the kernels that it depends on."""
    needed = needed.copy()
    used = np.zeros(len(keep), dtype=np.bool_)
    for channel in range(len(sizes) - 1, -1, -1):
        if zero[channel] or not needed[channel]:
            continue
        kernel = kernel_start[channel]
        for j in range(sizes[channel]):
            source = sources[source_start[channel] + j]
            if zero[source]:
                continue
            if kernel < 0:
                needed[source] = True
            elif keep[kernel + j]:
                used[kernel + j] = True
                needed[source] = True
    return used
