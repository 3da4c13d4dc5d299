"""The table of rules: how each operator moves channels.

A rule takes a `Site`, one call of an operator, and returns the flow of its result, or a tuple
of flows. What the table does not list is pointwise if torch says so, else opaque: that is safe,
and it is reported.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ...errors import ArgumentError
from ..flow import Flow, make_flow, reduce_to, scalar_gain
from ..graph import Kind
from ..site import Site
from . import movements, positions, weighted

aten = torch.ops.aten
Rule = Callable[[Site], Any]

LINEAR = frozenset({aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.neg})


def opaque(site: Site) -> Any:
    """An operator that may mix everything."""
    return site.opaque()


def pointwise(site: Site) -> Flow:
    """An element-wise function of one flow, or of several that meet."""
    return unary(site) if len(site.flows()) == 1 else joined(site)


def unary(site: Site) -> Flow:
    """A function of one flow and constants; it may scale it, or map zero to something else."""
    flow, (node,) = site.flow(), site.nodes()
    flow = make_flow(flow.ids, flow.gain, site.shape)
    size = site.flow().ids.shape
    at_zero = _numbers(site.run(lambda _: torch.zeros(size)))
    if site.packet in LINEAR:
        slope = _numbers(site.run(lambda _: torch.ones(size))) - at_zero
        slope = reduce_to(slope.abs(), flow.ids, torch.amax)
        flow = make_flow(flow.ids, flow.gain * slope, site.shape)
    constants = [arg for arg in site.node.all_input_nodes if arg is not node]
    return site.shift(flow, at_zero, site.masks(constants, flow.ids) if constants else None)


def joined(site: Site) -> Flow:
    """A function of several flows: a sum, a product, or neither, as it treats zeros."""
    nodes = list(dict.fromkeys(site.nodes()))
    flows = [site.flow(node) for node in nodes]
    at_zero = _sample(site, dict.fromkeys(nodes, 0.0)).nan_to_num(1.0)
    factors = [_is_factor(site, node, nodes) for node in nodes]
    if any(factors) and len(nodes) > 1:
        flows = [
            flow if factor else site.wiring.derive(Kind.LIVE, flow)
            for flow, factor in zip(flows, factors, strict=True)
        ]
        return site.wiring.join(Kind.PRODUCT, flows, site.shape)
    if site.packet in LINEAR:
        slopes = [
            (_sample(site, {**dict.fromkeys(nodes, 0.0), node: 1.0}) - at_zero).abs().max()
            for node in nodes
        ]
        flows = [
            make_flow(flow.ids, flow.gain * float(slope), flow.shape)
            for flow, slope in zip(flows, slopes, strict=True)
        ]
    kind = Kind.LIVE if at_zero.any() else Kind.SUM
    return site.wiring.join(kind, flows, site.shape)


def _is_factor(site: Site, factor: fx.Node, nodes: Sequence[fx.Node]) -> bool:
    """Whether the result is zero, or zero divided by zero, where one flow is."""
    choices = [
        (0.0,) if node is factor else (0.0, 2.0 + number, -2.0 - number)
        for number, node in enumerate(nodes)
    ]
    return not any(
        _sample(site, dict(zip(nodes, values, strict=True))).nan_to_num(0.0).any()
        for values in itertools.product(*choices)
    )


def _sample(site: Site, values: dict[fx.Node, float]) -> Tensor:
    """The operator's result for one number in place of each flow."""
    return _numbers(site.run(lambda node: torch.tensor(values[node])))


def _numbers(result: Any) -> Tensor:
    """A result, or the first of several, as float64 on the CPU; complex ones by magnitude."""
    tensor = torch.as_tensor(result[0] if isinstance(result, tuple | list) else result).cpu()
    return (tensor.abs() if tensor.is_complex() else tensor).double()


def gated_half(site: Site) -> Flow:
    """`glu`: the first half of a dimension times the sigmoid of the second."""
    flow, dim = site.flow(), site.argument("dim")

    def half(number: int) -> Flow:
        return movements.move_flow(flow, site.shape, dim, number)

    live = site.wiring.derive(Kind.LIVE, half(1))
    return site.wiring.join(Kind.PRODUCT, [half(0), live], site.shape)


def embedding(site: Site) -> Flow:
    """Rows of a table, picked by what is in a flow: one live channel for each column."""
    sources = site.flow(site.argument("indices")).channels().numpy()
    count = site.shape[-1]
    targets = np.arange(count).repeat(len(sources))
    lengths = np.ones(len(targets))
    ids = site.wiring.add_rows(Kind.LIVE, targets, np.tile(sources, count), lengths, count)
    return make_flow(ids, scalar_gain(1), site.shape)


