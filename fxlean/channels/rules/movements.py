"""Operators that only move data: run on channel ids as they were run on the values.

The table says which dimensions have to be expanded to their full size first; along the others
the operator treats all positions alike, and the ids stay as small as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from ..builder import CONSTANT, ZERO, Bias
from ..calls import operator_of, run
from ..flow import Flow, make_flow, move, reshape
from ..site import Site, constant_flow

aten = torch.ops.aten

ALIASES = frozenset(
    {
        aten.alias,
        aten.clone,
        aten.contiguous,
        aten.detach,
        aten.lift_fresh,
        aten.lift_fresh_copy,
    }
)
SAME = ALIASES | {aten.expand, aten._to_copy}
RESHAPED = frozenset({aten.view, aten._unsafe_view, aten.reshape, aten.squeeze, aten.flatten})
DIMENSIONS = frozenset(
    {aten.permute, aten.transpose, aten.t, aten.unsqueeze, aten.movedim, aten.stack}
)
ALONG = frozenset(
    {
        aten.cat,
        aten.flip,
        aten.narrow,
        aten.select,
        aten.slice,
        aten.slice_scatter,
        aten.split,
        aten.split_with_sizes,
        aten.unbind,
        aten.unfold,
        aten.unsafe_split,
        aten.unsafe_split_with_sizes,
    }
)
INDEXED = frozenset(
    {aten.gather, aten.index, aten.index_put, aten.index_select, aten._unsafe_index}
)
WHOLE = frozenset(
    {
        aten.channel_shuffle,
        aten.diagonal,
        aten.native_channel_shuffle,
        aten.pixel_shuffle,
        aten.pixel_unshuffle,
        aten.repeat,
        aten.roll,
        aten.rot90,
        aten.select_scatter,
        aten.tril,
        aten.triu,
    }
)
LIKE = frozenset({aten.full_like, aten.ones_like, aten.zeros_like})
MOVEMENTS = SAME | RESHAPED | DIMENSIONS | ALONG | INDEXED | WHOLE


def moves(target: Any) -> bool:
    """Whether an operator only moves data."""
    return operator_of(target) in MOVEMENTS


def same(site: Site) -> Flow:
    """The value itself, or a broadcast copy of it."""
    flow = site.flow()
    return make_flow(flow.ids, flow.gain, site.shape)


def reshaped(site: Site) -> Flow:
    """A view with other dimensions; only those that are mixed are expanded."""
    return reshape(site.flow(), site.shape)


def along(site: Site) -> Any:
    """Cutting and joining along one dimension, or a few."""
    dims = site.argument("dim", "dims", "dimension")
    return _move(site, dims if isinstance(dims, Sequence) else [dims])


def dimensions(site: Site) -> Any:
    """Reordering dimensions, whatever their sizes."""
    return _move(site, [])


def whole(site: Site) -> Any:
    """Any other movement: every dimension matters."""
    return _move(site, None)


def indexed(site: Site) -> Any:
    """Picking positions by indices, which must not depend on the input."""
    if not site.is_constant(site.argument("indices", "index")):
        return site.opaque()
    return _move(site, None)


def _move(site: Site, dims: Sequence[int] | None) -> Any:
    """Run the operator on the ids of its floating-point operands; indices are taken as they are."""
    nodes = [node for node in site.node.all_input_nodes if _carries(site, node)]
    flows = [site.flow(node) for node in nodes]

    def apply(tensors: Sequence[Tensor]) -> Any:
        given = dict(zip(nodes, tensors, strict=True))

        def lookup(node: fx.Node) -> Any:
            if node in given:
                return given[node]
            value = site.value(node)
            return value.cpu() if isinstance(value, Tensor) else value

        return run(site.node, lookup)

    def part(number: int) -> Callable[[Sequence[Tensor]], Tensor]:
        return lambda tensors: cast("Tensor", apply(tensors)[number])

    value = site.node.meta["val"]
    if isinstance(value, Tensor):
        return move(flows, apply, site.shape, dims)
    parts = enumerate(value)
    return tuple(move(flows, part(number), item.shape, dims) for number, item in parts)


def _carries(site: Site, node: fx.Node) -> bool:
    """Whether an operand is data that moves, and not an index or mask that says how."""
    if node in site.env:
        return True
    value = site.value(node)
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def move_flow(flow: Flow, shape: Sequence[int], dim: int, number: int) -> Flow:
    """The part of a flow that is the number-th chunk of this shape along a dimension."""
    size = shape[dim]
    return move([flow], lambda t: t[0].narrow(dim, number * size, size), shape, [dim])


def pad(site: Site) -> Flow:
    """Padding with a constant: new positions only matter where the channel varies."""
    flow = site.flow()
    widths = list(site.argument("pad"))
    fill = float(site.argument("value"))
    rank = len(flow.shape)
    ids, gain = torch.broadcast_tensors(flow.ids, flow.gain)
    outside = False
    for number in range(len(widths) // 2):
        dim, (before, after) = rank - 1 - number, widths[2 * number : 2 * number + 2]
        if not flow.varies(dim):
            outside = outside or before > 0 or after > 0
            continue
        width = [0, 0] * number + [before, after]
        border = ZERO if fill == 0 else CONSTANT
        ids = aten.constant_pad_nd(ids, width, border)
        gain = aten.constant_pad_nd(gain, width, 1.0)
    padded = make_flow(ids, gain, site.shape)
    at_zero = torch.full(padded.ids.shape, fill if outside else 0.0)
    return site.wiring.shift(padded, Bias(at_zero))


def copy(site: Site) -> Flow:
    """`destination.copy_(source)`: the source, broadcast."""
    source = site.flow(site.argument("src"))
    return make_flow(source.ids, source.gain, site.shape)


def strided(site: Site) -> Flow:
    """`as_strided`, on ids laid out in memory like the value."""
    flow = site.flow()
    strides = site.nodes()[0].meta["val"].stride()

    def apply(tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        laid_out = torch.empty_strided(flow.shape, strides, dtype=tensor.dtype).copy_(tensor)
        return laid_out.as_strided(*site.node.args[1:])  # type: ignore[arg-type]

    return move([flow], apply, site.shape, None)


def restrided(site: Site) -> bool:
    """Whether `as_strided` gives the value itself, as where torch changes only the layout."""
    value = site.nodes()[0].meta["val"]
    if tuple(site.argument("size")) != tuple(value.shape):
        return False
    # Along a dimension of one position, no stride matters.
    strides = zip(value.shape, value.stride(), site.argument("stride"), strict=True)
    same = all(own == asked for size, own, asked in strides if size > 1)
    return same and site.argument("storage_offset") in (None, value.storage_offset())


def filled(site: Site) -> Flow:
    """A new constant of the shape of a flow, such as `zeros_like`."""
    return constant_flow(site.run(lambda node: torch.zeros(node.meta["val"].shape)))


def unknown(site: Site) -> Flow:
    """A new constant of unknown value: memory that is not set yet, or random numbers."""
    return constant_flow(torch.ones(site.shape))


def unchanged(site: Site) -> bool:
    """Whether the result has the shape of the value."""
    return site.flow().shape == site.shape


def elsewhere(site: Site) -> bool:
    """Whether an operator cuts along dimensions where channels do not vary."""
    dims = site.argument("dim", "dims", "dimension")
    dims = dims if isinstance(dims, Sequence) else [dims]
    return not any(flow.varies(dim) for flow in site.flows() for dim in dims)


def rolled(site: Site) -> bool:
    """Whether values roll along such dimensions only."""
    return bool(site.argument("dims")) and elsewhere(site)


def picked(site: Site) -> bool:
    """Whether indices pick along such dimensions only."""
    indices = enumerate(site.argument("indices"))
    flow = site.flow()
    return not any(flow.varies(dim) for dim, index in indices if index is not None)


def repeated(site: Site) -> bool:
    """Whether a value is repeated along such dimensions only."""
    flow = site.flow()
    times = site.argument("repeats")[-len(flow.shape) :]
    return not any(flow.varies(dim) for dim, count in enumerate(times) if count > 1)


def sliced(site: Site) -> bool:
    """Whether a slice is along such a dimension, or takes all there is."""
    return unchanged(site) or elsewhere(site)


def grows(site: Site) -> bool:
    """Whether a padding leaves all positions where channels vary."""
    flow, widths = site.flow(), site.argument("pad")
    return not any(
        width < 0 and flow.varies(len(flow.shape) - 1 - number // 2)
        for number, width in enumerate(widths)
    )
