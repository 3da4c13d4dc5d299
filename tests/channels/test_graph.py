"""The channel graph: its edges, as lists and as a matrix, and the kernels of its layers."""

import re

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

import fxlean
from fxlean.channels.graph import Kind, Layer
from tests.support.blocks import conv, residual
from tests.support.graphs import dense, edges_into, grouped_graphs
from tests.support.zoo import ZOO, make

ALL = {"prune_outputs": True}


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
    assert Layer("a", "a.weight", 3, 2, 4).kernels == slice(3, 11)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_makers_have_made_all_channels_and_inputs_those_that_nothing_feeds(name):
    model, inputs = make(name)
    graph = fxlean.trace(model, inputs)
    ends = [maker.first + maker.count for maker in graph.makers]
    assert [maker.first for maker in graph.makers] == [0, *ends[:-1]]
    assert ends[-1] == graph.num_channels
    wanted = ["input", *(f"input{number}" for number in range(2, len(inputs) + 1))]
    found = [maker for maker in graph.makers if re.fullmatch(r"input\d*", maker.name)]
    assert [(maker.name, maker.count) for maker in found] == [
        (name, image.shape[1]) for name, image in zip(wanted, inputs, strict=True)
    ]
    unfed = np.flatnonzero((graph.sizes == 0) & (graph.kinds == Kind.LIVE))
    named = [c for c, name in enumerate(graph.names()) if re.match(r"input\d*\[", name)]
    assert named == [channel for channel in unfed if channel > 1]


def test_channels_are_named_by_what_makes_them():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 2, 1), nn.Conv2d(1, 2, 1)

        def forward(self, image, depth):
            left, right = self.left(image), self.right(depth)
            return (left + right) + left

    graph = fxlean.trace(Both(), (torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2)), **ALL)
    layers = ["left[0]", "left[1]", "right[0]", "right[1]"]
    sums = ["add[0]", "add[1]", "add_1[0]", "add_1[1]"]
    inputs = ["input[0]", "input[1]", "input[2]", "input2[0]"]
    assert graph.names() == ["zero[0]", "constant[0]", *inputs, *layers, *sums]


@pytest.mark.filterwarnings("ignore::fxlean.PruneWarning")
def test_operators_of_a_part_that_is_traced_alone_have_its_name():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = residual(conv(2, 2)), residual(conv(2, 2))

        def forward(self, x):
            return self.two(self.one(x) if x.max() > 9 else self.one(-x))

    names = fxlean.trace(Looks(), torch.zeros(1, 2, 4, 4), **ALL).names()
    assert {"one.add[0]", "two.add[1]", "input[1]"} <= set(names)
    assert len(set(names)) == len(names)


def test_in_a_graph_made_by_hand_channels_are_named_by_kind_and_number():
    assert dense([2, 1], np.ones(2)).names() == ["live 0", "live 1", "sum 2"]


def test_kernels_of_every_weight_of_an_attention_name_their_parameter():
    graph = fxlean.trace(*make("multi_head"), include_linear=True)
    parameters = {graph.kernel(layer.start)[:2] for layer in graph.layers}
    assert parameters >= {
        ("2.attention.in_proj_weight", "2.attention.in_proj_weight"),
        ("2.attention.out_proj", "2.attention.out_proj.weight"),
    }
