"""Zero channels and used kernels, against slow code written straight from the definitions."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fxlean.channels.graph import Kind
from fxlean.selection.liveness import used_kernels, zero_channels
from tests.support.graphs import INPUT, Row, build, edges_into, grouped_graphs


@st.composite
def masked_graphs(draw):
    graph = draw(grouped_graphs())
    size = graph.num_kernels
    return graph, np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=bool)


def zero_by_definition(graph, keep, redundancy=True):
    """The largest set of zero channels: drop from it what cannot be zero until nothing changes."""
    zero = {c for c in range(graph.num_channels) if graph.kinds[c] != Kind.LIVE}

    def can_be_zero(channel):
        edges = [(source, kernel) for source, _, kernel in edges_into(graph, channel)]
        if graph.kinds[channel] == Kind.PRODUCT:
            return any(source in zero for source, _ in edges)
        if graph.kinds[channel] == Kind.DEAD and (redundancy or not edges):
            return True
        for source, kernel in edges:
            pruned = kernel is not None and not keep[kernel]
            silent = source in zero and (redundancy or kernel is None)
            if not pruned and not silent:
                return False
        return True

    while True:
        live_ties = {int(graph.ties[c]) for c in range(graph.num_channels) if c not in zero}
        left = {c for c in zero if can_be_zero(c) and int(graph.ties[c]) not in live_ties}
        if left == zero:
            return zero
        zero = left


def used_by_definition(graph, keep):
    """Remove one redundant kernel after the other until there is none."""
    keep = keep.copy()
    while True:
        zero = zero_by_definition(graph, keep)
        needed = {c for c in range(graph.num_channels) if graph.outputs[c] or graph.opaque[c]}
        for channel in reversed(range(graph.num_channels)):
            if channel in needed and channel not in zero:
                needed |= {
                    s
                    for s, _, k in edges_into(graph, channel)
                    if s not in zero and (k is None or keep[k])
                }
        redundant = [
            kernel
            for channel in range(graph.num_channels)
            for source, _, kernel in edges_into(graph, channel)
            if kernel is not None
            and keep[kernel]
            and (channel not in needed or channel in zero or source in zero)
        ]
        if not redundant:
            return keep
        keep[redundant[0]] = False


@settings(max_examples=300)
@given(masked_graphs(), st.booleans())
def test_zero_channels_are_the_largest_set_that_can_be_zero(drawn, redundancy):
    graph, keep = drawn
    found = zero_channels(graph, keep, redundancy=redundancy)
    assert set(found.nonzero()[0].tolist()) == zero_by_definition(graph, keep, redundancy)


@settings(max_examples=300)
@given(masked_graphs())
def test_used_kernels_are_what_is_left_when_none_is_redundant(drawn):
    graph, keep = drawn
    assert used_kernels(graph, keep).tolist() == used_by_definition(graph, keep).tolist()


@given(masked_graphs())
def test_used_kernels_are_some_of_those_kept_and_are_all_used(drawn):
    graph, keep = drawn
    used = used_kernels(graph, keep)
    assert not (used & ~keep).any()
    assert used_kernels(graph, used).tolist() == used.tolist()


def test_what_a_needed_channel_reads_is_needed():
    rows = [INPUT, Row((0, 0), (1.0, 1.0), 0), Row((1,), (1.0,)), Row((2,), (1.0,), 2)]
    graph = build([*rows, Row((3,), (1.0,), output=True)])
    assert used_kernels(graph, np.array([True, False, True])).tolist() == [True, False, True]


def test_a_channel_that_nothing_reads_frees_the_others_of_its_group():
    """Channels 1 and 2 share a bias; all of 2 is pruned, and 1 is not needed: both can be zero."""
    rows = [INPUT, Row((0,), (1.0,), 0), Row((0,), (1.0,), 1), Row((2, 0), (1.0,) * 2, 2)]
    graph = build([*rows[:3], replace(rows[3], output=True)])
    graph = replace(graph, ties=np.array([0, 1, 1, 3], dtype=np.int32))
    keep = np.array([True, False, True, True])
    assert used_kernels(graph, keep).tolist() == [False, False, False, True]
