"""The channel graph and its liveness, against slow code written straight from the definitions."""

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fxlean
from fxlean.channels.graph import ChannelGraph, Kind, Layer
from fxlean.selection.liveness import used_kernels, zero_channels
from tests.support.zoo import ZOO, make


@st.composite
def graphs(draw):
    """Small graphs of every kind of channel, with shared lists of sources and groups."""
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
        groups=np.array([draw(st.sampled_from([c, c, 0])) for c in range(count)], dtype=np.int32),
        alive=np.ones(total, dtype=bool),
    )


@st.composite
def masked_graphs(draw):
    graph = draw(graphs())
    size = graph.num_kernels
    return graph, np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=bool)


def row(graph, channel):
    """(source, kernel or None) of every edge into a channel."""
    start, kernel = graph.source_start[channel], graph.kernel_start[channel]
    for j in range(graph.sizes[channel]):
        yield int(graph.sources[start + j]), None if kernel < 0 else int(kernel + j)


def zero_by_definition(graph, keep, redundancy=True):
    """The largest set of zero channels: drop from it what cannot be zero until nothing changes."""
    zero = {c for c in range(graph.num_channels) if graph.kinds[c] != Kind.LIVE}

    def can_be_zero(channel):
        edges = list(row(graph, channel))
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
        alive_groups = {int(graph.groups[c]) for c in range(graph.num_channels) if c not in zero}
        left = {c for c in zero if can_be_zero(c) and int(graph.groups[c]) not in alive_groups}
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
                    s for s, k in row(graph, channel) if s not in zero and (k is None or keep[k])
                }
        redundant = [
            kernel
            for channel in range(graph.num_channels)
            for source, kernel in row(graph, channel)
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


@given(graphs())
def test_edges_are_those_of_the_rows(graph):
    sources, targets, lengths = graph.edges()
    wanted = [(s, c) for c in range(graph.num_channels) for s, _ in row(graph, c)]
    assert list(zip(sources.tolist(), targets.tolist(), strict=True)) == wanted
    assert lengths.tolist() == graph.lengths.tolist()
    assert graph.num_edges == len(wanted)
    assert (sources < targets).all()


@given(graphs())
def test_adjacency_holds_the_longest_of_parallel_edges(graph):
    longest = {}
    for source, target, length in zip(*(a.tolist() for a in graph.edges()), strict=True):
        longest[source, target] = max(length, longest.get((source, target), 0.0))
    matrix = graph.adjacency().tocoo()
    assert matrix.shape == (graph.num_channels, graph.num_channels)
    entries = zip(matrix.row.tolist(), matrix.col.tolist(), matrix.data.tolist(), strict=True)
    assert {(source, target): length for source, target, length in entries} == longest


@pytest.mark.parametrize("name", ["residual", "concat", "u_net"])
def test_networkx_reads_the_adjacency(name):
    graph = fxlean.trace(*make(name))
    digraph = nx.from_scipy_sparse_array(graph.adjacency(), create_using=nx.DiGraph)
    assert nx.is_directed_acyclic_graph(digraph)
    assert digraph.number_of_nodes() == graph.num_channels
    inputs = [channel for channel in digraph if channel > 1 and digraph.in_degree(channel) == 0]
    (output, *_) = graph.outputs.nonzero()[0]
    assert any(nx.has_path(digraph, channel, output) for channel in inputs)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_kernels_of_layers_are_numbered_without_gaps(name):
    graph = fxlean.trace(*make(name))
    end = 0
    for layer in graph.layers:
        assert layer.kernels == slice(end, end + layer.rows * layer.columns)
        end = layer.kernels.stop
    assert end == graph.num_kernels
    text = f"{graph.num_channels:,} channels, {graph.num_edges:,} edges, {end:,} prunable kernels"
    assert text in repr(graph)


def test_a_graph_with_other_lengths_has_the_same_wiring():
    graph = fxlean.trace(*make("residual"))
    other = graph.with_lengths(graph.lengths * 2)
    assert other.sources is graph.sources
    assert other.lengths.tolist() == (graph.lengths * 2).tolist()
    assert Layer("a", 3, 2, 4).kernels == slice(3, 11)
