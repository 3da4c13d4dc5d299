"""Every rule, against running its operator: what depends on a channel, and what dies with it."""

from math import prod

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxlean
from fxlean import rules
from fxlean.channels.flow import make_flow
from fxlean.channels.graph import Kind
from fxlean.channels.rules import movements, positions
from fxlean.channels.rules import table as rules_table
from fxlean.channels.rules.table import RULES, register, rule_for
from fxlean.selection.liveness import zero_channels
from fxlean.tracing.leaves import as_real
from tests.support.calls import CALLS, ELSEWHERE, IMAGE, call
from tests.support.sites import CHANNELS, Data, complexes, place

aten = torch.ops.aten


def flows_of(site):
    result = rule_for(site.node.target)(site)
    results = list(result) if isinstance(result, tuple) else [result]
    return [(number, flow) for number, flow in enumerate(results) if flow is not None]


def results_of(site, values):
    """The operator's results for other values of its flows."""
    result = site.node.target(
        *fx.map_arg(site.node.args, lambda n: values.get(n, n.meta["val"])), **site.node.kwargs
    )
    return list(result) if isinstance(result, tuple | list) else [result]


def graph_of(site):
    return site.wiring.finish(torch.zeros(0, dtype=torch.int64), {}, torch.zeros(0).bool())


def reached_from(graph, channel):
    """Which channels depend on one of them, by a plain walk."""
    reached = np.arange(graph.num_channels) == channel
    for target in range(graph.num_channels):
        start = graph.source_start[target]
        reached[target] |= reached[graph.sources[start : start + graph.sizes[target]]].any()
    return reached


def with_channel(site, channel, change):
    """The values of the flows, changed where they carry a channel."""
    return {
        node: torch.where(flow.ids.expand(flow.shape) == channel, change(node), node.meta["val"])
        for node, flow in site.env.items()
    }


def other(node):
    value = node.meta["val"]
    return (
        ~value
        if value.dtype == torch.bool
        else value.flip(0)
        if not value.is_floating_point()
        else -value - 0.7
    )


def test_every_rule_has_a_call():
    called = {operator.overloadpacket for operator, _ in CALLS}
    moved = {packet for packet, rule in RULES.items() if rule.__module__ == movements.__name__}
    assert set(RULES) - moved == {packet for packet in called if packet in RULES} | set(ELSEWHERE)
    assert called.isdisjoint(ELSEWHERE)


@pytest.mark.parametrize(("operator", "args"), CALLS, ids=[str(operator) for operator, _ in CALLS])
def test_results_depend_on_no_more_than_the_rule_says(operator, args):
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        site = call(operator, args, generator)
        flows, graph = flows_of(site), graph_of(site)
        assert not site.wiring.opaque_ops
        before = results_of(site, {})
        for channel in range(2, 2 + CHANNELS):
            after = results_of(site, with_channel(site, channel, other))
            reached = torch.from_numpy(reached_from(graph, channel))
            for number, flow in flows:
                assert flow.shape == before[number].shape
                same = (before[number] == after[number]) | before[number].isnan()
                assert (same | reached[flow.ids.expand(flow.shape)]).all()


@pytest.mark.parametrize(("operator", "args"), CALLS, ids=[str(operator) for operator, _ in CALLS])
def test_what_dies_with_a_channel_is_zero(operator, args):
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        site = call(operator, args, generator)
        flows, graph = flows_of(site), graph_of(site)
        for channel in range(2, 2 + CHANNELS):
            graph.kinds[2:] = np.where(
                np.arange(2, graph.num_channels) == channel, Kind.DEAD, graph.kinds[2:]
            )
            dead = torch.from_numpy(zero_channels(graph, graph.alive))
            graph.kinds[channel] = Kind.LIVE
            after = results_of(
                site, with_channel(site, channel, lambda n: torch.zeros_like(n.meta["val"]))
            )
            for number, flow in flows:
                # Not so where zero is divided by zero.
                assert not after[number][dead[flow.ids.expand(flow.shape)]].nan_to_num(0.0).any()


PLACES = [
    call for call in CALLS if call[0] in (aten.grid_sampler_2d.default, aten.max_unpool2d.default)
]


