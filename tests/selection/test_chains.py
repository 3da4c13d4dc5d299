"""Longest chains, against slow code written straight from the definition."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fxlean.channels.graph import ChannelGraph
from fxlean.selection.chains import longest_chains
from tests.support.graphs import INPUT, Row, build, dense, edges_into, filled, found, graphs

EXACT = settings(derandomize=True, deadline=None, max_examples=400)


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


@pytest.mark.parametrize("length", [0.0, 0.5, 1.0, 2.0])
def test_equal_lengths_are_told_apart_by_number(length):
    graph = dense([2, 20, 20, 3], np.full(2 * 20 + 20 * 20 + 20 * 3, length))
    for budget in (1, 40):
        assert found(longest_chains(graph, budget)) == slow_longest_chains(graph, budget)


@pytest.mark.parametrize(("length", "chains"), [(1e-30, 0), (1e30, 1)])
def test_products_that_no_float_holds(length, chains):
    """150 layers; one kernel of each is twice as long as the other."""
    rows = [INPUT]
    for kernel in range(0, 300, 2):
        sources = (len(rows) - 1,) * 2
        rows.append(Row(sources, (length, 2 * length), kernel, output=kernel == 298))
    assert found(longest_chains(build(rows), 150)) == (set(range(1, 300, 2)), chains)


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


def test_kernels_that_are_not_alive_are_never_kept():
    graph = build([INPUT, Row((0, 0, 0), (9.0, 3.0, 0.5), 0, output=True)], [False, True, True])
    kept = [found(longest_chains(graph, budget))[0] for budget in range(4)]
    assert kept == [set(), {1}, {1, 2}, {1, 2}]


def test_the_example_of_the_documentation():
    rows = [INPUT, Row((0,), (4.0,), 0), Row((0,), (2.0,), 1)]
    graph = build([*rows, Row((1, 2), (2.0, 2.0), 2), Row((1, 2), (0.25, 2.0), 4)])
    assert found(longest_chains(graph, 2)) == ({0, 2}, 1)
    assert found(longest_chains(graph, 4)) == ({0, 1, 2, 3}, 2)
    assert found(longest_chains(graph, 5)) == ({0, 1, 2, 3, 5}, 3)


def test_what_the_head_of_a_row_leaves_out_bounds_the_second_best_edge():
    """Channel 5 loses its first edge to the first chain, and the values of 1 and 2 fall.

    Its head then holds the edge from 1 alone, which first still wins against the edge from 2,
    left out of the head. Once 1 has fallen again, the edge from 2 must be found.
    """
    rows = [INPUT, Row((0,) * 3, (2.0**10, 2.0**5, 2.0), 0), Row((0,) * 2, (2.0**8, 2.0**4), 3)]
    rows += [Row((1, 1), (2.0**20, 2.0**4), 5), Row((2,), (2.0**19,), 7)]
    graph = build([*rows, Row((0, 1, 2), (2.0**40, 2.0**3, 2.0**2), 8)])
    assert found(longest_chains(graph, 7)) == ({8, 0, 5, 3, 7, 1, 6}, 4)
    assert found(longest_chains(graph, 8)) == ({8, 0, 5, 3, 7, 1, 6, 4, 10}, 5)
    assert slow_longest_chains(graph, 8) == found(longest_chains(graph, 8))


def test_of_three_equal_edges_in_a_head_the_first_is_taken():
    """All of the edges 0, 1 and 2 into channel 3 give 8, the first of them by the shortest step."""
    rows = [INPUT, Row((0,), (2.0,), 0), Row((0,), (4.0,), 1)]
    graph = build([*rows, Row((2, 1, 0, 0, 0), (2.0, 4.0, 8.0, 8.8, 2.0**40), 2)])
    assert found(longest_chains(graph, 3)) == ({6, 5, 2, 1}, 3)
    assert slow_longest_chains(graph, 3) == found(longest_chains(graph, 3))


@pytest.mark.parametrize("seed", range(40))
def test_heads_decide_as_the_definition_does_while_values_fall(seed):
    """Parallel edges make the same channels fall many times; prunable and fixed rows read them."""
    generator = np.random.default_rng(seed)

    def powers(low: int, high: int, size: int) -> tuple[float, ...]:
        return tuple((2.0 ** generator.integers(low, high, size)).tolist())

    rows = [INPUT, *(Row((0,) * 3, powers(0, 9, 3), 3 * v) for v in range(3))]
    rows += [Row((v,) * 2, powers(2, 14, 2), 7 + 2 * v) for v in (1, 2, 3)]
    rows += [Row((1, 2, 3, 0), powers(-3, 9, 4), kernel) for kernel in (15, 19)]
    rows += [Row((1, 2, 3), powers(0, 6, 3)) for _ in range(3)]
    graph = build([*rows, Row((7, 8, 9, 10, 11), powers(-1, 3, 5))])
    assert found(longest_chains(graph, 21)) == slow_longest_chains(graph, 21)
