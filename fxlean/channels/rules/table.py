"""The table of rules: how each operator moves channels.

A rule takes a `Site`, one call of an operator, and returns the flow of its result, or a tuple
of flows. What the table does not list is pointwise if torch says so, else opaque: that is safe,
and it is reported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ArgumentError, shown
from ..calls import BATCH_NORMS, as_numbers, operator_of, sample, vanishes
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
    at_zero = as_numbers(site.run(lambda _: torch.zeros(size)))
    if site.packet in LINEAR:
        slope = as_numbers(site.run(lambda _: torch.ones(size))) - at_zero
        slope = reduce_to(slope.abs(), flow.ids, torch.amax)
        flow = make_flow(flow.ids, flow.gain * slope, site.shape)
    constants = [arg for arg in site.node.all_input_nodes if arg is not node]
    bias = site.bias(at_zero, constants, flow.ids)
    if bias.masks and not _adds(site):  # one factor of many channels is none of theirs
        own = [(name, index) for name, index in bias.masks if index.numel() == flow.ids.numel()]
        bias = replace(bias, masks=own or None)
    return site.wiring.shift(flow, bias)


def _adds(site: Site) -> bool:
    """Whether a function of zero and constants can be anything else than zero."""
    generator = torch.Generator().manual_seed(0)

    def drawn(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return (torch.rand(value.shape, generator=generator, device="cpu") + 0.5).to(value)

    return bool(as_numbers(site.run(lambda _: torch.zeros(site.flow().ids.shape), drawn)).any())


def joined(site: Site) -> Flow:
    """A function of several flows: a sum, a product, or neither, as it treats zeros."""
    node, constant = site.node, site.constants.value
    operands = list(dict.fromkeys(site.nodes()))
    flows = [site.flow(operand) for operand in operands]
    factors = [vanishes(node, [operand], operands, constant) for operand in operands]
    if any(factors) and len(operands) > 1:
        flows = [
            flow if factor else site.wiring.derive(Kind.LIVE, flow)
            for flow, factor in zip(flows, factors, strict=True)
        ]
        return site.wiring.join(Kind.PRODUCT, flows, site.shape)
    at_zero = sample(node, dict.fromkeys(operands, 0.0), constant).nan_to_num(1.0)
    if site.packet in LINEAR:
        ones = [{**dict.fromkeys(operands, 0.0), operand: 1.0} for operand in operands]
        slopes = [(sample(node, values, constant) - at_zero).abs().max() for values in ones]
        flows = [
            make_flow(flow.ids, flow.gain * float(slope), flow.shape)
            for flow, slope in zip(flows, slopes, strict=True)
        ]
    return site.wiring.join(Kind.LIVE if at_zero.any() else Kind.SUM, flows, site.shape)


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
        if isinstance(site.node.meta["val"], Tensor):
            return rule(site)
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
    for spatial, operator in positions.AVERAGES.items():
        table[operator] = positions.window(spatial, positions.average_gain(spatial))
    table |= dict.fromkeys(positions.REDUCTIONS, positions.reduction)
    table |= dict.fromkeys(positions.ATTENTIONS, first(positions.attention))
    table |= dict.fromkeys(POINTWISE, pointwise)
    table |= dict.fromkeys(BATCH_NORMS, first(weighted.batch_norm))
    return table | {
        aten._fft_c2c: positions.transform,
        aten._fft_c2r: positions.transform,
        aten._fft_r2c: positions.transform,
        aten._softmax: weighted.softmax,
        aten._log_softmax: weighted.softmax,
        aten._safe_softmax: weighted.softmax,
        aten.addmm: weighted.linear,
        aten.as_strided: movements.strided,
        aten.as_strided_: movements.strided,
        aten.bmm: positions.product,
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
        aten.view_as_complex: positions.complex_values,
        aten.view_as_real: positions.real_parts,
        aten.zeros_like: movements.filled,
    }


POINTWISE = (  # that torch, or one of the versions that we support, does not tag as such
    aten._prelu_kernel,
    aten.complex,
    aten.hardswish,
    aten.leaky_relu,
)
RULES: dict[Any, Rule] = _build()


def rule_for(target: Any) -> Rule:
    """The rule of an operator: from the table, else pointwise by torch's tag, else opaque."""
    rule = RULES.get(operator_of(target))
    if rule is not None:
        return rule
    return pointwise if torch.Tag.pointwise in getattr(target, "tags", ()) else opaque


def always(site: Site) -> bool:
    """Any call."""
    return True


def never(site: Site) -> bool:
    """No call."""
    return False


# Whether a call does the same, channel by channel, on a value with fewer channels (as many fewer in
# each part, where there are parts); what is not here does, for it reads how many there are when it
# runs.
RESIZES: dict[Any, Callable[[Site], bool]] = {
    **dict.fromkeys(movements.ALONG, movements.elsewhere),
    **dict.fromkeys(movements.INDEXED | movements.WHOLE, never),
    **{op: never for op, rule in RULES.items() if rule in (movements.filled, movements.unknown)},
    **dict.fromkeys(movements.LIKE, always),
    **dict.fromkeys((aten._unsafe_index, aten.index), movements.picked),
    aten.as_strided: movements.restrided,
    aten.as_strided_: movements.restrided,
    aten.cat: always,
    aten.channel_shuffle: always,
    aten.constant_pad_nd: movements.grows,
    aten.copy: never,
    aten.embedding: never,
    aten.flip: always,
    aten.index_select: movements.elsewhere,
    aten.native_channel_shuffle: always,
    aten.pixel_shuffle: always,
    aten.pixel_unshuffle: always,
    aten.repeat: movements.repeated,
    aten.roll: movements.rolled,
    aten.rot90: movements.elsewhere,
    aten.slice: movements.sliced,
}


def resizes(site: Site) -> bool:
    """Whether a call still works, and does the same, if its operands have fewer channels."""
    return RESIZES.get(site.packet, always)(site)


def register(op: Any, rule: Rule, *, override: bool = False, resizes: bool = False) -> None:
    """Add a rule for an operator of your own, in place; pruning and compaction both follow it.

    Args:
        op: an operator such as `torch.ops.mylib.myop`, or one of its overloads.
        rule: from a `Site` to the flow of its result. `fxlean.rules` has ready-made ones, such
            as `pointwise`, `movements.same` or `positions.window(2)`.
        override: replace a rule that is there.
        resizes: whether the same call does the same, channel by channel, on a value with fewer
            channels; else `compact` leaves all that the operator reads and writes as large as it
            is.

    Raises:
        ArgumentError: `op` is no operator, or has a rule and `override` is False; or `rule` is no
            function.
    """
    packet = operator_of(op)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        raise ArgumentError(
            f"op is {op!r}, which is no torch operator. Pass an operator as it appears in a "
            "traced graph, such as torch.ops.mylib.myop."
        )
    if not callable(rule):
        raise ArgumentError(
            f"rule is {shown(rule)}. Pass a function from a Site to the flow of the result, such "
            "as fxlean.rules.pointwise."
        )
    if packet in RULES and not override:
        raise ArgumentError(
            f"{packet} has a rule already ({RULES[packet].__name__}). Pass override=True to "
            "replace it."
        )
    RULES[packet] = rule
    RESIZES[packet] = always if resizes else never
