"""Small channel graphs for tests of what reads them: built row by row, or drawn by hypothesis."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from hypothesis import strategies as st

from fxlean.channels.graph import ChannelGraph, Kind


@dataclass(frozen=True)
class Row:
    """The edges into one channel: prunable, with kernels from `kernel` on, or fixed."""

    sources: tuple[int, ...] = ()
    lengths: tuple[float, ...] = ()
    kernel: int | None = None
    kind: Kind = Kind.SUM
    output: bool = False


INPUT = Row(kind=Kind.LIVE)


def build(rows: list[Row], alive: list[bool] | None = None) -> ChannelGraph:
    """The graph of the given rows, one for each channel; neighbours share equal sources."""
    sizes = np.array([len(row.sources) for row in rows], dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    source_start = starts.copy()
    for v in range(1, len(rows)):
        if rows[v].sources == rows[v - 1].sources:
            source_start[v] = source_start[v - 1]
    ends = [row.kernel + len(row.sources) for row in rows if row.kernel is not None]
    return ChannelGraph(
        kinds=np.array([row.kind for row in rows], dtype=np.uint8),
        sizes=sizes,
        source_start=source_start,
        length_start=starts,
        kernel_start=np.array([-1 if row.kernel is None else row.kernel for row in rows]),
        sources=np.array([u for row in rows for u in row.sources], dtype=np.int32),
        lengths=np.array([w for row in rows for w in row.lengths], dtype=np.float32),
        outputs=np.array([row.output for row in rows]),
        opaque=np.zeros(len(rows), dtype=bool),
        ties=np.arange(len(rows), dtype=np.int32),
        alive=np.ones(max(ends, default=0), dtype=bool)
        if alive is None
        else np.array(alive, dtype=bool),
    )


def dense(widths: list[int], lengths: np.ndarray, kind: Kind = Kind.SUM) -> ChannelGraph:
    """Layers of the given widths, each fully connected to the one before; the last is output."""
    rows = [Row(kind=Kind.LIVE)] * widths[0]
    kernel = 0
    for depth, width in enumerate(widths[1:], 1):
        sources = tuple(range(len(rows) - widths[depth - 1], len(rows)))
        for _ in range(width):
            row_lengths = tuple(lengths[kernel : kernel + len(sources)].tolist())
            rows.append(Row(sources, row_lengths, kernel, kind, depth == len(widths) - 1))
            kernel += len(sources)
    return build(rows)


def edges_into(graph: ChannelGraph, v: int) -> list[tuple[int, Fraction, int | None]]:
    """Source, length and kernel (None if fixed) of every edge into a channel."""
    return [
        (
            int(graph.sources[graph.source_start[v] + j]),
            Fraction(float(graph.lengths[graph.length_start[v] + j])),
            None if graph.kernel_start[v] < 0 else int(graph.kernel_start[v]) + j,
        )
        for j in range(graph.sizes[v])
    ]


def filled(graph: ChannelGraph, kept: set[int], budget: int) -> set[int]:
    """`kept` and the largest single kernels that still fit into the budget."""
    scores = dict.fromkeys(np.flatnonzero(graph.alive).tolist(), Fraction(0))
    for v in range(graph.num_channels):
        for _, w, kernel in edges_into(graph, v):
            if kernel in scores:
                scores[kernel] = max(scores[kernel], w)
    order = sorted(set(scores) - kept, key=lambda kernel: (-scores[kernel], kernel))
    return kept | set(order[: max(0, budget - len(kept))])


POWERS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.0, 2.0, 4.0])


@st.composite
def graphs(draw: st.DrawFn, shared: bool = True, ties: bool | None = None) -> ChannelGraph:
    """Small graphs of any wiring; lengths are powers of two (ties), or all different."""
    ties = draw(st.booleans()) if ties is None else ties
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = [INPUT] * draw(st.integers(1, 3))
    kernels = 0
    for v in range(len(rows), len(rows) + draw(st.integers(1, 9))):
        sources = tuple(draw(st.lists(st.integers(max(0, v - 5), v - 1), max_size=4)))
        size = len(sources)
        lengths = (
            tuple(draw(st.lists(POWERS, min_size=size, max_size=size)))
            if ties
            else tuple(np.exp(generator.normal(0, 1, size)) * (generator.random(size) > 0.1))
        )
        kind = draw(st.sampled_from([Kind.SUM] * 8 + [Kind.PRODUCT] * 3 + [Kind.LIVE, Kind.DEAD]))
        twins = [row.kernel for row in rows if row.kernel is not None and len(row.sources) == size]
        kernel = None
        if size and draw(st.integers(0, 2)):
            kernel = (
                draw(st.sampled_from(twins)) if twins and shared and draw(st.booleans()) else None
            )
            if kernel is None:
                kernel, kernels = kernels, kernels + size
        output = draw(st.integers(0, 4)) == 0
        rows.append(Row(sources, lengths, kernel, kind, output))
    rows[-1] = replace(rows[-1], output=True)
    return build(rows, [draw(st.integers(0, 7)) > 0 for _ in range(kernels)])


def found(result: tuple[np.ndarray, int]) -> tuple[set[int], int]:
    """A result in the form of the slow functions."""
    keep, chains = result
    assert keep.dtype == bool
    return set(np.flatnonzero(keep).tolist()), chains


@st.composite
def grouped_graphs(draw):
    """Small graphs of every kind of channel, with shared lists of sources, and ties."""
    count = draw(st.integers(1, 9))
    kinds, sizes, starts, kernels, sources = [], [], [], [], []
    for channel in range(count):
        row = (
            draw(st.lists(st.integers(0, channel - 1), unique=True, max_size=4)) if channel else []
        )
        kinds.append(draw(st.sampled_from(Kind)))
        shared = draw(st.sampled_from([None, *range(channel)]))
        if shared is not None and sizes[shared]:
            starts.append(starts[shared])
            sizes.append(sizes[shared])
        else:
            starts.append(len(sources))
            sizes.append(len(row))
            sources += row
        used = sum(size for size, first in zip(sizes, kernels, strict=False) if first >= 0)
        prunable = kinds[-1] == Kind.SUM and draw(st.booleans())
        kernels.append(used if prunable else -1)
    total = sum(size for size, first in zip(sizes, kernels, strict=True) if first >= 0)
    lengths = [draw(st.floats(0, 4, width=32)) for _ in range(sum(sizes))]
    flags = st.lists(st.booleans(), min_size=count, max_size=count)
    return ChannelGraph(
        kinds=np.array(kinds, dtype=np.uint8),
        sizes=np.array(sizes, dtype=np.int64),
        source_start=np.array(starts, dtype=np.int64),
        length_start=np.cumsum(sizes) - np.array(sizes),
        kernel_start=np.array(kernels, dtype=np.int64),
        sources=np.array(sources, dtype=np.int32),
        lengths=np.array(lengths, dtype=np.float32),
        outputs=np.array(draw(flags)),
        opaque=np.array(draw(flags)) & (np.array(kinds) == Kind.LIVE),
        ties=np.array([draw(st.sampled_from([c, c, 0])) for c in range(count)], dtype=np.int32),
        alive=np.ones(total, dtype=bool),
    )
