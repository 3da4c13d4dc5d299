"""The channel graph: its edges, as lists and as a matrix, and the kernels of its layers."""

import networkx as nx
import pytest
from hypothesis import given

import fxlean
from fxlean.channels.graph import Layer
from tests.support.graphs import edges_into, grouped_graphs
from tests.support.zoo import ZOO, make


@given(grouped_graphs())
def test_edges_are_those_of_the_rows(graph):
    sources, targets, lengths = graph.edges()
    wanted = [(s, c) for c in range(graph.num_channels) for s, _, _ in edges_into(graph, c)]
    assert list(zip(sources.tolist(), targets.tolist(), strict=True)) == wanted
    assert lengths.tolist() == graph.lengths.tolist()
    assert graph.num_edges == len(wanted)
    assert (sources < targets).all()


@given(grouped_graphs())
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