def first(rule: Rule) -> Rule:
    """A rule for an operator with several results of which only the first is data."""

    @functools.wraps(rule)
    def only(site: Site) -> Any:
        return rule(site), *[None] * (len(site.shapes()) - 1)

    return only


def _build() -> dict[Any, Rule]:
    table: dict[Any, Rule] = {}
    for operators, rule in (
        (movements.SAME, movements.same),
        (movements.RESHAPED, movements.reshaped),
        (movements.DIMENSIONS, movements.dimensions),
        (movements.ALONG, movements.along),
        (movements.INDEXED, movements.indexed),
        (movements.WHOLE, movements.whole),
    ):
        table |= dict.fromkeys(operators, rule)
    for spatial, windows in positions.WINDOWS.items():
        table |= dict.fromkeys(windows, positions.window(spatial))
    for spatial, operator in ((1, aten.avg_pool1d), (2, aten.avg_pool2d), (3, aten.avg_pool3d)):
        table[operator] = positions.window(spatial, positions.average_gain(spatial))
    table |= dict.fromkeys(positions.REDUCTIONS, positions.reduction)
    table |= dict.fromkeys(POINTWISE, pointwise)
    table |= dict.fromkeys(weighted.BATCH_NORMS, first(weighted.batch_norm))
    return table | {
        aten._softmax: weighted.softmax,
        aten._log_softmax: weighted.softmax,
        aten.addmm: weighted.linear,
        aten.as_strided: movements.strided,
        aten.as_strided_: movements.strided,
        aten.col2im: positions.folded,
        aten.constant_pad_nd: movements.pad,
        aten.convolution: weighted.convolution,
        aten.copy: movements.copy,
        aten.cummax: positions.mixed,
        aten.cummin: positions.mixed,
        aten.cumprod: positions.mixed,
        aten.cumsum: positions.mixed,
        aten.embedding: embedding,
        aten.empty_like: movements.unknown,
        aten.fill: movements.filled,
        aten.full_like: movements.filled,
        aten.glu: gated_half,
        aten.grid_sampler_2d: positions.sampled,
        aten.grid_sampler_3d: positions.sampled,
        aten.im2col: positions.unfolded,
        aten.log_sigmoid_forward: first(pointwise),
        aten.max_unpool2d: positions.unpool,
        aten.mm: weighted.linear,
        aten.native_group_norm: first(weighted.group_norm),
        aten.native_layer_norm: first(weighted.layer_norm),
        aten.new_empty: movements.unknown,
        aten.new_empty_strided: movements.unknown,
        aten.new_full: movements.filled,
        aten.new_ones: movements.filled,
        aten.new_zeros: movements.filled,
        aten.ones_like: movements.filled,
        aten.rand_like: movements.unknown,
        aten.randn_like: movements.unknown,
        aten.rrelu_with_noise_functional: first(pointwise),
        aten.sort: positions.mixed,
        aten.topk: positions.mixed,
        aten.zeros_like: movements.filled,
    }


POINTWISE = (  # that torch, or one of the versions that we support, does not tag as such
    aten._prelu_kernel,
    aten.hardswish,
    aten.leaky_relu,
)
RULES: dict[Any, Rule] = _build()


def rule_for(target: Any) -> Rule:
    """The rule of an operator: from the table, else pointwise by torch's tag, else opaque."""
    rule = RULES.get(getattr(target, "overloadpacket", target))
    if rule is not None:
        return rule
    return pointwise if torch.Tag.pointwise in getattr(target, "tags", ()) else opaque


def register(op: Any, rule: Rule, *, override: bool = False) -> None:
    """Add a rule for an operator of your own, in place.

    Args:
        op: an operator such as `torch.ops.mylib.myop`, or one of its overloads.
        rule: from a `Site` to the flow of its result. `fxlean.rules` has ready-made ones, such
            as `pointwise`, `movements.same` or `positions.window(2)`.
        override: replace a rule that is there.

    Raises:
        ArgumentError: `op` is no operator, or has a rule and `override` is False.
    """
    packet = getattr(op, "overloadpacket", op)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        raise ArgumentError(
            f"op is {op!r}, which is no torch operator. Pass an operator as it appears in a "
            "traced graph, such as torch.ops.mylib.myop."
        )
    if packet in RULES and not override:
        raise ArgumentError(
            f"{packet} has a rule already ({RULES[packet].__name__}). Pass override=True to "
            "replace it."
        )
    RULES[packet] = rule