@pytest.mark.parametrize(("operator", "args"), PLACES)
@pytest.mark.parametrize("dead", [0, 1])
def test_what_is_taken_from_a_place_dies_with_the_value_but_not_with_the_place(
    operator, args, dead
):
    site = call(operator, args, torch.Generator().manual_seed(0))
    for number, node in enumerate(site.nodes()):
        value = site.env[node]
        site.env[node] = make_flow(torch.tensor([2 + number]), torch.ones(1), value.shape)
    ((_, flow),), graph = flows_of(site), graph_of(site)
    graph.kinds[2 + dead] = Kind.DEAD
    assert bool(zero_channels(graph, graph.alive)[flow.ids].all()) is (dead == 0)


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        (aten._softmax.default, (-1, False)),
        (aten.native_layer_norm.default, ((6,), torch.full((6,), -3.0), None, 1e-5)),
        (aten.native_group_norm.default, (torch.full((4,), -3.0), None, 2, 4, 36, 4, 1e-5)),
    ],
)
def test_channels_that_are_normalised_one_by_one_depend_on_themselves_alone(operator, args):
    site = place(operator, (IMAGE, *args), torch.Generator().manual_seed(0))
    (node,) = site.env
    ids = torch.arange(2, 6)
    site.env[node] = make_flow(ids.reshape(1, 4, 1, 1), torch.ones(1), IMAGE.shape)
    ((_, flow),), graph = flows_of(site), graph_of(site)
    for number, channel in enumerate(ids.tolist()):
        reached = reached_from(graph, channel)[flow.ids.reshape(-1)]
        assert reached.tolist() == [number == other for other in range(4)]
    assert graph.lengths.max() == (1.0 if operator is aten._softmax.default else 3.0)


@pytest.mark.parametrize(
    ("function", "preserved"),
    [
        (F.relu, True),
        (F.gelu, True),
        (F.silu, True),
        (F.hardswish, True),
        (F.leaky_relu, True),
        (F.elu, True),
        (F.mish, True),
        (torch.tanh, True),
        (torch.abs, True),
        (lambda x: x.clamp(0, 6), True),
        (lambda x: 3 * x, True),
        (lambda x: -x / 2, True),
        (lambda x: x**2, True),
        (lambda x: F.dropout(x, training=False), True),
        (torch.sigmoid, False),
        (F.softplus, False),
        (F.logsigmoid, False),
        (F.hardsigmoid, False),
        (torch.exp, False),
        (torch.cos, False),
        (lambda x: x + 1, False),
        (lambda x: 1 - x, False),
        (lambda x: x.clamp(0.5, 1), False),
    ],
)
def test_a_zero_channel_stays_zero_where_the_function_is_zero_there(function, preserved):
    assert bool(function(torch.zeros(1)).any()) is not preserved
    torch.manual_seed(0)
    model = Between(function)
    graph = fxlean.trace(model, torch.zeros(1, 3, 8, 8))
    keep = np.ones(graph.num_kernels, dtype=bool)
    keep[graph.layers[0].kernels] = False
    zero = zero_channels(graph, keep)
    last = np.flatnonzero(graph.kernel_start == graph.layers[1].start)[0]
    start = graph.source_start[last]
    read = graph.sources[start : start + graph.sizes[last]]
    assert zero[read].tolist() == [preserved] * 4


