"""Two networks of one architecture run side by side, from layer to layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ..channels.calls import BatchNorm, argument, aten, operator_of, read_call
from ..channels.walk import Wired
from ..channels.wiring import Block
from ..tracing.inputs import Arguments
from ..tracing.leaves import tensors_in
from ..tracing.tracer import Piece, Trace
from .running import Known, Running, traced

SCALED = frozenset({aten.native_group_norm, aten.native_layer_norm})


@dataclass(frozen=True, eq=False)
class Stop:
    """A convolution, linear layer, batch norm, or a group or layer norm with a scale and a shift.

    Attributes:
        node: its call.
        block: its weight; None for a norm.
        statistics: name of the running mean of a batch norm, or of the one that alone reads a
            layer; None where there is none.
    """

    node: fx.Node
    block: Block | None
    statistics: str | None

    @property
    def scaled(self) -> bool:
        """Whether it is a group or layer norm."""
        return operator_of(self.node) in SCALED

    @property
    def bias(self) -> Any:
        """The bias of a layer; None where it has none."""
        call = read_call(self.node)
        return call.bias if call is not None else None

    @property
    def scale_and_shift(self) -> list[Any]:
        """What a group or layer norm multiplies by, and what it adds."""
        return [argument(self.node, name) for name in ("weight", "bias")]

    def alike(self, other: Stop) -> bool:
        """Whether two networks can be compared here."""
        if self.block is None or other.block is None:
            return self.block is other.block and self.scaled == other.scaled
        mine, theirs = self.block.weight, other.block.weight
        return mine.value.shape == theirs.value.shape and mine.groups == theirs.groups


def stops_of(piece: Piece, made: Mapping[fx.Node, range], blocks: Sequence[Block]) -> list[Stop]:
    """The stops of a piece, in order."""
    nodes = list(piece.graph.graph.nodes)
    firsts = {block.first: block for block in blocks}
    means = {node: piece.state_nodes.get(_running_mean(node)) for node in nodes}
    found = []
    for node in nodes:
        inside = firsts.keys() & made.get(node, ())
        if inside:
            reader = next(iter(node.users)) if len(node.users) == 1 else None
            found.append(Stop(node, firsts[inside.pop()], reader and means[reader]))
        elif means[node] is not None or _has_scale(node):
            found.append(Stop(node, None, means[node]))
    return found


def _has_scale(node: fx.Node) -> bool:
    """Whether it is a group or layer norm with a scale and a shift."""
    if operator_of(node) not in SCALED:
        return False
    return None not in (argument(node, "weight"), argument(node, "bias"))


def _running_mean(node: fx.Node) -> Any:
    """The running mean that a call normalises with, if it is a batch norm."""
    call = read_call(node)
    return call.mean if isinstance(call, BatchNorm) else None


class Side:
    """One network on one batch.

    Attributes:
        running: the graph of one of its pieces, run as far as was asked.
        stops: the layers of this piece, in order.
    """

    def __init__(
        self, model: nn.Module, trace: Trace, wired: Wired, number: int, batch: Arguments
    ) -> None:
        piece = trace.pieces[number]
        self.running = Running(model, piece, piece.inputs or tensors_in(batch))
        found = stops_of(piece, wired.walks[number].made, wired.wiring.blocks)
        runs = set(self.running.nodes)  # a norm of constants does not
        self.stops = [stop for stop in found if stop.node in runs]
        self._next = 0

    def forked(self) -> Side:
        """The same network, run as far, to be run on by itself."""
        fork = copy.copy(self)
        fork.running = self.running.forked()
        return fork

    def advance(self, number: int) -> fx.Node:
        """Run what comes before a stop; returns its call."""
        node = self.stops[number].node
        while self.running.nodes[self._next] is not node:
            self.run()
        return node

    def run(self) -> Any:
        """Run the next node; returns its value."""
        self._next += 1
        return self.running.step(self.running.nodes[self._next - 1])

    def take(self, value: Any) -> None:
        """Go past the next node as if it had given this value."""
        self._next += 1
        self.running.keep(self.running.nodes[self._next - 1], value)


def opened(
    model: nn.Module, batches: Sequence[Arguments], number: int, known: Known
) -> tuple[list[Side], int]:
    """A side for each batch, for one piece of a model; and how many pieces there are."""
    sides, pieces = [], 0
    for batch in batches:
        trace, wired = traced(model, batch, known)
        pieces = len(trace.pieces)
        sides.append(Side(model, trace, wired, number, batch))
    return sides, pieces
