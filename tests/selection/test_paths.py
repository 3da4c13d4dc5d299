"""Complete paths, against slow code written straight from the definition."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fxlean.channels.graph import ChannelGraph, Kind
from fxlean.selection.paths import _descending, complete_paths
from tests.support.graphs import INPUT, Row, build, dense, edges_into, filled, found, graphs

EXACT = settings(derandomize=True, deadline=None, max_examples=400)
FEWER = settings(derandomize=True, deadline=None, max_examples=100)


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


@pytest.mark.parametrize("shift", [-2.0, -0.5, 0.0, 1.0, 9.0])
@pytest.mark.parametrize("widths", [(2, 80, 9, 2), (2, 5, 8, 20, 8, 8, 8, 3), (1, 150, 3)])
def test_wide_and_deep_networks_agree_with_the_definition(widths, shift):
    generator = np.random.default_rng(len(widths))
    count = sum(a * b for a, b in pairwise(widths))
    graph = dense(list(widths), np.exp(generator.normal(shift, 1.0, count)))
    for budget in (1, 25):
        assert found(complete_paths(graph, budget)) == slow_complete_paths(graph, budget)


@pytest.mark.parametrize("length", [0.0, 0.5, 1.0, 2.0])
def test_equal_lengths_are_told_apart_by_number(length):
    graph = dense([2, 20, 20, 3], np.full(2 * 20 + 20 * 20 + 20 * 3, length))
    for budget in (1, 40):
        assert found(complete_paths(graph, budget)) == slow_complete_paths(graph, budget)


@pytest.mark.parametrize("length", [1e-30, 1e30])
def test_products_that_no_float_holds(length):
    """150 layers; one kernel of each is twice as long as the other."""
    rows = [INPUT]
    for kernel in range(0, 300, 2):
        sources = (len(rows) - 1,) * 2
        rows.append(Row(sources, (length, 2 * length), kernel, output=kernel == 298))
    assert found(complete_paths(build(rows), 150)) == (set(range(1, 300, 2)), 1)


def test_a_shared_kernel_counts_once():
    rows = [INPUT, Row((0,), (3.0,), 0), Row((1,), (3.0,), 0, output=True)]
    graph = build([*rows, Row((0,) * 3, (2.0,) * 3, 1)])
    assert found(complete_paths(graph, 1)) == ({0}, 1)


def test_kernels_that_are_not_alive_are_never_kept():
    graph = build([INPUT, Row((0, 0, 0), (9.0, 3.0, 0.5), 0, output=True)], [False, True, True])
    kept = [found(complete_paths(graph, budget))[0] for budget in range(4)]
    assert kept == [set(), {1}, {1, 2}, {1, 2}]


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


def test_operands_of_a_product_count_as_much_as_the_product():
    """The product is 8 long, and so are its operands; a chain of 16 comes first."""
    rows = [INPUT, INPUT, Row((0,), (8.0,), 0), Row((1,), (0.01,), 1)]
    rows += [Row((2, 3), (1.0, 1.0), kind=Kind.PRODUCT), Row((0,) * 2, (16.0,) * 2, 2)]
    graph = build([*rows, Row((4, 5), (1.0, 1.0), output=True)])
    assert [found(complete_paths(graph, budget))[0] for budget in (1, 2, 3)] == [
        {2},
        {2, 3},
        {0, 1, 2, 3},
    ]


def test_an_output_ends_its_chain_unless_going_on_is_longer():
    def two(second: float) -> ChannelGraph:
        rows = [INPUT, Row((0,), (2.0,), 0, output=True), Row((1,), (second,), 1, output=True)]
        return build([*rows, Row((0,) * 2, (0.01,) * 2, 2, output=True)])

    assert found(complete_paths(two(1.0), 1)) == ({0}, 1)
    assert found(complete_paths(two(1.5), 1)) == ({0, 1}, 1)


@pytest.mark.parametrize(("lengths", "kept"), [((2.0, 4.0), {0, 2}), ((4.0, 2.0), {0, 1})])
def test_a_shared_kernel_brings_along_the_longest_of_its_chains(lengths, kept):
    """Kernel 0 leads into channels 1 and 2, and from there kernels 1 and 2 lead on."""
    rows = [INPUT, Row((0,), (3.0,), 0), Row((0,), (3.0,), 0)]
    rows += [Row((1,), lengths[:1], 1, output=True), Row((2,), lengths[1:], 2, output=True)]
    assert found(complete_paths(build(rows), 1)) == (kept, 1)


def test_of_equal_chains_of_a_shared_kernel_the_first_is_taken():
    rows = [INPUT, Row((0,), (3.0,), 0), Row((0,), (3.0,), 0)]
    rows += [Row((1,), (2.0,), 1, output=True), Row((2,), (2.0,), 2, output=True)]
    assert found(complete_paths(build(rows), 1)) == ({0, 1}, 1)


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
