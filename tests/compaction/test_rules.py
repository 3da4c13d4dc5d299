"""Every rule on slots, against running its operator on fewer channels."""

from collections import defaultdict

import pytest
import torch
from torch import fx

from fxlean.channels.flow import make_flow, scalar_gain
from fxlean.compaction.rules import FOLLOW, SIZED, SPLITS, apply_rule
from fxlean.compaction.slots import Slots
from fxlean.compaction.solve import components
from fxlean.compaction.walk import slots_of
from fxlean.tracing.leaves import as_real
from fxlean.tracing.tracer import trace_model
from tests.support.calls import CALLS, FILLED, MOVEMENTS, PADDINGS, sparse, with_conditions
from tests.support.sites import Data, site_of

aten = torch.ops.aten
BY_OPERATOR = defaultdict(list)
for _operator, _args in CALLS + FILLED + MOVEMENTS + PADDINGS:
    BY_OPERATOR[_operator.overloadpacket].append((_operator, _args))
# All that these read and write stays. Layers are cut elsewhere: the calls here belong to none.
STUCK = {
    aten._batch_norm_no_update,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training,
    aten.addmm,
    aten.aminmax,
    aten.as_strided_,
    aten.batch_norm,
    aten.convolution,
    aten.copy,
    aten.diagonal,
    aten.embedding,
    aten.gather,
    aten.index_put,
    aten.mm,
    aten.native_batch_norm,
    aten.native_group_norm,
    aten.select_scatter,
    aten.slice_scatter,
    aten.tril,
    aten.triu,
}


def on_slots(operator, args, generator, owner=None):
    """The operator on values of new slots along one dimension each, a third of them zero."""
    slots = Slots()

    def flow_of(value):
        dims = [dim for dim, size in enumerate(value.shape) if size > 1]
        dim = dims[int(torch.randint(len(dims), (), generator=generator))] if dims else 0
        if 1 in dims and torch.rand((), generator=generator) < 0.7:
            dim = 1
        zero = torch.rand(value.shape[dim], generator=generator) < 0.3
        shape = [len(zero) if d == dim else 1 for d in range(value.dim())]
        value.masked_fill_(zero.reshape(shape), 0)
        return make_flow(slots.new(zero).reshape(shape), scalar_gain(value.dim()), value.shape)

    arguments = with_conditions(operator, args)
    site = site_of(operator, arguments, generator, slots, flow_of, owner)
    result = apply_rule(site, slots, FOLLOW[0])
    flows = result if isinstance(result, tuple) else (result,)
    return site, slots, flows


def results(site, values, args):
    """What the operator gives for other values of its flows."""
    found = site.node.target(
        *fx.map_arg(args, lambda node: values.get(node, node.meta["val"])), **site.node.kwargs
    )
    return list(found) if isinstance(found, tuple | list) else [found]


def left(value, flow, kept):
    """What is left of a value without the slots that are not kept: whole slices only."""
    mask = kept[flow.ids]
    found = torch.ones_like(mask)
    for dim in range(value.dim()):
        others = [other for other in range(value.dim()) if other != dim]
        whole = mask.any(others, keepdim=True) if others else mask
        found = found & whole
        if flow.varies(dim):
            value = value.index_select(dim, whole.reshape(-1).nonzero()[:, 0])
    assert torch.equal(found, mask)
    return value if mask.any() else value.narrow(0, 0, 0)


def constants_left(site, slots, kept):
    """What is left of the constants that are cut with the channels."""
    found = {}
    for node in site.constant_nodes():
        for dim, places in slots.tensors.get(site.constants.stored(node), ()):
            found[node] = node.meta["val"].index_select(dim, kept[places].nonzero()[:, 0])
    return found


def some_kept(slots, generator):
    """True for the slots of a random choice of all that can be kept or removed together."""
    label = components(slots)
    kept = torch.rand(int(label.max()) + 1, generator=generator) < 0.6
    kept[label[torch.cat(slots.pinned)]] = True
    return kept[label]


def with_sizes(site, expected):
    """The arguments of the operator, with sizes as code computes them anew."""
    args = site.node.args
    if site.packet in SIZED - {aten.squeeze, aten.flatten}:
        return (args[0], tuple(expected[0].shape))
    if site.packet is aten.as_strided:
        return (args[0], expected[0].shape, expected[0].stride())
    if site.packet in SPLITS:
        sizes = [part.shape[args[2]] for part in expected]
        return (
            args[0],
            sizes[0] if site.packet in (aten.split, aten.unsafe_split) else sizes,
            args[2],
        )
    return args


def same(found, expected):
    found, expected = as_real(found).double(), as_real(expected).double()
    return found.shape == expected.shape and torch.allclose(found, expected, equal_nan=True)


@pytest.mark.parametrize("packet", list(BY_OPERATOR), ids=str)
def test_fewer_channels_give_the_same_but_fewer(packet):
    generator = torch.Generator().manual_seed(0)
    removed = 0
    for operator, args in BY_OPERATOR[packet] * 24:
        if any(isinstance(arg, Data) and 0 in arg.shape for arg in args):
            continue
        site, slots, flows = on_slots(operator, args, generator)
        kept = some_kept(slots, generator)
        read = [kept[flow.ids] for flow in site.env.values()]
        # A value without channels is no value.
        if all(part.all() for part in read) or not all(part.any() for part in read):
            continue
        removed += 1
        whole = results(site, {}, site.node.args)
        expected = [
            None if flow is None else left(value, flow, kept)
            for value, flow in zip(whole, flows, strict=True)
        ]
        smaller = {node: left(node.meta["val"], flow, kept) for node, flow in site.env.items()}
        smaller |= constants_left(site, slots, kept)
        found = results(site, smaller, with_sizes(site, expected))
        for result, wanted in zip(found, expected, strict=True):
            assert wanted is None or same(result, wanted), (operator, args)
    assert (removed > 0) == (packet not in STUCK)


