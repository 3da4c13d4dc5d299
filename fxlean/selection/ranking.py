"""Kernels ranked one by one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..channels.graph import ChannelGraph
from .jit import jit
from .rows import rows_of


def kernel_scores(graph: ChannelGraph) -> NDArray[np.float32]:
    """Largest length over all edges of each kernel, shape (k,); 0 where it has no edge."""
    scores = np.zeros(graph.num_kernels, dtype=np.float32)
    _maximum_lengths(rows_of(graph), scores)
    return scores


def fill_largest(
    keep: NDArray[np.bool_],
    alive: NDArray[np.bool_],
    scores: NDArray[np.floating],
    budget: int,
) -> None:
    """Fill `keep` up to `budget` with the alive kernels of largest score, in place.

    Of equal scores the smaller kernel numbers come first.
    """
    missing = budget - int(np.count_nonzero(keep))
    if missing <= 0:
        return
    free = alive & ~keep
    values = scores[free]
    if missing >= len(values):
        keep |= alive
        return
    values.partition(len(values) - missing)
    threshold = values[len(values) - missing]
    above = free & (scores > threshold)
    keep |= above
    equal = np.flatnonzero(free & (scores == threshold))
    keep[equal[: missing - int(np.count_nonzero(above))]] = True


@jit
def _maximum_lengths(rows, scores):
    """Write into `scores` the largest length over all edges of each kernel."""
    for v in range(len(rows.sizes)):
        first, kernel = rows.length_start[v], rows.kernel_start[v]
        if kernel >= 0:
            for j in range(rows.sizes[v]):
                if rows.lengths[first + j] > scores[kernel + j]:
                    scores[kernel + j] = rows.lengths[first + j]
