"""`Rows`: the arrays of a `ChannelGraph` as compiled functions take them, and their logarithms."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..channels.graph import ChannelGraph
from .jit import inlined

NONE = -np.inf  # the logarithm of a length that does not exist


class Rows(NamedTuple):
    """The rows of a graph; `ChannelGraph` says what each array holds."""

    kinds: NDArray[np.uint8]
    sizes: NDArray[np.int64]
    source_start: NDArray[np.int64]
    length_start: NDArray[np.int64]
    kernel_start: NDArray[np.int64]
    sources: NDArray[np.uint32]  # an index that cannot be negative is not checked for it
    lengths: NDArray[np.float32]
    bits: NDArray[np.int32]  # of the lengths, in the same memory
    alive: NDArray[np.bool_]


def rows_of(graph: ChannelGraph) -> Rows:
    """The rows of a graph, in its own memory."""
    return Rows(
        graph.kinds,
        graph.sizes,
        graph.source_start,
        graph.length_start,
        graph.kernel_start,
        graph.sources.view(np.uint32),
        graph.lengths,
        graph.lengths.view(np.int32),
        graph.alive,
    )


@inlined
def log2_ceiling(bits):
    """Upper bound of the logarithm of a float32 length, given its bits; 0.0861 too much at most.

    The bits of a float are its logarithm, interpolated linearly between powers of two. That
    takes a tenth of the time of `log2`, and settles nearly every comparison.
    """
    return (bits - 0x3F800000) * 2.0**-23 + 0.0861
