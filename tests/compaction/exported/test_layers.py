"""Layers of exported graphs, against running their operators."""

import pytest
import torch
from torch import fx, nn

from fxlean.channels.rules.movements import moves
from fxlean.channels.weights import Constants
from fxlean.compaction.exported.layers import layers_of
from tests.support.calls import sparse
from tests.support.sites import Data

aten = torch.ops.aten
LINE, IMAGE, VOLUME = Data((2, 6, 9)), Data((2, 6, 5, 5)), Data((2, 6, 3, 3, 3))
MATRIX = Data((3, 6))
BIAS, SIX = sparse(5, seed=3), sparse(6, seed=3)
MEAN, VARIANCE, ZERO = sparse(6, seed=2), torch.full((6,), 0.01), torch.zeros(6)
ONES, NONE = [1, 1], [0, 0]
LAYERS = [
    (aten.conv1d.default, (LINE, sparse(5, 6, 2), None, [2])),
    (aten.conv1d.padding, (LINE, sparse(5, 6, 3), BIAS, [1], "same")),
    (aten.conv2d.default, (IMAGE, sparse(5, 6, 2, 2), BIAS, [1, 2], [1, 0], [2, 1])),
    (aten.conv2d.default, (IMAGE, sparse(6, 1, 2, 2), SIX, ONES, NONE, ONES, 6)),
    (aten.conv2d.default, (IMAGE, sparse(6, 1, 2, 2), None, ONES, NONE, ONES, 6)),
    (aten.conv3d.default, (VOLUME, sparse(5, 6, 2, 2, 2), BIAS)),
    (aten.conv_transpose1d.default, (LINE, sparse(6, 5, 2), None, [2], [0], [1])),
    (aten.conv_transpose2d.input, (IMAGE, sparse(6, 5, 2, 2), BIAS, [2, 2], ONES, ONES)),
    (aten.linear.default, (MATRIX, sparse(5, 6), BIAS)),
    (aten.linear.default, (MATRIX, sparse(5, 6))),
    (aten.addmm.default, (BIAS, MATRIX, sparse(6, 5))),
    *(
        (aten.batch_norm.default, (data, *rest, VARIANCE, False, 0.1, 0.003, False))
        for data in (MATRIX, LINE, IMAGE, VOLUME)
        for rest in [
            (sparse(6), SIX, MEAN),
            (sparse(6), SIX, ZERO),
            (sparse(6), ZERO, ZERO),
            (None, None, MEAN),
        ]
    ),
]
OTHERS = [
    (aten.conv2d.default, (IMAGE, sparse(4, 3, 2, 2), None, ONES, NONE, ONES, 2)),
    (aten.conv2d.default, (IMAGE, sparse(12, 1, 2, 2), None, ONES, NONE, ONES, 6)),
    (aten.conv2d.default, (IMAGE, Data((5, 6, 2, 2)))),
    (aten.conv_transpose2d.input, (IMAGE, sparse(6, 1, 2, 2), None, ONES, NONE, NONE, 6)),
    (aten.linear.default, (Data((2, 3, 6)), sparse(5, 6))),
    (aten.batch_norm.default, (IMAGE, SIX, SIX, MEAN, VARIANCE, True, 0.1, 1e-5, False)),
    (aten.batch_norm.default, (IMAGE, SIX, None, MEAN, VARIANCE, False, 0.1, 1e-5, False)),
    (aten.batch_norm.default, (IMAGE, None, SIX, MEAN, VARIANCE, False, 0.1, 1e-5, False)),
]


def exported(operator, args, generator, *, trained=True, again=None):
    """An operator in a graph of its own, its layers there, and which of its channels are zero.

    `again` says which arguments a second call of the operator has in common with the first.
    """
    graph, root, zero = fx.Graph(), nn.Module(), torch.zeros(0)

    def stand_in(leaf):
        nonlocal zero
        if not isinstance(leaf, Data | torch.Tensor):
            return leaf
        name = f"a{len(graph.nodes)}"
        if isinstance(leaf, torch.Tensor):
            root.register_parameter(name, nn.Parameter(leaf.clone(), trained))
            node = fx.Graph.create_node(graph, "get_attr", name)
            node.meta["val"] = leaf
            return node
        node = graph.placeholder(name)
        value = node.meta["val"] = leaf.draw(leaf.shape, generator=generator)
        zero = torch.rand(value.shape[1], generator=generator) < 0.4
        value.masked_fill_(zero.reshape(1, -1, *[1] * (value.dim() - 2)), 0)
        return node

    found = fx.node.map_aggregate(args, stand_in)
    calls = [found]
    if again is not None:
        other = fx.node.map_aggregate(args, stand_in)
        calls.append(tuple(found[n] if n in again else arg for n, arg in enumerate(other)))
    for each in calls:
        node = graph.call_function(operator, each)
        node.meta["val"] = node.target(*fx.map_arg(each, lambda arg: arg.meta["val"]))
    constants = Constants(fx.GraphModule(root, graph), {}, moves)
    return node, layers_of(graph, constants), zero


def alive(value):
    """Which channels (dimension 1) are not zero everywhere."""
    return value.detach().ne(0).transpose(0, 1).flatten(1).any(1)


@pytest.mark.parametrize(("operator", "args"), LAYERS)
def test_a_layer_computes_what_its_operator_does_in_part_and_whole(operator, args):
    generator = torch.Generator().manual_seed(0)
    for trained in [True, False] * 4:
        node, layers, zero = exported(operator, args, generator, trained=trained)
        layer, whole = layers[node], node.meta["val"]
        data = layer.call.data.meta["val"]
        layer.module.eval()
        torch.testing.assert_close(layer.module(data), whole)
        assert {p.requires_grad for p in layer.module.parameters()} <= {trained}
        assert torch.equal(layer.zero_rows(zero), ~alive(whole))
        rows = torch.rand(whole.shape[1], generator=generator) < 0.5
        rows[-1] = True
        columns = layer.columns(rows, zero)
        # One that is zero is read only where there would be no other.
        assert layer.diagonal or not columns[zero].any() or columns.sum() == 1
        part = layer.cut(rows, columns)
        torch.testing.assert_close(part(data[:, columns]), whole[:, rows])


@pytest.mark.parametrize(("operator", "args"), OTHERS)
def test_what_cannot_be_cut_is_no_layer(operator, args):
    assert not exported(operator, args, torch.Generator().manual_seed(0))[1]


@pytest.mark.parametrize(
    ("call", "shared"), [(LAYERS[2], [1]), (LAYERS[-2], [1]), (LAYERS[-1], [3]), (LAYERS[2], [])]
)
def test_a_layer_has_its_weights_for_itself(call, shared):
    layers = exported(*call, torch.Generator().manual_seed(0), again=shared)[1]
    assert len(layers) == (0 if shared else 2)
