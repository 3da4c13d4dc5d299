"""The `path` method: the kernels on the longest complete chains, from model input to output.

For every kernel, take the length of the longest complete chain through it,

    through(u, v, w) = forward(u) * w * backward(v)
    forward(v)  = max over usable edges (u, v, w) of forward(u) * w,   1 at model inputs
    backward(u) = max over usable edges (u, v, w) of w * backward(v),  1 at model outputs

and keep the kernels with the largest values, each with the rest of its chain. Every kernel on
the longest chain through a kernel scores at least as much as that kernel, so completing a chain
adds nothing that was not due anyway, except at the end of the budget and where rounding tells
equal values apart. Completing every chain makes "a union of complete chains" exact.

A product of channels is zero when any operand is. So a `Kind.PRODUCT` channel exists only if all
its operands do, its weaker operands count as much as the strongest (their edges are lifted until
all operands tie), and a chain through it is complete only with a chain into every operand.

Sums of base-2 logarithms in float64 stand for products: nothing overflows or underflows.
"""

from __future__ import annotations

from math import log2

import numpy as np
from numpy.typing import NDArray

from ..channels.graph import ChannelGraph, Kind
from .jit import jit
from .ranking import fill_largest, kernel_scores, log2_ceiling

_NONE = -np.inf  # the logarithm of a length that does not exist
_LIVE, _PRODUCT, _DEAD = np.uint8(Kind.LIVE), np.uint8(Kind.PRODUCT), np.uint8(Kind.DEAD)


def complete_paths(graph: ChannelGraph, budget: int) -> tuple[NDArray[np.bool_], int]:
    """Kernels on the longest complete chains, filled up with the largest single kernels.

    Kernels are taken from the largest `through` value down (of equal ones, the smallest kernel
    first), each with the rest of the longest complete chain through it, until `budget` kernels
    are kept; the last chain may overshoot by what it lacked. Only when no complete chain is left
    does the rest of the budget go to the kernels with the largest `kernel_scores`. Usable edges
    have a positive length and, where prunable, are alive. A model input is a `Kind.LIVE` channel
    without edges; nothing passes a `Kind.DEAD` channel. Equal chains are told apart by their
    first edge going back, and by their smallest channel going on.

    Args:
        graph: channels, edges and lengths.
        budget: number of kernels to keep.

    Returns:
        Keep mask over the kernels, and the number of chains: the kernels that no earlier chain
        had brought along, so that one more chain had to be completed for them.
    """
    if budget >= np.count_nonzero(graph.alive):
        return graph.alive.copy(), 0
    keep = np.zeros(graph.num_kernels, dtype=bool)
    if budget <= 0:
        return keep, 0
    wiring = (
        graph.sizes,
        graph.source_start,
        graph.kernel_start,
        graph.sources.view(np.uint32),
    )
    edges = (graph.length_start, graph.lengths, graph.lengths.view(np.int32), graph.alive)
    forward, previous = _forward(*wiring, *edges, graph.kinds)
    through, row, following, following_edge = _backward(
        *wiring, *edges, graph.kinds, np.where(graph.outputs, 0.0, _NONE), forward
    )
    chains = _complete(
        *wiring,
        graph.kinds,
        previous,
        following,
        following_edge,
        row,
        _descending(through, budget),
        keep,
        budget,
    )
    if np.count_nonzero(keep) < budget:
        fill_largest(keep, graph.alive, kernel_scores(graph), budget)
    return keep, int(chains)


