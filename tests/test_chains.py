"""Longest chains and complete paths, against slow code written straight from the definitions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from math import log2, prod

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fxlean.chains import fill_largest, kernel_scores, longest_chains
from fxlean.graph import ChannelGraph, Kind
from fxlean.paths import complete_paths

EXACT = settings(derandomize=True, deadline=None, max_examples=400)
FEWER = settings(derandomize=True, deadline=None, max_examples=100)


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
    """The graph of the given rows, one for each channel."""
    sizes = np.array([len(row.sources) for row in rows], dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    ends = [row.kernel + len(row.sources) for row in rows if row.kernel is not None]
    return ChannelGraph(
        kinds=np.array([row.kind for row in rows], dtype=np.uint8),
        sizes=sizes,
        source_start=starts,
        length_start=starts,
        kernel_start=np.array([-1 if row.kernel is None else row.kernel for row in rows]),
        sources=np.array([u for row in rows for u in row.sources], dtype=np.int32),
        lengths=np.array([w for row in rows for w in row.lengths], dtype=np.float32),
        outputs=np.array([row.output for row in rows]),
        opaque=np.zeros(len(rows), dtype=bool),
        groups=np.arange(len(rows), dtype=np.int32),
        alive=np.ones(max(ends, default=0), dtype=bool) if alive is None else np.array(alive, dtype=bool),
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


def slow_longest_chains(graph: ChannelGraph, budget: int) -> tuple[set[int], int]:
    """The definition: all values from scratch for every chain, in exact arithmetic."""
    alive = set(np.flatnonzero(graph.alive).tolist())
    if len(alive) <= budget:
        return alive, 0
    kept: set[int] = set()
    chains = 0
    while len(kept) < budget:
        best: dict[int, Fraction] = {}
        last: dict[int, tuple[int, int | None]] = {}
        for v in range(graph.num_channels):
            for u, w, kernel in edges_into(graph, v):
                if kernel is not None and kernel in alive - kept:
                    value = max(Fraction(1), best.get(u, Fraction(1))) * w
                elif kernel is None and u in best:
                    value = best[u] * w
                else:
                    continue
                if value >= 1 and value > best.get(v, Fraction(0)):
                    best[v], last[v] = value, (u, kernel)
        ends = [v for v in best if not (graph.outputs[v] and graph.kernel_start[v] < 0)]
        if not ends:
            break
        v = min(ends, key=lambda v: (-best[v], v))
        while v in best:
            v, kernel = last[v]
            if kernel is not None:
                kept.add(kernel)
        chains += 1
    return filled(graph, kept, budget), chains


def brute_force_chain(graph: ChannelGraph) -> set[int]:
    """The kernels of the first chain, found by listing every path of the graph."""
    found = []

    def extend(v: int, value: Fraction, back: tuple[int, ...], kernels: tuple[int, ...]) -> None:
        # `back` orders equal paths: first edge of the row, going back; a longer one first.
        if not (graph.outputs[v] and graph.kernel_start[v] < 0):
            found.append((-value, v, (*back, graph.num_edges), kernels))
        for target in range(v + 1, graph.num_channels):
            for j, (u, w, kernel) in enumerate(edges_into(graph, target)):
                if u == v and value * w >= 1 and (kernel is None or graph.alive[kernel]):
                    more = kernels if kernel is None else (*kernels, kernel)
                    extend(target, value * w, (j, *back), more)

    for v in range(graph.num_channels):
        for j, (_, w, kernel) in enumerate(edges_into(graph, v)):
            if kernel is not None and graph.alive[kernel] and w >= 1:
                extend(v, w, (j,), (kernel,))
    return set(min(found)[3]) if found else set()


def slow_complete_paths(graph: ChannelGraph, budget: int) -> tuple[set[int], int]:
    """The definition of complete chains, in exact arithmetic; 0 stands for no chain."""
    alive = set(np.flatnonzero(graph.alive).tolist())
    if len(alive) <= budget:
        return alive, 0
    n = graph.num_channels
    forward = [Fraction(0)] * n
    strongest = [0] * n
    usable: list[list[tuple[int, Fraction, int | None]]] = []
    for v in range(n):
        row = edges_into(graph, v)
        row = [(u, w if k is None or k in alive else Fraction(0), k) for u, w, k in row]
        values = [forward[u] * w for u, w, _ in row]
        if graph.kinds[v] == Kind.PRODUCT and 0 in values or graph.kinds[v] == Kind.DEAD:
            row = [(u, Fraction(0), kernel) for u, _, kernel in row]
        elif not row:
            forward[v] = Fraction(int(graph.kinds[v] == Kind.LIVE))
        else:
            forward[v] = max(values)
            strongest[v] = values.index(forward[v])
        if graph.kinds[v] == Kind.PRODUCT and forward[v] > 0:
            row = [(u, forward[v] / forward[u], kernel) for u, _, kernel in row]
        usable.append(row)
    backward = [Fraction(1) if end else Fraction(0) for end in graph.outputs]
    following: list[tuple[int, int] | None] = [None] * n
    through: dict[int, tuple[Fraction, int, int]] = {}
    for u in reversed(range(n)):
        for v in range(u + 1, n):
            for j, (source, w, _) in enumerate(usable[v]):
                if source == u and w * backward[v] * forward[u] > 0 and w * backward[v] > backward[u]:
                    backward[u], following[u] = w * backward[v], (v, j)
    for v in range(n):
        for j, (u, w, kernel) in enumerate(usable[v]):
            value = forward[u] * w * backward[v]
            if kernel is not None and value > through.get(kernel, (0,))[0]:
                through[kernel] = (value, v, j)
    kept: set[int] = set()

    def back_from(v: int) -> None:
        row = usable[v]
        for u, _, kernel in row if graph.kinds[v] == Kind.PRODUCT else row[strongest[v] :][:1]:
            if kernel is not None:
                kept.add(kernel)
            back_from(u)

    def take(v: int, j: int) -> None:
        u, _, kernel = usable[v][j]
        if kernel is not None:
            kept.add(kernel)
        back_from(u)
        if graph.kinds[v] == Kind.PRODUCT:
            back_from(v)
        if following[v] is not None:
            take(*following[v])

    chains = 0
    for kernel in sorted(through, key=lambda kernel: (-through[kernel][0], kernel)):
        if len(kept) < budget and kernel not in kept:
            take(*through[kernel][1:])
            chains += 1
    return filled(graph, kept, budget), chains


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
            kernel = draw(st.sampled_from(twins)) if twins and shared and draw(st.booleans()) else None
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



@EXACT
@given(graphs(), st.data())
def test_longest_chains_are_those_of_the_definition(graph, data):
    budget = data.draw(st.integers(0, graph.num_kernels + 1))
    assert found(longest_chains(graph, budget)) == slow_longest_chains(graph, budget)


@EXACT
@given(graphs())
def test_the_first_chain_is_the_longest_of_all_paths(graph):
    assume(np.count_nonzero(graph.alive) > 1)
    chain = brute_force_chain(graph)
    keep, chains = found(longest_chains(graph, 1))
    assert chains == bool(chain)
    assert keep == (chain or filled(graph, set(), 1))


@EXACT
@given(graphs(), st.data())
def test_complete_paths_are_those_of_the_definition(graph, data):
    budget = data.draw(st.integers(0, graph.num_kernels + 1))
    assert found(complete_paths(graph, budget)) == slow_complete_paths(graph, budget)
