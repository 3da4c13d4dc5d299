"""Models without layer modules: a new graph of layers, written from an exported one.

Where convolutions are functions of raw parameters there is no module to replace, and buffers of
fixed width leave no room to cut. So the model is exported (for any batch and spatial size), and
written anew: from the outputs backwards it is known which channels of every value are needed,
and forwards each operator is emitted for just these. Concatenations, slices and writes into
slices are not emitted at all: whoever reads them gathers its channels from where they were made.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx

from ...channels.calls import argument, operator_of, vanishes
from ...channels.rules.movements import ALIASES
from ...channels.rules.positions import WINDOWED
from ...channels.rules.table import POINTWISE
from .layers import ExportedLayer

aten = torch.ops.aten
ZEROS = frozenset({aten.new_zeros, aten.zeros, aten.zeros_like})
PER_CHANNEL = WINDOWED | {  # and as they are kept apart in exported graphs
    aten._to_copy,
    aten.adaptive_avg_pool1d,
    aten.adaptive_avg_pool2d,
    aten.adaptive_avg_pool3d,
    aten.dropout,
    aten.max_pool1d,
    aten.max_pool2d,
    aten.max_pool3d,
}
DROPPED = frozenset({aten._assert_scalar, aten._assert_tensor_metadata, aten.sym_constrain_range})


@dataclass(eq=False)
class Made:
    """A node that makes channels of its own.

    Attributes:
        first, count: its channels are numbered `first` to `first + count - 1`.
        reads: channel numbers of each operand, by argument node, for operators that work
            channel by channel; others need all channels of all operands.
        layer: the layer, if it is one.
    """

    first: int
    count: int
    reads: dict[fx.Node, Tensor] = field(default_factory=dict)
    layer: ExportedLayer | None = None


@dataclass(eq=False)
class Channels:
    """Which channels stand along dimension 1 of every value of an exported graph.

    Attributes:
        of: channel numbers by node, shape (channels,); several nodes can share a channel.
        made: the nodes that make channels.
        maker: by channel, the node that makes it.
        zero: by channel, whether it is zero for every input.
    """

    of: dict[fx.Node, Any] = field(default_factory=dict)
    made: dict[fx.Node, Made] = field(default_factory=dict)
    maker: list[fx.Node] = field(default_factory=list)
    zero: list[bool] = field(default_factory=list)

    def make(self, node: fx.Node, zero: Tensor, **details: Any) -> Tensor:
        """New channels, made by a node; `zero` says which of them are always zero."""
        made = Made(len(self.maker), len(zero), **details)
        self.made[node] = made
        self.maker += [node] * len(zero)
        self.zero += zero.tolist()
        numbers = torch.arange(made.first, made.first + made.count)
        self.of[node] = numbers
        return numbers

    def zeros(self, numbers: Tensor) -> Tensor:
        """Whether each of these channels is always zero."""
        return torch.tensor([self.zero[number] for number in numbers.tolist()], dtype=torch.bool)


def follow(graph: fx.Graph, layers: dict[fx.Node, ExportedLayer]) -> Channels:
    """The channels of every value, from first to last."""
    channels = Channels()
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            _opaque(channels, node)
        elif node.op == "call_function" and any(arg in channels.of for arg in _inputs(node)):
            _follow(channels, node, layers.get(node))
    return channels


def _follow(channels: Channels, node: fx.Node, layer: ExportedLayer | None) -> None:
    packet = operator_of(node)
    if layer is not None and layer.call.data in channels.of:
        numbers = channels.of[layer.call.data]
        zero = layer.zero_rows(channels.zeros(numbers))
        channels.make(node, zero, reads={layer.call.data: numbers}, layer=layer)
    elif packet in ZEROS and _rank(node) > 1:
        channels.make(node, torch.ones(node.meta["val"].shape[1], dtype=torch.bool), reads={})
    elif (routed := _route(channels, node, packet)) is not None:
        channels.of[node] = routed
    elif _channelwise(channels, node, packet):
        reads = {arg: channels.of[arg] for arg in _inputs(node) if arg in channels.of}
        zeros = torch.stack([channels.zeros(numbers) for numbers in reads.values()])
        channels.make(node, _zeros(node, packet, list(reads), zeros), reads=reads)
    elif not _is_size(node):
        _opaque(channels, node)


def _opaque(channels: Channels, node: fx.Node) -> None:
    """A node about which nothing is known: all of its channels are live."""
    if _rank(node) > 1:
        channels.make(node, torch.zeros(node.meta["val"].shape[1], dtype=torch.bool))
    elif isinstance(node.meta.get("val"), Tensor | tuple | list):
        channels.of[node] = torch.zeros(0, dtype=torch.int64)


def _route(channels: Channels, node: fx.Node, packet: Any) -> Any:
    """Channel numbers of an operator that only cuts and joins along the channels, else None."""
    args: Any = node.args
    if packet in ALIASES:
        return channels.of[args[0]]
    if packet is operator.getitem and args[0] in channels.made:
        return channels.of[args[0]] if args[1] == 0 else None
    if packet is aten.cat:
        dim = args[1] if len(args) > 1 else 0
        whole = all(arg in channels.of and _like(arg, node) for arg in args[0])
        if whole and dim % _rank(node) == 1:
            return torch.cat([channels.of[arg] for arg in args[0]])
        return None
    if packet is aten.copy:
        source = args[1]
        same = source in channels.of and _like(source, node) and _shape(source) == _shape(node)
        return channels.of[source] if same else None
    if packet in (aten.slice, aten.slice_scatter):
        return _slice(channels, node, packet)
    return None


def _slice(channels: Channels, node: fx.Node, packet: Any) -> Tensor | None:
    """Channel numbers of a slice, or after a write into one; None if it cuts other dimensions."""
    whole, dim = argument(node, "self"), argument(node, "dim")
    start, end, step = (argument(node, name) for name in ("start", "end", "step"))
    source = argument(node, "src", default=whole)
    if whole not in channels.of or source not in channels.of or _rank(node) < 2:
        return None
    if dim % _rank(node) != 1:
        every = (start or 0) == 0 and step == 1 and (end is None or end == 2**63 - 1)
        return cast("Tensor", channels.of[source]) if every else None
    numbers: Tensor = channels.of[whole].clone()
    if packet is aten.slice:
        return numbers[slice(start, end, step)]
    numbers[slice(start, end, step)] = channels.of[source]
    return numbers


def _channelwise(channels: Channels, node: Any, packet: Any) -> bool:
    """Whether an operator treats every channel by itself, and all alike."""
    rank = _rank(node)
    if rank < 2:
        return False
    if packet is aten.pad or packet is aten.constant_pad_nd:
        return bool(len(node.args[1]) <= 2 * (rank - 2))
    if packet in PER_CHANNEL:
        return bool(_shape(node)[1] == _shape(node.args[0])[1])
    if packet not in POINTWISE and torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return False
    width = _shape(node)[1]
    tensors = [arg for arg in _inputs(node) if isinstance(arg.meta.get("val"), Tensor)]
    return all(
        _rank(arg) == rank and _shape(arg)[1] == width
        if arg in channels.of
        else _rank(arg) < rank - 1 or _shape(arg)[1 - rank] == 1
        for arg in tensors
    )


def _zeros(node: Any, packet: Any, operands: Sequence[fx.Node], zeros: Tensor) -> Tensor:
    """Where a channelwise result is zero; only sums and one-operand functions are looked at."""
    if packet in PER_CHANNEL:
        return zeros.all(0)
    if packet is aten.pad or packet is aten.constant_pad_nd:
        fill = next((arg for arg in node.args[2:] if isinstance(arg, int | float)), 0)
        return zeros.all(0) & (fill == 0)
    if any(arg not in operands for arg in _inputs(node)):
        return torch.zeros_like(zeros[0])

    def no_constant(arg: fx.Node) -> Any:
        raise AssertionError(arg)

    result = zeros.all(0) & vanishes(node, operands, operands, no_constant)
    for number, arg in enumerate(operands):
        result = result | (zeros[number] & vanishes(node, [arg], operands, no_constant))
    return result


def needed(graph: fx.Graph, channels: Channels) -> Tensor:
    """Which channels must be computed, by channel number, from the outputs backwards."""
    need = torch.zeros(len(channels.maker), dtype=torch.bool)
    for node in reversed(graph.nodes):
        if node.op == "output":
            for arg in _inputs(node):
                need[channels.of.get(arg, [])] = True
        elif node in channels.made:
            _need(channels, node, channels.made[node], need)
        elif node in channels.of and not len(channels.of[node]):
            for arg in _inputs(node):
                need[channels.of.get(arg, [])] = True
        elif _is_size(node) and node.users:
            need[channels.of[_inputs(node)[0]][:1]] = True
    return need


def _need(channels: Channels, node: fx.Node, made: Made, need: Tensor) -> None:
    """Mark what a node reads to compute those of its channels that are needed."""
    wanted = need[made.first : made.first + made.count]
    if node.op == "placeholder" or not wanted.any():
        return
    if made.layer is not None:
        numbers = made.reads[made.layer.call.data]
        need[numbers[made.layer.columns(wanted, channels.zeros(numbers))]] = True
    elif made.reads:
        for numbers in made.reads.values():
            need[numbers[wanted]] = True
    else:
        for arg in _inputs(node):
            need[channels.of.get(arg, [])] = True


def _is_size(node: fx.Node) -> bool:
    return operator_of(node) is aten.sym_size


def _inputs(node: fx.Node) -> list[fx.Node]:
    return list(node.all_input_nodes)


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _like(node: fx.Node, other: fx.Node) -> bool:
    """Whether two values have the same type and number of dimensions."""
    return _rank(node) == _rank(other) and node.meta["val"].dtype == other.meta["val"].dtype


def _rank(node: Any) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0
