"""Every movement on small ids, against the same operator on ids of the full size."""

import pytest
import torch
from torch import fx

from fxlean.channels.builder import CONSTANT, ZERO
from fxlean.channels.graph import Kind
from fxlean.channels.rules import movements
from fxlean.channels.rules.table import RULES
from tests.support.calls import MOVEMENTS, ODD, X
from tests.support.sites import place, random_flow

aten = torch.ops.aten
OTHERS = {aten.as_strided, aten.as_strided_, aten.copy, aten.constant_pad_nd}
CONSTANTS = (movements.filled, movements.unknown)
FILLED = {packet for packet, rule in RULES.items() if rule in CONSTANTS}


def expected(site, part):
    """The operator on full tensors: on the ids (part 0) or the gains (part 1)."""

    def lookup(node):
        if node in site.env:
            flow = site.env[node]
            return (flow.ids, flow.gain)[part].expand(flow.shape).contiguous()
        value = site.value(node)
        if not value.is_floating_point():
            return value
        ids = torch.where(value == 0, ZERO, CONSTANT)
        return (ids, torch.ones_like(value, dtype=torch.float64))[part]

    result = site.node.target(*fx.map_arg(site.node.args, lookup))
    return list(result) if isinstance(result, tuple | list) else [result]


def names(calls):
    return [str(operator) for operator, *_ in calls]


def test_every_movement_has_a_call():
    called = {operator.overloadpacket for operator, _ in MOVEMENTS}
    assert movements.MOVEMENTS | OTHERS - {aten.constant_pad_nd} == called
    assert {
        packet for packet, rule in RULES.items() if rule.__module__ == movements.__name__
    } == movements.MOVEMENTS | OTHERS | FILLED


@pytest.mark.parametrize(("operator", "args"), MOVEMENTS, ids=names(MOVEMENTS))
def test_ids_move_as_the_values_do(operator, args):
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        site = place(operator, args, generator)
        result = RULES[operator.overloadpacket](site)
        flows = list(result) if isinstance(result, tuple) else [result]
        pairs = zip(flows, expected(site, 0), expected(site, 1), strict=True)
        for flow, ids, gain in pairs:
            assert flow.shape == tuple(ids.shape)
            assert torch.equal(flow.ids.expand(flow.shape), ids)
            carries = (ids != ZERO) & (ids != CONSTANT)
            assert torch.equal(flow.gain.expand(flow.shape)[carries], gain[carries])
        assert not site.wiring.opaque_ops


@pytest.mark.parametrize("fill", [0.0, 2.0])
@pytest.mark.parametrize("widths", [[1, 0], [0, 2, 1, 1], [0, 0, 0, 0, 2, 1], [-1, 0, 0, 0, -1, 2]])
def test_padding_adds_constants_where_the_channel_varies(widths, fill):
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        site = place(aten.constant_pad_nd.default, (X, widths, fill), generator)
        flow = movements.pad(site)
        before = site.env[site.nodes()[0]]
        inside = aten.constant_pad_nd(torch.ones(before.shape), widths, 0.0).bool()
        ids = aten.constant_pad_nd(before.ids.expand(before.shape), widths, -1)
        assert flow.shape == tuple(ids.shape)
        found = flow.ids.expand(flow.shape)
        kinds = torch.cat([torch.from_numpy(kinds) for kinds in site.wiring._kinds])
        if fill == 0:
            outside = found[~inside]
            assert torch.equal(found[inside], ids[inside])
            assert ((outside == ZERO) | torch.isin(outside, before.ids)).all()
        else:
            assert (kinds[found[~inside]] == Kind.LIVE).all()


@pytest.mark.parametrize("packet", sorted(FILLED, key=str))
def test_new_constants_carry_no_channel(packet):
    operator = packet.Scalar if packet is aten.fill else packet.default
    size = ((2, 3),) if "new" in str(packet) else ()
    strides = ((3, 1),) if "strided" in str(packet) else ()
    value = (0.5,) if packet in (aten.fill, aten.full_like, aten.new_full) else ()
    site = place(operator, (X, *size, *strides, *value), torch.Generator().manual_seed(0))
    flow = RULES[packet](site)
    assert flow.shape == (size[0] if size else X.shape)
    wanted = {ZERO} if "zeros" in str(packet) else {CONSTANT}
    assert set(flow.ids.flatten().tolist()) == wanted


def test_indices_that_depend_on_the_input_are_opaque():
    generator = torch.Generator().manual_seed(0)
    site = place(aten.index.Tensor, (X, [None, ODD]), generator)
    index = next(node for node in site.node.all_input_nodes if node not in site.env)
    site.env[index] = random_flow(torch.arange(2, 7), (3,), generator)
    flow = movements.indexed(site)
    assert site.wiring.opaque_ops == {"aten.index.Tensor": 1}
    assert flow.ids.numel() == 1