def check_zeros(site, slots, flows):
    whole = results(site, {}, site.node.args)
    for value, flow in zip(whole, flows, strict=True):
        if flow is not None:
            # Zero divided by zero counts as zero.
            assert not value[slots.is_zero(flow.ids).expand(flow.shape)].nan_to_num(0.0).any()


@pytest.mark.parametrize("packet", list(BY_OPERATOR), ids=str)
def test_what_is_called_zero_is_zero(packet):
    generator = torch.Generator().manual_seed(0)
    for operator, args in BY_OPERATOR[packet] * 4:
        check_zeros(*on_slots(operator, args, generator))


def convolved(data, weight, bias, groups=1, transposed=False):
    spatial = weight.dim() - 2
    ones, padding = [1] * spatial, [0] * spatial
    return (data, weight, bias, [2] * spatial, padding, ones, transposed, padding, groups)


LAYERS = [
    *(
        (aten.convolution.default, convolved(Data((2, 6, *size)), sparse(*weight), bias, *options))
        for size, weight, options in [
            ((9,), (5, 6, 2), ()),
            ((5, 5), (5, 6, 2, 2), ()),
            ((5, 5), (4, 3, 2, 2), (2,)),
            ((5, 5), (6, 1, 2, 2), (6,)),
            ((5, 5), (12, 1, 2, 2), (6,)),
            ((3, 3, 3), (5, 6, 2, 2, 2), ()),
            ((5, 5), (6, 5, 2, 2), (1, True)),
            ((5, 5), (6, 2, 2, 2), (2, True)),
        ]
        for rows in [weight[1] * options[0] if options[1:] else weight[0]]
        for bias in (None, sparse(rows, seed=1))
    ),
    (aten.mm.default, (Data((3, 6)), sparse(6, 5))),
    (aten.addmm.default, (sparse(5, seed=1), Data((3, 6)), sparse(6, 5))),
    *(
        (aten.native_batch_norm.default, (Data((2, 6, 3, 3)), *rest, False, 0.1, 1e-5))
        for rest in [
            (sparse(6), sparse(6, seed=1), sparse(6, seed=2), torch.ones(6)),
            (sparse(6), sparse(6, seed=1), torch.zeros(6), torch.ones(6)),
            (None, None, torch.zeros(6), torch.ones(6)),
            (None, None, sparse(6), torch.ones(6)),
        ]
    ),
]


@pytest.mark.parametrize(("operator", "args"), LAYERS)
def test_what_layers_call_zero_is_zero(operator, args):
    generator = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(12):
        site, slots, flows = on_slots(operator, args, generator, owner="layer")
        check_zeros(site, slots, flows)
        for applied in slots.applications:
            if site.flow().varies(1):  # and only what must be zero is
                alive = results(site, {}, site.node.args)[0].transpose(0, 1).flatten(1).any(1)
                assert torch.equal(applied.result.zero, ~alive)
            assert_groups_are_whole(applied, components(slots))
        found += len(slots.applications)
    assert found > 0


def assert_groups_are_whole(applied, label):
    """In groups all channels of one are kept or removed together."""
    for value in (applied.source, applied.result) if applied.groups > 1 else ():
        members = label[value.slots].reshape(applied.groups, -1)
        assert (members == members[:, :1]).all()


@pytest.mark.parametrize(("operator", "args"), LAYERS)
def test_layers_depend_on_the_columns_that_they_are_said_to_read(operator, args):
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        site, slots, _ = on_slots(operator, args, generator, owner="layer")
        (node,) = site.env
        for applied in slots.applications:
            if not site.flow().varies(1):
                continue
            rows = torch.rand(len(applied.result.slots), generator=generator) < 0.3
            read = applied.columns_read(rows & ~applied.result.zero)
            if applied.groups > 1:  # they are left whole, so one that is wanted reads something
                wanted = (rows & ~applied.result.zero).reshape(applied.groups, -1).any(1)
                assert torch.equal(read.reshape(applied.groups, -1).any(1), wanted)
            whole = results(site, {}, site.node.args)[0][:, rows]
            unread = node.meta["val"].clone()
            unread[:, ~read & ~applied.source.zero] += 1.0
            changed = results(site, {node: unread}, site.node.args)[0][:, rows]
            assert torch.equal(whole.nan_to_num(), changed.nan_to_num())


@pytest.mark.parametrize("refused", [False, True])
def test_a_layer_whose_weight_something_else_reads_is_refused(refused):
    def double(weight):
        return weight * 2.0 if refused else torch.ones(())

    layer = torch.nn.Conv2d(3, 8, 3)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = layer, torch.nn.Conv2d(8, 2, 3)

        def forward(self, x):
            return self.last(self.first(x)) + double(self.first.weight).sum()

    model = Net()
    slots = slots_of(model, trace_model(model, torch.zeros(1, 3, 9, 9)), FOLLOW[0])
    assert ("first" in [applied.layer for applied in slots.applications]) is not refused
