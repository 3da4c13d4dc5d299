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

from . import layers, movements
from .errors import ArgumentError
from .flows import Flow, make_flow, reduce_to, reshape, scalar_gain
from .graph import Kind
from .norms import operator_norms
from .site import Site

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


def window(spatial: int, gain: Callable[[Site], float] | None = None) -> Rule:
    """Pooling, padding or resampling over the last `spatial` dimensions."""

    def rule(site: Site) -> Any:
        """Pooling, padding or resampling: the channel stays, and so does a dead one."""
        flow = site.flow()
        rank = len(flow.shape)
        flow = site.wiring.merge(flow, range(rank - spatial))
        scale = flow.gain * (gain(site) if gain else 1.0)
        return _results(site, [make_flow(flow.ids, scale, shape) for shape in site.shapes()])

    return rule


def average_gain(spatial: int) -> Callable[[Site], float]:
    """Operator norm of an average pooling: 0.5 for 2x2 with stride 2."""

    def gain(site: Site) -> float:
        size = list(site.argument("kernel_size"))
        size *= spatial // len(size)
        stride = list(site.argument("stride")) or size
        kernel = torch.full((1, 1, *size), 1 / float(torch.tensor(size).prod()))
        return operator_norms(kernel, stride * (spatial // len(stride))).item()

    return gain


def reduction(site: Site) -> Any:
    """A mean, sum or maximum over dimensions; channels that differ along them are merged."""
    flow = site.flow()
    rank = len(flow.shape)
    dims = site.argument("dim")
    dims = [dims] if isinstance(dims, int) else dims
    reduced = {dim % rank for dim in dims} if dims else set(range(rank))
    left = [dim for dim in range(rank) if dim not in reduced]
    flow = site.wiring.merge(flow, left)
    results = []
    at_zero = site.run(lambda node: torch.zeros((2,) * rank))
    several = isinstance(at_zero, tuple | list)
    for shape, value in zip(site.shapes(), at_zero if several else [at_zero], strict=True):
        if len(shape) == rank:
            result = make_flow(flow.ids, flow.gain, shape)
        else:
            ids = flow.ids.reshape([flow.ids.shape[dim] for dim in left])
            gain = flow.gain.reshape([flow.gain.shape[dim] for dim in left])
            result = make_flow(ids, gain, shape)
        zero = torch.zeros if not value.any() else torch.ones
        results.append(site.shift(result, zero((1,) * len(shape)), None))
    return _results(site, results)


def gated_half(site: Site) -> Flow:
    """`glu`: the first half of a dimension times the sigmoid of the second."""
    flow, dim = site.flow(), site.argument("dim")

    def half(number: int) -> Flow:
        return movements.move_flow(flow, site.shape, dim, number)

    live = site.wiring.derive(Kind.LIVE, half(1))
    return site.wiring.join(Kind.PRODUCT, [half(0), live], site.shape)


def unpool(site: Site) -> Flow:
    """`max_unpool`: zero where its input is, placed by indices that are never dead."""
    flow, indices = site.flows()
    spatial = list(range(2))
    flow = site.wiring.merge(flow, spatial)
    live = site.wiring.derive(Kind.LIVE, site.wiring.merge(indices, spatial))
    return site.wiring.join(Kind.PRODUCT, [flow, live], site.shape)


def mixed(site: Site) -> Any:
    """Sorting or adding up along a dimension: every result there may depend on every position."""
    flow, dim = site.flow(), site.argument("dim")
    rank = len(flow.shape)
    flow = site.wiring.merge(flow, [other for other in range(rank) if other != dim % rank])
    return _results(site, [make_flow(flow.ids, flow.gain, shape) for shape in site.shapes()])


def _results(site: Site, flows: Sequence[Flow]) -> Any:
    """One flow, or several; the integers among several are places, and never dead."""
    value = site.node.meta["val"]
    if isinstance(value, Tensor):
        return flows[0]
    read = {user.args[1] for user in site.node.users}
    return tuple(
        site.wiring.derive(Kind.LIVE, flow)
        if number in read and not item.is_floating_point()
        else flow
        for number, (flow, item) in enumerate(zip(flows, value, strict=True))
    )


def sampled(site: Site) -> Flow:
    """`grid_sample`: zero where its input is, taken at places that are never dead."""
    flow = site.wiring.merge(site.flow(site.argument("input")), [0, 1])
    grid = site.wiring.merge(site.flow(site.argument("grid")), [])
    grid = make_flow(grid.ids, grid.gain, (1,) * len(site.shape))
    return site.wiring.join(Kind.PRODUCT, [flow, site.wiring.derive(Kind.LIVE, grid)], site.shape)


def embedding(site: Site) -> Flow:
    """Rows of a table, picked by what is in a flow: one live channel for each column."""
    sources = site.flow(site.argument("indices")).channels().numpy()
    count = site.shape[-1]
    targets = np.arange(count).repeat(len(sources))
    lengths = np.ones(len(targets))
    ids = site.wiring.add_rows(Kind.LIVE, targets, np.tile(sources, count), lengths, count)
    return make_flow(ids, scalar_gain(1), site.shape)


def unfolded(site: Site) -> Flow:
    """`unfold`: the patches of an image, laid out along the channel dimension."""
    flow = site.flow()
    flow = site.wiring.merge(flow, range(len(flow.shape) - 2))
    size = site.shape[-2] // flow.shape[-3]
    ids, gain = (t.squeeze(-1).repeat_interleave(size, -2) for t in (flow.ids, flow.gain))
    return make_flow(ids, gain, site.shape)


def folded(site: Site) -> Flow:
    """`fold`: patches, laid out along the channel dimension, added up to an image."""
    flow, channels = site.flow(), site.shape[-3]
    shape = flow.shape[:-2]
    flow = reshape(flow, (*shape, channels, flow.shape[-2] // channels, flow.shape[-1]))
    flow = site.wiring.merge(flow, range(len(shape) + 1))
    return make_flow(flow.ids, flow.gain, site.shape)


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
    for spatial, windows in WINDOWS.items():
        table |= dict.fromkeys(windows, window(spatial))
    for spatial, operator in ((1, aten.avg_pool1d), (2, aten.avg_pool2d), (3, aten.avg_pool3d)):
        table[operator] = window(spatial, average_gain(spatial))
    table |= dict.fromkeys(REDUCTIONS, reduction)
    table |= dict.fromkeys(POINTWISE, pointwise)
    table |= dict.fromkeys(layers.BATCH_NORMS, first(layers.batch_norm))
    return table | {
        aten._softmax: layers.softmax,
        aten._log_softmax: layers.softmax,
        aten.addmm: layers.linear,
        aten.as_strided: movements.strided,
        aten.as_strided_: movements.strided,
        aten.col2im: folded,
        aten.constant_pad_nd: movements.pad,
        aten.convolution: layers.convolution,
        aten.copy: movements.copy,
        aten.cummax: mixed,
        aten.cummin: mixed,
        aten.cumprod: mixed,
        aten.cumsum: mixed,
        aten.embedding: embedding,
        aten.empty_like: movements.unknown,
        aten.fill: movements.filled,
        aten.full_like: movements.filled,
        aten.glu: gated_half,
        aten.grid_sampler_2d: sampled,
        aten.grid_sampler_3d: sampled,
        aten.im2col: unfolded,
        aten.log_sigmoid_forward: first(pointwise),
        aten.max_unpool2d: unpool,
        aten.mm: layers.linear,
        aten.native_group_norm: first(layers.group_norm),
        aten.native_layer_norm: first(layers.layer_norm),
        aten.new_empty: movements.unknown,
        aten.new_empty_strided: movements.unknown,
        aten.new_full: movements.filled,
        aten.new_ones: movements.filled,
        aten.new_zeros: movements.filled,
        aten.ones_like: movements.filled,
        aten.rand_like: movements.unknown,
        aten.randn_like: movements.unknown,
        aten.rrelu_with_noise_functional: first(pointwise),
        aten.sort: mixed,
        aten.topk: mixed,
        aten.zeros_like: movements.filled,
    }


WINDOWS = {
    1: (
        aten.adaptive_avg_pool1d,
        aten.adaptive_max_pool1d,
        aten.reflection_pad1d,
        aten.replication_pad1d,
        aten.upsample_linear1d,
        aten.upsample_nearest1d,
        aten._upsample_nearest_exact1d,
    ),
    2: (
        aten._adaptive_avg_pool2d,
        aten.adaptive_max_pool2d,
        aten.fractional_max_pool2d,
        aten.max_pool2d_with_indices,
        aten.reflection_pad2d,
        aten.replication_pad2d,
        aten.upsample_bicubic2d,
        aten.upsample_bilinear2d,
        aten.upsample_nearest2d,
        aten._upsample_bicubic2d_aa,
        aten._upsample_bilinear2d_aa,
        aten._upsample_nearest_exact2d,
    ),
    3: (
        aten._adaptive_avg_pool3d,
        aten.adaptive_max_pool3d,
        aten.max_pool3d_with_indices,
        aten.reflection_pad3d,
        aten.replication_pad3d,
        aten.upsample_nearest3d,
        aten.upsample_trilinear3d,
        aten._upsample_nearest_exact3d,
    ),
}
REDUCTIONS = (
    aten.all,
    aten.amax,
    aten.amin,
    aten.aminmax,
    aten.any,
    aten.argmax,
    aten.argmin,
    aten.linalg_vector_norm,
    aten.logsumexp,
    aten.max,
    aten.mean,
    aten.median,
    aten.min,
    aten.nansum,
    aten.prod,
    aten.std,
    aten.sum,
    aten.var,
    aten.var_mean,
)
POINTWISE = (  # that torch does not tag as such
    aten._prelu_kernel,
    aten.hardswish,
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
            as `pointwise`, `movements.same` or `window(2)`.
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
