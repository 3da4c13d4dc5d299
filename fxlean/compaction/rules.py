"""The rules of pruning on slots, and what fewer channels mean to them.

A rule says where channels go. Whether the same Python code still works, and does the same, on a
value with fewer of them is another question, which `channels.rules.resizes` answers: where it does
not, all that the operator reads and writes is pinned. Some operators do the same if each of several
parts loses the same channels: halves of a `chunk`, groups of a channel shuffle. Those are linked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..channels.flow import Flow, make_flow, scalar_gain
from ..channels.graph import Kind
from ..channels.rules.movements import LIKE, RESHAPED
from ..channels.rules.positions import reduced
from ..channels.rules.table import pointwise, resizes, rule_for
from ..channels.site import Site
from .constants import elements_behind
from .slots import Slots

aten = torch.ops.aten
SPLITS = frozenset(
    {aten.split, aten.split_with_sizes, aten.unsafe_split, aten.unsafe_split_with_sizes}
)
SHUFFLES = frozenset({aten.channel_shuffle, aten.native_channel_shuffle})
SEPARATING = frozenset({aten.select, aten.unbind})
OVER_PARTS = frozenset(
    {
        *(aten.amax, aten.amin, aten.mean, aten.sum),
        *(aten._log_softmax, aten._safe_softmax, aten._softmax),
    }
)
SIZED = RESHAPED | {aten.expand}  # calls that say how large their result is
TENSORS = "tensors"  # parameters and buffers of element-wise operators, cut with the channels
# The sizes in a graph are numbers, and do not tell whether the code computes them. These operators
# are taken to follow the number of channels, and if that fails, fewer of them.
FOLLOW: tuple[frozenset[Any], ...] = (
    SIZED | SPLITS | {TENSORS},
    SIZED | SPLITS,
    SIZED,
    frozenset(),
)


def apply_rule(site: Site, slots: Slots, follow: Collection[Any]) -> Any:
    """The flow of an operator's result, or a tuple of flows; what cannot be cut is pinned.

    `follow` has the operators whose sizes are taken to follow the number of channels.
    """
    slots.walked = site.packet.__name__
    normed = _group_norm(site, slots, follow)
    if normed is not None:
        return normed, *[None] * (len(site.shapes()) - 1)
    result = _met(site)
    if result is None:
        result = rule_for(site.node.target)(_with_parts_met(site))
    elif site.packet is aten.zeros_like:
        slots.set_zero(result.ids)
    applied = slots.applications and slots.applications[-1].call.node is site.node
    if applied or _adds_own_bias(site, slots):
        return result
    for node in site.constant_nodes():
        slots.refused |= site.constants.layers(node)
    results = list(_flows(result))
    parts = _parts(site, results, follow)
    if parts is not None:
        slots.link(parts[:-1], parts[1:])
    elif not _follows(site, slots, results, follow):
        for flow in (*site.flows(), *results):
            slots.pin(flow.ids)
        return result
    slots.assumed |= site.packet in follow
    return result


def _group_norm(site: Site, slots: Slots, follow: Collection[Any]) -> Flow | None:
    """The result of a group norm that is a layer, and can lose whole groups; else None."""
    if site.packet is not aten.native_group_norm or TENSORS not in follow:
        return None
    flow, parameters = site.flow(), [site.argument("weight"), site.argument("bias")]
    layer = site.constants.layer(*parameters)
    if None in parameters or layer is None or _dims(flow) != [1]:
        return None
    groups, result = site.argument("group"), slots.derive(Kind.LIVE, flow)
    slots.link_groups(flow.ids, groups)
    slots.groups[layer] = groups, result.ids.reshape(-1)
    for node in parameters:
        name = site.constants.name(node)
        slots.tensors.setdefault(name, []).append((0, result.ids.reshape(-1)))
    return result


def _flows(result: Any) -> Iterator[Flow]:
    for flow in result if isinstance(result, tuple) else (result,):
        if flow is not None:
            yield flow


def _dims(flow: Flow) -> list[int]:
    """The dimensions along which channels vary."""
    return [dim for dim in range(len(flow.shape)) if flow.varies(dim)]


def _met(site: Site) -> Flow | None:
    """The result of an operator whose operands, or parts of one, meet as in a sum; else None.

    A concatenation along a dimension where no channels vary, or a pixel shuffle. A constant that is
    as large as a value meets it alone.
    """
    flows, rank = site.flows(), len(site.shape)
    if site.packet in LIKE:
        return site.wiring.derive(Kind.LIVE, flows[0])
    if site.packet is aten.cat and len(flows) == len(site.argument("tensors")):
        dims = {dim for flow in flows for dim in _dims(flow)}
        if dims and site.argument("dim") % rank not in dims:
            return site.wiring.join(Kind.SUM, flows, site.shape)
    if site.packet is aten.pixel_shuffle and _dims(flows[0]) == [rank - 3]:
        area = site.argument("upscale_factor") ** 2
        parts = flows[0].ids.reshape(-1, area, 1, 1).unbind(1)
        met = [make_flow(part, scalar_gain(rank), site.shape) for part in parts]
        return site.wiring.join(Kind.SUM, met, site.shape)
    return None


def _with_parts_met(site: Site) -> Site:
    """The call on parts that have met, where it adds up, or weighs against each other, several."""
    if site.packet not in OVER_PARTS or len(_dims(site.flow())) != 2:
        return site
    flow = site.flow()
    over = [dim for dim in _dims(flow) if dim in reduced(site)]
    if len(over) != 1:
        return site
    parts = [make_flow(ids, flow.gain, flow.shape) for ids in flow.ids.split(1, over[0])]
    met = site.wiring.join(Kind.SUM, parts, flow.shape)
    return replace(site, env={**site.env, site.nodes()[0]: met})


def _adds_own_bias(site: Site, slots: Slots) -> bool:
    """Whether a sum adds the bias of the linear layer whose product it reads.

    So torch writes linear layers whose data do not lie in the order of their dimensions.
    """
    constants = site.constant_nodes()
    layer = site.constants.layer(*constants) if site.packet is aten.add and constants else None
    if layer is None:
        return False
    for applied in slots.applications:
        made = applied.result.slots
        if applied.layer == layer and torch.equal(site.flow().ids.reshape(-1), made):
            applied.result.zero.logical_and_(site.value(constants[0]).cpu() == 0)
            return True
    return False


def _parts(site: Site, results: Sequence[Flow], follow: Collection[Any]) -> Tensor | None:
    """The slots of several parts that must lose the same channels, shape (parts, channels)."""
    flow = site.flow()
    if site.packet in SHUFFLES and _dims(flow) == [1]:
        return flow.ids.reshape(site.argument("groups"), -1)
    if site.packet in SEPARATING or site.packet is aten.stack:
        ids = results[0].ids if site.packet is aten.stack else flow.ids
        dim = site.argument("dim") % ids.dim()
        apart = ids.shape[dim] > 1 and sum(size > 1 for size in ids.shape) == 2
        return ids.movedim(dim, 0).flatten(1) if apart else None
    if site.packet not in follow or len(_dims(flow)) != 1:
        return None
    if site.packet in SPLITS and len({part.shape for part in results}) == 1:
        return torch.stack([part.ids.reshape(-1) for part in results])
    if site.packet in RESHAPED and len(_dims(results[0])) > 1:
        # Of groups side by side, each can become smaller.
        ids = results[0].ids
        return ids.movedim(_dims(results[0])[-1], -1).flatten(0, -2)
    return None


def _follows(site: Site, slots: Slots, results: Sequence[Flow], follow: Collection[Any]) -> bool:
    """Whether the operator does the same, channel by channel, on values with fewer channels."""
    flows = site.flows()
    written = site.packet in SIZED and site.packet not in follow
    if not resizes(site) or (written and flows[0].shape != site.shape):
        return False
    # What is left of a value whose channels vary along two dimensions need not be a tensor.
    most = max(1, *(len(_dims(flow)) for flow in flows))
    if any(len(_dims(flow)) > most for flow in results):
        return False
    varying = {dim - len(flow.shape) for flow in [*flows, *results] for dim in _dims(flow)}
    return all(
        _fits(site, slots, node, results[0], varying, follow)
        for node in site.constant_nodes()
        if isinstance(node.meta.get("val"), Tensor)
    )


def _fits(
    site: Site,
    slots: Slots,
    node: fx.Node,
    result: Flow,
    varying: Collection[int],
    follow: Collection[Any],
) -> bool:
    """Whether a constant has no size along channels, or is made of what is cut with them."""
    shape = node.meta["val"].shape
    along = [dim for dim in varying if -dim <= len(shape) and shape[dim] > 1]
    if not along:
        return True
    elementwise = rule_for(site.node.target) is pointwise and len(varying) == 1
    cuttable = elementwise and TENSORS in follow
    behind = elements_behind(node, site.constants) if cuttable else None
    found = {}
    for name, places in (behind or {}).items():
        sides = [place.movedim(along[0], 0).reshape(shape[along[0]], -1) for place in places]
        if all(side.equal(side[:1].expand_as(side)) for side in sides):
            continue  # one element for all channels
        order = torch.arange(shape[along[0]])[:, None]
        dims = [dim for dim, side in enumerate(sides) if side.equal(order.expand_as(side))]
        if not dims:
            return False
        found[name] = dims[0]
    for name, dim in found.items():
        slots.tensors.setdefault(name, []).append((dim, result.ids.reshape(-1)))
    return bool(found)
