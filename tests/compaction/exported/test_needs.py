"""Which channels an exported graph needs, against running its operators."""

from operator import getitem

import pytest
import torch
from torch import fx

from fxlean.compaction.exported.needs import Channels, Made, _follow, needed
from tests.support.calls import CALLS, FILLED, MOVEMENTS, PADDINGS, X, with_conditions
from tests.support.sites import Data, integers

aten = torch.ops.aten
# As they are in exported graphs, where composite operators are kept.
COMPOSITE = [
    (aten.adaptive_avg_pool2d.default, (X, [2, 2])),
    (aten.cat.default, ([X, Data((2, 1, 3, 3)), X], 1)),
    (aten.copy.default, (X, X)),
    (aten.dropout.default, (X, 0.5, False)),
    (aten.mul.Tensor, (X, torch.ones(3))),
    (aten.mul.Tensor, (X, torch.ones(1, 3, 3))),
    (aten.max_pool2d.default, (X, [2, 2])),
    (aten.pad.default, (X, [1, 1], "constant", 2.0)),
    (aten.pad.default, (X, [1, 1], "constant", 0.0)),
    (aten.pad.default, (X, [1, 1])),
    (aten.pad.default, (X, [1, 1, 0, 1], "reflect")),
    (aten.slice.Tensor, (X, 1, 1, 3)),
    (aten.slice.Tensor, (X, 2, 0, 2**63 - 1)),
    (aten.slice_scatter.default, (X, Data((2, 2, 3, 3)), 1, 0, 4, 2)),
    (aten.slice_scatter.default, (X, X, 2)),
    (aten.zeros_like.default, (X,)),
]
UNLIKE = [  # values that are not made of the channels that they are made from
    (aten.cat.default, ([X, Data((2, 4, 3, 3), integers(5))], 1)),
    (aten.copy.default, (X, Data((2, 1, 3, 3)))),
    (aten.copy.default, (Data((2, 4, 3, 3), integers(5)), X)),
    *((aten.slice.Tensor, (X, 2, *cut)) for cut in [(1,), (0, 2), (None, None, 2)]),
    (aten.slice_scatter.default, (X, Data((2, 4, 2, 3)), 2, 1)),
    (aten.adaptive_avg_pool2d.default, (Data((4, 6, 6)), [2, 2])),
    (aten.add.Tensor, (Data((2, 4, 4, 3)), Data((4, 4, 3)))),
    (aten.mul.Tensor, (X, torch.ones(4, 1, 1))),
]
EVERY = [
    call
    for call in CALLS + FILLED + MOVEMENTS + PADDINGS + COMPOSITE + UNLIKE
    if not any(isinstance(arg, Data) and 0 in arg.shape for arg in call[1])
]


def follow(operator, args, generator):
    """An operator in a graph of its own, and the channels of its operands and results."""
    graph, channels = fx.Graph(), Channels()

    def stand_in(leaf):
        if not isinstance(leaf, Data | torch.Tensor):
            return leaf
        if isinstance(leaf, torch.Tensor):
            node = graph.get_attr(f"a{len(graph.nodes)}", type_expr=None)
            node.meta["val"] = leaf
            return node
        node = graph.placeholder(f"p{len(graph.nodes)}")
        value = leaf.draw(leaf.shape, generator=generator)
        if value.dim() > 1:
            zero = torch.rand(value.shape[1], generator=generator) < 0.4
            value.masked_fill_(zero.reshape(1, -1, *[1] * (value.dim() - 2)), 0)
            channels.make(node, zero)
        node.meta["val"] = value
        return node

    root = torch.nn.Module()
    found = fx.node.map_aggregate(with_conditions(operator, args), stand_in)
    for node in graph.nodes:
        if node.op == "get_attr":
            root.register_buffer(str(node.target), node.meta["val"])
    node = graph.call_function(operator, found)
    node.meta["val"] = run(node, {})
    _follow(channels, node, None)
    graph.output((node,))
    return graph, channels, node


def run(node, values):
    return node.target(*fx.map_arg(node.args, lambda arg: values.get(arg, arg.meta["val"]).clone()))


def first(value):
    return value[0] if isinstance(value, tuple | list) else value


def change(value, where):
    """The value with other numbers in some of its channels."""
    changed = value.clone()
    part = changed[:, where]
    changed[:, where] = ~part if part.dtype == torch.bool else -part - 1
    return changed


def assert_made_of(node, channels):
    """Every channel of a value is where it is said to be made."""
    for place, number in enumerate(channels.of[node].tolist()):
        maker = channels.maker[number]
        source = maker.meta["val"][:, number - channels.made[maker].first]
        assert torch.equal(first(node.meta["val"])[:, place], source)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize(("operator", "args"), EVERY, ids=[str(operator) for operator, _ in EVERY])
def test_results_are_where_they_are_said_to_be_and_depend_on_what_is_read(operator, args):
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        _, channels, node = follow(operator, args, generator)
        numbers, result = channels.of.get(node), first(node.meta["val"])
        if numbers is None or not len(numbers):
            continue
        zero = channels.zeros(numbers)
        assert not result[:, zero].nan_to_num(0.0).any()
        if node not in channels.made:  # it only says where channels are
            for value in [node, *node.all_input_nodes]:
                assert_made_of(value, channels)
            continue
        wanted = torch.rand(len(numbers), generator=generator) < 0.5
        for arg, read in channels.made[node].reads.items():
            used = torch.isin(channels.of[arg], read[wanted])
            after = first(run(node, {arg: change(arg.meta["val"], ~used)}))
            assert torch.equal(result[:, wanted], after[:, wanted])


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize(("operator", "args"), COMPOSITE + UNLIKE)
def test_composite_operators_are_followed_channel_by_channel(operator, args):
    _, channels, node = follow(operator, args, torch.Generator().manual_seed(0))
    made = channels.made.get(node)
    followed = made is None or bool(made.reads) or all(channels.zeros(channels.of[node]))
    assert followed is all(args is not other for _, other in UNLIKE)


def test_only_the_first_of_several_results_has_the_channels_of_a_layer():
    graph, channels = fx.Graph(), Channels()
    norm = graph.placeholder("norm")
    norm.meta["val"] = torch.zeros(2, 4, 3, 3), torch.zeros(4), torch.zeros(4)
    numbers = channels.make(norm, torch.zeros(4, dtype=torch.bool))
    for number, value in enumerate(norm.meta["val"]):
        node = graph.call_function(getitem, (norm, number))
        node.meta["val"] = value
        _follow(channels, node, None)
        assert torch.equal(channels.of[node], numbers[: 0 if number else 4])


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
def test_what_reads_no_channels_by_themselves_needs_them_all():
    generator = torch.Generator().manual_seed(0)
    graph, channels, node = follow(aten.mean.dim, (X, [1], True), generator)
    assert isinstance(channels.made[node], Made)
    assert needed(graph, channels).all()


def test_what_works_channel_by_channel_needs_the_same_channels_of_its_operands():
    generator = torch.Generator().manual_seed(0)
    graph, channels, node = follow(aten.add.Tensor, (X, X), generator)
    (output,) = (other for other in graph.nodes if other.op == "output")
    with graph.inserting_before(output):
        part = graph.call_function(aten.slice.Tensor, (node, 1, 1, 3))
    part.meta["val"] = run(part, {})
    _follow(channels, part, None)
    output.args = ((part,),)
    need = needed(graph, channels)
    for value in (*node.all_input_nodes, node):
        assert need[channels.of[value]].tolist() == [False, True, True, False]
