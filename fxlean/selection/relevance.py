"""The `relevance` method: the kernels through which most of the outputs flows.

Relevance flows back from the outputs, divided by the shares that the lengths of the graph hold,

    relevance(v) = 1 at model outputs, plus over edges (v, t): relevance(t) * share(v, t)
    score of a kernel (o, i) = relevance(o) * share(o, i), added up over its edges

so the score of a kernel is the sum, over all complete chains through it, of the product of their
shares. Kernels that are kept but connect no input with an output, because the rest of their
chains is not, are given back to the next best ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..channels.graph import ChannelGraph, Kind
from .jit import jit
from .liveness import used_kernels
from .ranking import fill_largest

_DEAD = np.uint8(Kind.DEAD)


def most_relevant(graph: ChannelGraph, budget: int) -> NDArray[np.bool_]:
    """The smallest number of kernels of largest score of which `budget` are not redundant.

    Of equal scores the smaller kernel numbers come first. The last kernel may connect others, and
    so overshoot the budget by what it connects. Where fewer than `budget` kernels connect inputs
    with outputs, those of the largest score fill the budget up.

    Args:
        graph: channels and edges, with shares as lengths.
        budget: number of kernels to keep.

    Returns:
        Keep mask over the kernels.
    """
    scores = kernel_relevance(graph)
    order = np.flatnonzero(graph.alive)
    order = order[np.argsort(-scores[order], kind="stable")]

    def connected(count: int) -> NDArray[np.bool_]:
        keep = np.zeros(graph.num_kernels, dtype=bool)
        keep[order[:count]] = True
        return used_kernels(graph, keep)

    if budget <= 0 or budget >= len(order):
        return graph.alive & (budget > 0)
    low = high = budget
    # What is missing is rarely much, so look near first.
    while high < len(order) and (missing := budget - np.count_nonzero(connected(high))) > 0:
        low, high = high + 1, min(len(order), high + 2 * int(missing))
    while low < high:
        middle = (low + high) // 2
        if np.count_nonzero(connected(middle)) >= budget:
            high = middle
        else:
            low = middle + 1
    keep = connected(high)
    fill_largest(keep, graph.alive, scores, budget)
    return keep


def kernel_relevance(graph: ChannelGraph) -> NDArray[np.float64]:
    """The score of every kernel, shape (k,); the lengths of the graph are shares."""
    scores = np.zeros(graph.num_kernels)
    _sweep(
        graph.sizes,
        graph.source_start,
        graph.length_start,
        graph.kernel_start,
        graph.sources,
        graph.lengths,
        graph.kinds,
        graph.outputs.astype(np.float64),
        scores,
    )
    return scores


@jit
def _sweep(
    sizes, source_start, length_start, kernel_start, sources, lengths, kinds, relevance, scores
):
    """One backward pass: divide the relevance of every channel among what feeds it."""
    for channel in range(len(sizes) - 1, -1, -1):
        if relevance[channel] == 0.0 or kinds[channel] == _DEAD:
            continue
        source, first = source_start[channel], length_start[channel]
        kernel = kernel_start[channel]
        for j in range(sizes[channel]):
            part = relevance[channel] * lengths[first + j]
            relevance[sources[source + j]] += part
            if kernel >= 0:
                scores[kernel + j] += part