def _descending(through: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The `count` kernels (a few more, or fewer where not finite) of largest value, in order."""
    # Rounding keeps the order, and takes half of the memory.
    rounded = through.astype(np.float32)
    rank = len(rounded) - count
    rounded.partition(rank)
    limits = np.finfo(np.float32)
    threshold = np.nextafter(max(rounded[rank], limits.min), limits.min)
    del rounded
    largest = np.flatnonzero(through >= threshold)
    values = through[largest]
    return largest[np.argsort(np.negative(values, out=values), kind="stable")]


@jit
def _forward(sizes, source_start, kernel_start, sources, length_start, lengths, bits, alive, kinds):
    """Logarithm of the longest chain into every channel, and the edge of its row it ends with."""
    n = len(sizes)
    forward = np.full(n, _NONE)
    previous = np.full(n, -1, dtype=np.int32)
    for v in range(n):
        if kinds[v] == _DEAD:
            continue
        if sizes[v] == 0 and kinds[v] == _LIVE:
            forward[v] = 0.0
        s, first, kernel = source_start[v], length_start[v], kernel_start[v]
        for j in range(sizes[v]):
            value = forward[sources[s + j]]
            usable = value > _NONE and lengths[first + j] > 0
            if not usable or (kernel >= 0 and not alive[kernel + j]):
                if kinds[v] == _PRODUCT:
                    forward[v] = _NONE
                    break
            elif value + log2_ceiling(bits[first + j]) > forward[v]:
                value += log2(np.float64(lengths[first + j]))
                if value > forward[v]:
                    forward[v], previous[v] = value, j
    return forward, previous


@jit
def _backward(
    sizes,
    source_start,
    kernel_start,
    sources,
    length_start,
    lengths,
    bits,
    alive,
    kinds,
    backward,
    forward,
):
    """Logarithm of the longest complete chain through every kernel, and how chains go on.

    Returns `through` and the row of the kernel's best edge, both per kernel; and, per channel,
    row and edge with which its longest chain to an output goes on (row -1 where it ends). The
    lengths of these are written into `backward`, which comes with 0 at the outputs.
    """
    n = len(sizes)
    following = np.full(n, -1, dtype=np.int32)
    following_edge = np.full(n, -1, dtype=np.int32)
    through = np.full(len(alive), _NONE)
    row = np.full(len(alive), -1, dtype=np.int32)
    for v in range(n - 1, -1, -1):
        if backward[v] == _NONE or forward[v] == _NONE:
            continue
        s, first, kernel = source_start[v], length_start[v], kernel_start[v]
        for j in range(sizes[v] - 1, -1, -1):
            u = sources[s + j]
            if forward[u] == _NONE or lengths[first + j] <= 0:
                continue
            if kernel >= 0 and not alive[kernel + j]:
                continue
            if kinds[v] == _PRODUCT:
                value = forward[v] - forward[u] + backward[v]
            elif kernel < 0 and backward[v] + log2_ceiling(bits[first + j]) < backward[u]:
                continue
            else:
                value = log2(np.float64(lengths[first + j])) + backward[v]
            # An output ends its chain unless going on is longer.
            if value > backward[u] or (value == backward[u] and following[u] >= 0):
                backward[u], following[u], following_edge[u] = value, v, j
            if kernel >= 0 and forward[u] + value >= through[kernel + j]:
                through[kernel + j], row[kernel + j] = forward[u] + value, v
    return through, row, following, following_edge


@jit
def _complete(
    sizes,
    source_start,
    kernel_start,
    sources,
    kinds,
    previous,
    following,
    following_edge,
    row,
    order,
    keep,
    budget,
):
    """Keep the kernels of `order`, each with its chain, until `budget` are kept; returns chains."""
    n = len(sizes)
    fed = np.zeros(n, dtype=np.bool_)  # a kept chain leads from an input to the channel
    read = np.zeros(n, dtype=np.bool_)  # a kept chain leads from the channel to an output
    stack = np.empty(n, dtype=np.int64)
    kept = chains = 0
    for kernel in order:
        if kept >= budget:
            break
        if keep[kernel]:
            continue
        keep[kernel] = True
        kept += 1
        chains += 1
        count = 0
        v = row[kernel]
        u = sources[source_start[v] + kernel - kernel_start[v]]
        if not fed[u]:
            fed[u] = True
            stack[count] = u
            count += 1
        # On to an output; what multiplies on the way needs all its operands.
        while True:
            if kinds[v] == _PRODUCT and not fed[v]:
                fed[v] = True
                stack[count] = v
                count += 1
            if read[v] or following[v] < 0:
                break
            read[v] = True
            j = following_edge[v]
            v = following[v]
            k = kernel_start[v] + j
            if kernel_start[v] >= 0 and not keep[k]:
                keep[k] = True
                kept += 1
        # Back to the inputs.
        while count > 0:
            count -= 1
            v = stack[count]
            begin, end = previous[v], previous[v] + 1
            if kinds[v] == _PRODUCT:
                begin, end = 0, sizes[v]
            if begin < 0:
                continue
            for j in range(begin, end):
                k = kernel_start[v] + j
                if kernel_start[v] >= 0 and not keep[k]:
                    keep[k] = True
                    kept += 1
                u = sources[source_start[v] + j]
                if not fed[u]:
                    fed[u] = True
                    stack[count] = u
                    count += 1
    return chains