class Between(nn.Module):
    """A function between two convolutions."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.first, self.second, self.last = (
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(4, 5, 3),
            nn.Conv2d(5, 2, 1),
        )

    def forward(self, x):
        return self.last(self.second(self.function(self.first(x))))


@pytest.mark.parametrize(
    ("operator", "kinds"),
    [
        (aten.add.Tensor, {Kind.SUM}),
        (aten.sub.Tensor, {Kind.SUM}),
        (aten.maximum.default, {Kind.SUM}),
        (aten.hypot.default, {Kind.SUM}),
        (aten.mul.Tensor, {Kind.PRODUCT}),
        (aten.div.Tensor, {Kind.PRODUCT, Kind.LIVE}),
        (aten.logaddexp.default, {Kind.LIVE}),
        (aten.eq.Tensor, {Kind.LIVE}),
    ],
)
def test_how_two_flows_join(operator, kinds):
    site = place(operator, (IMAGE, IMAGE), torch.Generator().manual_seed(0))
    flow = rule_for(operator)(site)
    made = np.concatenate(site.wiring._kinds)[2 + CHANNELS :]
    assert set(made.tolist()) == kinds
    assert flow.gain.flatten().tolist() == [1.0]


@pytest.mark.parametrize(
    ("operator", "kind"), [(aten.div.Tensor, Kind.LIVE), (aten.mul.Tensor, Kind.SUM)]
)
def test_a_flow_that_joins_itself_is_live_where_it_is_not_a_number_at_zero(operator, kind):
    site = place(operator, (IMAGE, IMAGE), torch.Generator().manual_seed(0))
    (node, _) = site.node.args
    site.node.args = (node, node)
    flow = rule_for(operator)(site)
    assert set(graph_of(site).kinds[flow.ids.reshape(-1)]) == {kind}


def singular_value(function, size):
    """The largest of a linear function of arrays of real numbers."""
    units = torch.eye(prod(size), dtype=torch.float64).reshape(-1, *size)
    return float(torch.linalg.matrix_norm(as_real(function(units)).flatten(1), ord=2))


@pytest.mark.parametrize("normalization", [0, 1, 2])
@pytest.mark.parametrize("sizes", [(6, 4), (5, 7), (3, 2)])
def test_the_gain_of_a_transform_is_its_largest_singular_value(sizes, normalization):
    half = (sizes[0], sizes[1] // 2 + 1)
    calls = [
        (aten._fft_r2c.default, sizes, (normalization, True)),
        (aten._fft_r2c.default, sizes, (normalization, False)),
        (aten._fft_c2c.default, sizes, (normalization, True)),
        (aten._fft_c2r.default, half, (normalization, sizes[1])),
    ]
    for operator, size, options in calls:
        real = operator is aten._fft_r2c.default

        def apply(x, operator=operator, real=real, options=options):
            return operator(x if real else torch.view_as_complex(x.contiguous()), [1, 2], *options)

        value = Data((1, 1, *size), torch.randn if real else complexes)
        site = place(operator, (value, [2, 3], *options), torch.Generator().manual_seed(0))
        (node,) = site.env
        site.env[node] = make_flow(torch.tensor([2]), torch.ones(1), value.shape)
        found = rule_for(operator)(site).gain.max()
        exact = singular_value(apply, size if real else (*size, 2))
        assert found.item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(("factor", "gain"), [(0.5, 0.5), (-3.0, 3.0)])
def test_a_factor_is_a_gain(factor, gain):
    generator = torch.Generator().manual_seed(0)
    site = place(aten.mul.Tensor, (IMAGE, factor), generator)
    before = site.flow()
    after = rules.unary(site)
    assert torch.equal(after.ids, before.ids)
    assert torch.equal(after.gain, before.gain * gain)


def distances(x):
    """An operator without a rule."""
    return torch.cdist(x, x)


def test_a_norm_of_an_opaque_result_has_many_biases_for_one_channel():
    norm = nn.BatchNorm2d(4).eval()
    nn.init.ones_(norm.bias)
    model = Between(lambda x: norm(distances(x)))
    model.norm = norm
    with pytest.warns(fxlean.PruneWarning, match=r"no rule for aten\._cdist_forward"):
        result = fxlean.prune(model, 0.5, torch.zeros(1, 3, 8, 8), redundancy=False)
    assert result.opaque_ops == {"aten._cdist_forward.default": 1}


@pytest.fixture
def table(monkeypatch):
    """The table, with what a test adds to it undone afterwards."""
    copied = dict(RULES)
    monkeypatch.setattr(rules_table, "RULES", copied)
    monkeypatch.setattr(rules_table, "RESIZES", dict(rules_table.RESIZES))
    return copied


def test_a_rule_can_be_registered_for_an_operator_or_an_overload(table):
    def rule(site):
        return make_flow(torch.zeros(1, dtype=torch.int64), torch.ones(1), site.shape)

    register(aten._cdist_forward, rule)
    assert rule_for(aten._cdist_forward.default) is rule
    register(aten.renorm.default, rule)
    assert rule_for(aten.renorm.default) is rule


def test_a_registered_rule_is_used(table):
    register(aten._cdist_forward, lambda site: site.flow())
    assert not fxlean.prune(Between(distances), 0.5, torch.zeros(1, 3, 8, 8)).opaque_ops


def test_a_rule_is_a_function(table):
    with pytest.raises(fxlean.ArgumentError, match=r"rule is 3\. Pass a function from a Site"):
        register(aten._cdist_forward, 3)


def test_rules_are_not_replaced_silently(table):
    with pytest.raises(
        fxlean.ArgumentError, match=r"convolution has a rule already \(convolution\)"
    ):
        register(aten.convolution, rules.pointwise)
    assert rule_for(aten.convolution.default) is not rules.pointwise
    register(aten.convolution, rules.pointwise, override=True)
    assert rule_for(aten.convolution.default) is rules.pointwise


@pytest.mark.parametrize("op", [F.relu, "aten.relu", nn.ReLU, None])
def test_what_is_no_operator_has_no_rule(op):
    with pytest.raises(fxlean.ArgumentError, match=r"is no torch operator\. Pass an operator"):
        register(op, rules.pointwise)


def test_unknown_operators_are_opaque_unless_torch_says_they_are_pointwise():
    assert rule_for(aten._cdist_forward.default) is rules.opaque
    assert rule_for(aten.relu.default) is rules.pointwise


def test_a_large_product_depends_on_no_less(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    site = place(aten.bmm.default, (Data((2, 3, 4)), Data((2, 4, 5))), generator)
    exact = reaches(site)
    monkeypatch.setattr(positions, "MEETING", 0)
    again = place(aten.bmm.default, (Data((2, 3, 4)), Data((2, 4, 5))), generator.manual_seed(0))
    assert (reaches(again) >= exact).all()


def reaches(site):
    """Which channels of the operands reach which positions of the result."""
    ((_, flow),) = flows_of(site)
    graph = graph_of(site)
    found = [reached_from(graph, channel)[flow.ids.numpy()] for channel in range(2, 2 + CHANNELS)]
    return np.stack([np.broadcast_to(reached, flow.shape) for reached in found])
