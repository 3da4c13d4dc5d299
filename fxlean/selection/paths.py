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
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..channels.graph import ChannelGraph, Kind
from .jit import inlined, jit
from .ranking import fill_largest, kernel_scores
from .rows import NONE, Rows, log2_ceiling, rows_of


class _Links(NamedTuple):
    """How the longest complete chains run: n channels, k kernels."""

    previous: NDArray[np.int32]  # (n,): the edge of its row that a chain into the channel ends with
    following: NDArray[np.int32]  # (n,): the channel where it goes on, -1 where it ends
    following_edge: NDArray[np.int32]  # (n,): the edge of that channel's row
    row: NDArray[np.int32]  # (k,): the channel into which the best edge of the kernel leads


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
    rows = rows_of(graph)
    through, links = _through(graph, rows, complete=True)
    chains = _complete(rows, links, _descending(through, budget), keep, budget)
    if np.count_nonzero(keep) < budget:
        fill_largest(keep, graph.alive, kernel_scores(graph), budget)
    return keep, int(chains)


def chain_scores(graph: ChannelGraph, *, complete: bool) -> NDArray[np.float64]:
    """Length of the longest chain through every kernel over the longest of all, shape (k,).

    Args:
        graph: channels, edges and lengths.
        complete: whether chains must lead from an input to an output, as those of `path` do; those
            of LEAN begin and end anywhere.
    """
    through, _ = _through(graph, rows_of(graph), complete=complete)
    longest = through.max(initial=NONE)
    if longest > NONE:
        through -= longest
    return np.exp2(through, out=through)  # in place: new memory costs more than the arithmetic


def _through(
    graph: ChannelGraph, rows: Rows, *, complete: bool
) -> tuple[NDArray[np.float64], _Links]:
    """The logarithm of the longest chain through every kernel, and how these chains run."""
    n, k = graph.num_channels, graph.num_kernels
    # Made here, because numba takes half a second to compile `np.full`.
    links = _Links(*(np.full(size, -1, dtype=np.int32) for size in (n, n, n, k)))
    anywhere = NONE if complete else 0.0
    forward, through = np.full(n, anywhere), np.full(k, NONE)
    _forward(rows, forward, links)
    _backward(rows, forward, np.where(graph.outputs, 0.0, anywhere), through, links)
    return through, links


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


@inlined
def _usable(rows, first, kernel, j):
    """Whether edge j of the row that starts at length `first` and `kernel` can carry a chain."""
    return rows.lengths[first + j] > 0 and (kernel < 0 or rows.alive[kernel + j])


@jit
def _forward(rows, forward, links):
    """Write the logarithm of the longest chain into every channel, and `links.previous`."""
    for v in range(len(rows.sizes)):
        kind, size = rows.kinds[v], rows.sizes[v]
        if kind == Kind.DEAD:
            continue
        if kind == Kind.LIVE and size == 0:
            forward[v] = 0.0
        source, first, kernel = rows.source_start[v], rows.length_start[v], rows.kernel_start[v]
        for j in range(size):
            value = forward[rows.sources[source + j]]
            if value == NONE or not _usable(rows, first, kernel, j):
                if kind == Kind.PRODUCT:
                    forward[v] = NONE
                    break
            elif value + log2_ceiling(rows.bits[first + j]) > forward[v]:
                value += log2(np.float64(rows.lengths[first + j]))
                if value > forward[v]:
                    forward[v], links.previous[v] = value, j


@jit
def _backward(rows, forward, backward, through, links):
    """Write the logarithm of the longest complete chain `through` every kernel, and other links.

    Into `backward`, which comes with 0 at the outputs, goes the logarithm of the longest chain
    from every channel to an output.
    """
    # Arrays that a loop writes to are taken out of their tuple first: nearly twice as fast.
    _, following, following_edge, row = links
    for v in range(len(rows.sizes) - 1, -1, -1):
        if backward[v] == NONE or forward[v] == NONE:
            continue
        source, first, kernel = rows.source_start[v], rows.length_start[v], rows.kernel_start[v]
        for j in range(rows.sizes[v] - 1, -1, -1):
            u = rows.sources[source + j]
            if forward[u] == NONE or not _usable(rows, first, kernel, j):
                continue
            if rows.kinds[v] == Kind.PRODUCT:
                value = forward[v] - forward[u] + backward[v]
            elif kernel < 0 and backward[v] + log2_ceiling(rows.bits[first + j]) < backward[u]:
                continue
            else:
                value = log2(np.float64(rows.lengths[first + j])) + backward[v]
            # An output ends its chain unless going on is longer.
            if value > backward[u] or (value == backward[u] and following[u] >= 0):
                backward[u], following[u], following_edge[u] = value, v, j
            if kernel >= 0 and forward[u] + value >= through[kernel + j]:
                through[kernel + j], row[kernel + j] = forward[u] + value, v


@inlined
def _keep_edge(rows, v, j, keep):
    """Keep the kernel of edge j into channel v; returns 1 if that is new, else 0."""
    kernel = rows.kernel_start[v]
    if kernel < 0 or keep[kernel + j]:
        return 0
    keep[kernel + j] = True
    return 1


@inlined
def _push(stack, count, v, fed):
    """Note that channel v is fed, and put it on the stack if that is new; returns its new size."""
    if fed[v]:
        return count
    fed[v] = True
    stack[count] = v
    return count + 1


@jit
def _complete(rows, links, order, keep, budget):
    """Keep the kernels of `order`, each with its chain, until `budget` are kept; returns chains."""
    n = len(rows.sizes)
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
        v = np.int64(links.row[kernel])
        j = kernel - rows.kernel_start[v]
        count = _push(stack, 0, rows.sources[rows.source_start[v] + j], fed)
        # On to an output; what multiplies on the way needs all its operands.
        while True:
            if rows.kinds[v] == Kind.PRODUCT:
                count = _push(stack, count, v, fed)
            if read[v] or links.following[v] < 0:
                break
            read[v] = True
            j, v = np.int64(links.following_edge[v]), np.int64(links.following[v])
            kept += _keep_edge(rows, v, j, keep)
        # Back to the inputs.
        while count > 0:
            count -= 1
            v = stack[count]
            begin, end = links.previous[v], links.previous[v] + 1
            if rows.kinds[v] == Kind.PRODUCT:
                begin, end = 0, rows.sizes[v]
            if begin < 0:
                continue
            for j in range(begin, end):
                kept += _keep_edge(rows, v, j, keep)
                count = _push(stack, count, rows.sources[rows.source_start[v] + j], fed)
    return chains
