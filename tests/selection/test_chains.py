"""Longest chains and complete paths, against slow code written straight from the definitions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fxlean.channels.graph import ChannelGraph, Kind
from fxlean.selection.chains import longest_chains
from fxlean.selection.paths import _descending, complete_paths
from fxlean.selection.ranking import fill_largest, kernel_scores

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


def slow_longest_chains(graph: ChannelGraph, budget: int) -> tuple[set[int], int]:
    """The definition: all values from scratch for every chain, in exact arithmetic."""
    alive = set(np.flatnonzero(graph.alive).tolist())
    if len(alive) <= budget:
        return alive, 0
    rows = [edges_into(graph, v) for v in range(graph.num_channels)]
    kept: set[int] = set()
    chains = 0
    while len(kept) < budget:
        best: dict[int, Fraction] = {}
        last: dict[int, tuple[int, int | None]] = {}
        live = alive - kept
        for v, row in enumerate(rows):
            for u, w, kernel in row:
                if kernel in live:
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
        if (graph.kinds[v] == Kind.PRODUCT and 0 in values) or graph.kinds[v] == Kind.DEAD:
            row = [(u, Fraction(0), kernel) for u, _, kernel in row]
        elif not row:
            forward[v] = Fraction(int(graph.kinds[v] == Kind.LIVE))
        else:
            forward[v] = max(values)
            strongest[v] = values.index(forward[v])
        if graph.kinds[v] == Kind.PRODUCT and forward[v] > 0:
            row = [(u, forward[v] / forward[u], kernel) for u, _, kernel in row]
        usable.append(row)
    readers: list[list[tuple[int, int, Fraction]]] = [[] for _ in range(n)]
    for v, row in enumerate(usable):
        for j, (u, w, _) in enumerate(row):
            readers[u].append((v, j, w * forward[u]))
    backward = [Fraction(1) if end else Fraction(0) for end in graph.outputs]
    following: list[tuple[int, int] | None] = [None] * n
    through: dict[int, tuple[Fraction, int, int]] = {}
    for u in reversed(range(n)):
        for v, j, through_edge in readers[u]:
            if through_edge * backward[v] > backward[u] * forward[u]:
                backward[u] = through_edge / forward[u] * backward[v]
                following[u] = (v, j)
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

    def on_along(v: int, j: int) -> None:
        kernel = usable[v][j][2]
        if kernel is not None:
            kept.add(kernel)
        if graph.kinds[v] == Kind.PRODUCT:
            back_from(v)
        after = following[v]
        if after is not None:
            on_along(*after)

    chains = 0
    for kernel in sorted(through, key=lambda kernel: (-through[kernel][0], kernel)):
        if len(kept) < budget and kernel not in kept:
            _, v, j = through[kernel]
            on_along(v, j)
            back_from(usable[v][j][0])
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


@pytest.mark.parametrize("shift", [-2.0, -0.5, 0.0, 1.0, 9.0])
@pytest.mark.parametrize("widths", [(2, 80, 9, 2), (2, 5, 8, 20, 8, 8, 8, 3), (1, 150, 3)])
def test_wide_and_deep_networks_agree_with_the_definition(widths, shift):
    generator = np.random.default_rng(len(widths))
    count = sum(a * b for a, b in pairwise(widths))
    graph = dense(list(widths), np.exp(generator.normal(shift, 1.0, count)))
    for budget in (1, 25):
        assert found(longest_chains(graph, budget)) == slow_longest_chains(graph, budget)
        assert found(complete_paths(graph, budget)) == slow_complete_paths(graph, budget)


@pytest.mark.parametrize("length", [0.0, 0.5, 1.0, 2.0])
def test_equal_lengths_are_told_apart_by_number(length):
    graph = dense([2, 20, 20, 3], np.full(2 * 20 + 20 * 20 + 20 * 3, length))
    for budget in (1, 40):
        assert found(longest_chains(graph, budget)) == slow_longest_chains(graph, budget)
        assert found(complete_paths(graph, budget)) == slow_complete_paths(graph, budget)


@pytest.mark.parametrize("length", [1e-30, 1e30])
def test_products_that_no_float_holds(length):
    """150 layers; one kernel of each is twice as long as the other."""
    rows = [INPUT]
    for kernel in range(0, 300, 2):
        sources = (len(rows) - 1,) * 2
        rows.append(Row(sources, (length, 2 * length), kernel, output=kernel == 298))
    graph = build(rows)
    second = set(range(1, 300, 2))
    assert found(complete_paths(graph, 150)) == (second, 1)
    if length > 1:
        assert found(longest_chains(graph, 150)) == (second, 1)
    else:
        assert found(longest_chains(graph, 150)) == (second, 0)


def test_a_product_of_exactly_one_goes_on_and_less_does_not():
    def three(second: float) -> ChannelGraph:
        chain = [Row((0,), (2.0,), 0), Row((1,), (second,), 1), Row((2,), (3.0,), 2)]
        return build([INPUT, *chain, Row((0,) * 9, (0.25,) * 9, 3)])

    assert found(longest_chains(three(0.5), 1)) == ({0, 1, 2}, 1)
    below = float(np.nextafter(np.float32(0.5), np.float32(0)))
    assert found(longest_chains(three(below), 1)) == ({2}, 1)


def test_fixed_edges_of_length_one_are_neutral():
    """A chain through three joins, against the same chain without them, in one network."""
    joined = [Row((0,), (3.0,), 0), Row((1,), (1.0,)), Row((2,), (1.0,)), Row((3,), (2.0,), 1)]
    plain = [Row((0,), (3.0,), 2), Row((5,), (2.0,), 3)]
    keep, chains = longest_chains(build([INPUT, *joined, *plain]), 3)
    assert (keep.tolist(), chains) == ([True] * 4, 2)
    keep, chains = longest_chains(build([INPUT, *joined, *plain]), 2)
    assert (keep.tolist(), chains) == ([True, True, False, False], 1)


def test_the_layer_of_the_output_does_not_decide_which_chain_is_longest():
    rows = [INPUT, Row((0,), (2.0,), 0), Row((0,), (3.0,), 1)]
    last = [Row((1,), (100.0,), output=True), Row((2,), (1.0,), output=True)]
    assert found(longest_chains(build(rows + last), 1)) == ({1}, 1)
    passed = Row((3,), (2.0,), 2)
    assert found(longest_chains(build([*rows, *last, passed]), 2)) == ({0, 2}, 1)


def test_a_shared_kernel_counts_once():
    twice = build([INPUT, Row((0,), (3.0,), 0), Row((1,), (3.0,), 0), Row((0,) * 3, (2.0,) * 3, 1)])
    assert found(longest_chains(twice, 2)) == ({0, 1}, 2)
    assert found(complete_paths(replace(twice, outputs=np.array([0, 0, 1, 0], bool)), 1)) == (
        {0},
        1,
    )


def test_kernels_that_are_not_alive_are_never_kept():
    rows = [INPUT, Row((0, 0, 0), (9.0, 3.0, 0.5), 0, output=True)]
    graph = build(rows, [False, True, True])
    for method in (longest_chains, complete_paths):
        assert [found(method(graph, budget))[0] for budget in range(4)] == [
            set(),
            {1},
            {1, 2},
            {1, 2},
        ]


@EXACT
@given(graphs(), st.data())
def test_complete_paths_are_those_of_the_definition(graph, data):
    budget = data.draw(st.integers(0, graph.num_kernels + 1))
    assert found(complete_paths(graph, budget)) == slow_complete_paths(graph, budget)


def reached(graph: ChannelGraph, keep: set[int]) -> tuple[set[int], set[int]]:
    """Channels that kept chains reach from an input, and from which they reach an output."""
    fed: set[int] = set()
    rows = []
    for v in range(graph.num_channels):
        edges = [(u, w > 0 and (k is None or k in keep)) for u, w, k in edges_into(graph, v)]
        kind = graph.kinds[v]
        if kind == Kind.DEAD or (
            kind == Kind.PRODUCT and not all(u in fed and w for u, w in edges)
        ):
            edges = []
        if any(u in fed and used for u, used in edges) or (
            graph.sizes[v] == 0 and kind == Kind.LIVE
        ):
            fed.add(v)
        rows.append([u for u, used in edges if used])
    read = set(np.flatnonzero(graph.outputs).tolist())
    for v in reversed(range(graph.num_channels)):
        read |= set(rows[v]) if v in read and v in fed else set()
    return fed, read


@EXACT
@given(graphs(shared=False), st.data())
def test_kept_paths_are_complete_and_overshoot_by_less_than_a_chain(graph, data):
    alive = int(np.count_nonzero(graph.alive))
    budget = data.draw(st.integers(0, max(0, alive - 1)))
    keep, chains = found(complete_paths(graph, budget))
    assert len(keep) >= min(budget, alive)
    through = set()
    fed, read = reached(graph, set(np.flatnonzero(graph.alive).tolist()))
    for v in range(graph.num_channels):
        if v in fed and v in read:
            through |= {k for u, w, k in edges_into(graph, v) if u in fed and w > 0}
    through &= set(np.flatnonzero(graph.alive).tolist())
    assume(budget <= len(through))
    assert keep <= through
    fed, read = reached(graph, keep)
    for v in range(graph.num_channels):
        for u, _, kernel in edges_into(graph, v):
            assert kernel not in keep or (u in fed and v in fed and v in read)
    if chains > 1:
        fewer = [found(complete_paths(graph, smaller)) for smaller in range(budget)]
        assert max(len(kept) for kept, count in fewer if count < chains) < budget


@FEWER
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 0.3, 7.0, 1e4]))
def test_rescaling_neighbouring_layers_changes_no_complete_path(seed, scale):
    generator = np.random.default_rng(seed)
    widths = [2, 4, 5, 3, 2]
    starts = np.cumsum([0, *(a * b for a, b in pairwise(widths))])
    lengths = np.exp(generator.normal(0, 1, starts[-1]))
    scaled = lengths.copy()
    scaled[starts[1] : starts[2]] *= scale
    scaled[starts[2] : starts[3]] /= scale
    for budget in (5, 12, 30):
        expected = found(complete_paths(dense(widths, lengths), budget))
        assert found(complete_paths(dense(widths, scaled), budget)) == expected


def test_a_path_through_a_product_has_a_path_into_every_operand():
    """Two inputs; kernel 0 is long, kernel 1 short, and their product goes on by kernel 2."""
    rows = [INPUT, INPUT, Row((0,), (8.0,), 0), Row((1,), (0.01,), 1)]
    rows += [Row((2, 3), (1.0, 1.0), kind=Kind.PRODUCT), Row((4,), (1.0,), 2)]
    rows += [Row((0,) * 2, (4.0,) * 2, 3), Row((5, 6), (1.0, 1.0), output=True)]
    assert found(complete_paths(build(rows), 1)) == ({0, 1, 2}, 1)
    weak = [*rows[:3], Row((1,), (0.0,), 1), *rows[4:]]
    assert found(complete_paths(build(weak), 1)) == ({3}, 1)
    assert found(complete_paths(build(weak), 3)) == ({0, 3, 4}, 2)


def test_the_scores_of_kernels_are_the_maxima_of_their_edges():
    rows = [INPUT, Row((0, 0), (1.0, 5.0), 0), Row((1, 0), (2.0, 3.0), 0), Row((2,), (9.0,))]
    graph = build(rows, [True, False, True])
    assert kernel_scores(graph).tolist() == [2.0, 5.0, 0.0]


def test_filling_takes_the_largest_and_of_equal_ones_the_first():
    keep = np.array([False, True, False, False, False, False])
    alive = np.array([True, True, True, True, True, False])
    fill_largest(keep, alive, np.array([1, 9, 2, 1, 1, 9], dtype=np.float32), 4)
    assert np.flatnonzero(keep).tolist() == [0, 1, 2, 3]
    fill_largest(keep, alive, np.zeros(6, dtype=np.float32), 9)
    assert np.array_equal(keep, alive)


@EXACT
@given(st.data(), st.integers(1, 80))
def test_path_ranks_kernels_exactly(data, size):
    near = st.integers(-3, 3).map(lambda number: 1 + number * 1e-12)
    values = st.one_of(st.just(-np.inf), near, st.floats(-100, 100))
    through = np.array(data.draw(st.lists(values, min_size=size, max_size=size)))
    count = data.draw(st.integers(1, size))
    finite = np.argsort(-through, kind="stable")[: np.isfinite(through).sum()]
    found = _descending(through, count)
    assert len(found) >= min(count, len(finite))
    assert np.array_equal(found, finite[: len(found)])
