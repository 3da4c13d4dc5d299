"""The rules of pruning on slots, and what fewer channels mean to them.

A rule says where channels go. Whether the same Python code still works, and does the same, on a
value with fewer of them is another question, which `channels.rules.resizes` answers: where it does
not, all that the operator reads and writes is pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..channels.flow import Flow
from ..channels.graph import Kind
from ..channels.rules.movements import RESHAPED
from ..channels.rules.table import resizes, rule_for
from ..channels.site import Site
from .slots import Slots

aten = torch.ops.aten


def apply_rule(site: Site, slots: Slots, *, reshape: bool) -> Any:
    """The flow of an operator's result, or a tuple of flows; what cannot be cut is pinned.

    `reshape` says whether sizes in reshapes are taken to follow the number of channels.
    """
    result = _aside(site) if site.packet is aten.cat else None
    if result is None:
        result = rule_for(site.node.target)(site)
    applied = slots.applications and slots.applications[-1].call.node is site.node
    if not applied:
        for node in site.constant_nodes():
            slots.refused |= site.constants.layers(node)
        flows = [*site.flows(), *_flows(result)]
        follows = resizes(site) and (reshape or site.packet not in RESHAPED or _same_shape(site))
        if not follows or _meets_constants(site, flows):
            for flow in flows:
                slots.pin(flow.ids)
    for flow in _flows(result):
        if sum(size > 1 for size in flow.ids.shape) > 1:
            slots.pin(flow.ids)  # leaving some out would not leave a tensor
    return result


def _flows(result: Any) -> Iterator[Flow]:
    for flow in result if isinstance(result, tuple) else (result,):
        if flow is not None:
            yield flow


def _same_shape(site: Site) -> bool:
    return site.flow().shape == site.shape


def _meets_constants(site: Site, flows: list[Flow]) -> bool:
    """Whether a constant of fixed size lies along a dimension where channels vary."""
    varying = {
        dim - len(flow.shape)
        for flow in flows
        for dim in range(len(flow.shape))
        if flow.varies(dim)
    }
    shapes = [
        node.meta["val"].shape
        for node in site.constant_nodes()
        if isinstance(node.meta.get("val"), Tensor)
    ]
    return any(shape[dim] > 1 for shape in shapes for dim in varying if -dim <= len(shape))


def _aside(site: Site) -> Flow | None:
    """A concatenation along a dimension where no channels vary: they meet, as in a sum."""
    flows, rank = site.flows(), len(site.shape)
    dims = {dim for flow in flows for dim in range(rank) if flow.varies(dim)}
    constants = len(flows) < len(site.argument("tensors"))
    if constants or not dims or site.argument("dim") % rank in dims:
        return None
    return site.wiring.join(Kind.SUM, flows, site.shape)
