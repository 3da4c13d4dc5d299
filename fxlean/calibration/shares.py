"""Shares: which fraction of every channel's variance comes along each of its edges.

A kernel's share is its contribution over those of all kernels of its output channel. Operands of
a sum share by their variances, what is merged by variance times number of positions; every
operand of a product gets all, and what has one source passes it on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from ..channels.calls import argument, operator_of, read_call
from ..channels.flow import Flow, distinct
from ..channels.graph import ChannelGraph, Kind
from ..channels.walk import Walked, Wired
from ..channels.wiring import Block
from ..errors import ArgumentError
from ..tracing.inputs import Arguments, batch_size, in_parts
from ..tracing.leaves import tensors_in
from ..tracing.sandbox import same_random_states
from ..tracing.tracer import Trace
from .batches import told_if_constant
from .contributions import Contributions
from .moments import Moments
from .overlaps import Overlap
from .running import Known, Running, remember_trace, traced

aten = torch.ops.aten
SCALED = (aten.add, aten.sub)  # whose second operand is multiplied by their alpha


def shares_of(
    model: nn.Module,
    graph: ChannelGraph,
    trace: Trace,
    wired: Wired,
    batches: Iterable[Arguments],
    overlaps: dict[int, NDArray[np.float64]] | None = None,
) -> NDArray[np.float32]:
    """The share of every edge, in the layout of `graph.lengths`.

    Args:
        model: whose graph it is; it is not changed.
        graph: its channels; its lengths are not read.
        trace: where its wiring came from.
        wired: where the graph came from.
        batches: positional arguments of the model, one tuple a batch. In a process group, those of
            all ranks count, and every rank must call it.
        overlaps: takes the correlations of what each application of a layer without groups reads,
            by its first channel; None if they are not wanted.

    Returns:
        Between 0 and 1; 0 into a channel that does not vary, and along pruned kernels.

    Raises:
        ArgumentError: weights hold NaN or infinity, values become so, or a batch leads to another
            graph than the example inputs.

    Warns:
        PruneWarning: the inputs are one value only.
    """
    _check_weights(wired.wiring.blocks)
    blocks = wired.wiring.blocks if overlaps is not None else ()
    shared = {block.first: Overlap(block.weight) for block in blocks if block.weight.groups == 1}
    measured = _Measured(graph, wired.wiring.blocks, shared)
    known: Known = {}
    remember_trace(known, trace, wired)
    for batch in told_if_constant(batches):
        for part, found, own in _traced(model, batch, trace, wired, known):
            with same_random_states(model):
                for piece, walked in zip(found.pieces, own.walks, strict=True):
                    measured.add(Running(model, piece, piece.inputs or tensors_in(part)), walked)
    measured.reduce()
    if overlaps is not None:
        overlaps |= {first: overlap.correlations() for first, overlap in shared.items()}
    shares = np.ones_like(graph.lengths)
    for block in wired.wiring.blocks:
        variances = measured.contributions[block.first].variances().cpu().numpy()
        if not np.isfinite(variances.sum()):
            raise ArgumentError(
                f"values become NaN or infinity before {block.weight.layer_name}. Repair or "
                "reload the layers before it, or pass calibration batches in their usual range."
            )
        shares[block.start : block.start + variances.size] = _normalised(variances).reshape(-1)
    for made, operands in measured.joins.values():
        rows = made.start + np.flatnonzero(measured.divided[made.start : made.stop])
        summed = len(operands) == 1 or bool(graph.opaque[made.start])
        _divide(graph, rows, [operand.powers(summed=summed) for operand in operands], shares)
    return shares


def _divide(
    graph: ChannelGraph,
    rows: NDArray[np.int64],
    powers: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]],
    shares: NDArray[np.float32],
) -> None:
    """Write the shares of fixed edges into these channels, from the powers of their sources."""
    power = np.zeros(graph.num_channels)
    for ids, values in powers:
        power[ids] += values
    sizes = graph.sizes[rows]
    starts = np.cumsum(sizes) - sizes
    within = np.arange(sizes.sum()) - np.repeat(starts, sizes)
    given = power[graph.sources[np.repeat(graph.source_start[rows], sizes) + within]]
    total = np.repeat(np.add.reduceat(given, starts), sizes)
    edges = np.repeat(graph.length_start[rows], sizes) + within
    shares[edges] = np.divide(given, total, out=np.zeros_like(given), where=total > 0)


def _check_weights(blocks: Sequence[Block]) -> None:
    weights = [block.weight for block in blocks]
    broken = [weight.layer_name for weight in weights if not weight.value.isfinite().all()]
    if broken:
        raise ArgumentError(
            f"weights hold NaN or infinity in: {', '.join(dict.fromkeys(broken))}. Repair or "
            "reload these layers before pruning."
        )


def _traced(
    model: nn.Module, batch: Arguments, trace: Trace, wired: Wired, known: Known
) -> Iterator[tuple[Arguments, Trace, Wired]]:
    """A batch with its graphs, which must lead through the same channels as those of `trace`.

    If they do not, the batch comes in parts of as many samples as were traced: an attention that is
    written as products of matrices has channels for every sample.
    """
    found, own = traced(model, batch, known)
    samples = batch_size(trace.arguments)
    if _ends(own) == _ends(wired):
        yield batch, found, own
    elif batch_size(batch) != samples:
        for part in in_parts(batch, samples):
            yield from _traced(model, part, trace, wired, known)
    else:
        raise ArgumentError(
            f"a batch leads through {own.wiring.num_channels} channels, the example inputs, or the "
            f"first batch, through {wired.wiring.num_channels}. Pass batches of the same shape."
        )


def _ends(wired: Wired) -> tuple[int, list[tuple[int, int, int]]]:
    """Through how many channels a walk has led, and where the weights are among them."""
    blocks = [(block.first, block.rows, block.columns) for block in wired.wiring.blocks]
    return wired.wiring.num_channels, blocks


class _Measured:
    """What was seen at the calls of operators that make channels.

    Attributes:
        contributions: of each application of a weight, by its first channel.
        overlaps: of some of them.
        divided: which channels divide what they get among several sources of fixed edges.
        joins: by the first channel that a call makes: its channels, and what it reads.
    """

    def __init__(
        self, graph: ChannelGraph, blocks: Sequence[Block], overlaps: Mapping[int, Overlap]
    ) -> None:
        self.overlaps = overlaps
        self.contributions = {block.first: Contributions(block.weight) for block in blocks}
        self.divided = (graph.sizes > 1) & (graph.kinds != Kind.PRODUCT)
        for block in blocks:
            self.divided[block.first : block.first + block.rows] = False
        self.joins: dict[int, tuple[range, list[_Operand]]] = {}

    def add(self, running: Running, walked: Walked) -> None:
        """Run a graph, and look at what its calls read before each of them."""
        for node in running.nodes:
            made = walked.made.get(node, range(0))
            for first in self.contributions.keys() & made:
                value = running.value(data_of(node))
                self.contributions[first].add(value, node)
                if first in self.overlaps:
                    self.overlaps[first].add(value)
            if self.divided[made.start : made.stop].any():
                self._look(node, made, running, walked)
            running.step(node)

    def _look(self, node: fx.Node, made: range, running: Running, walked: Walked) -> None:
        """Take in what a call reads that joins or merges channels."""
        nodes = [arg for arg in node.all_input_nodes if isinstance(walked.flows.get(arg), Flow)]
        if made.start not in self.joins:
            self.joins[made.start] = (
                made,
                [
                    _Operand(walked.flows[arg], _factor(node, arg), running.value(arg).device)
                    for arg in nodes
                ],
            )
        for operand, arg in zip(self.joins[made.start][1], nodes, strict=True):
            operand.add(running.value(arg), walked.flows[arg])

    def reduce(self) -> None:
        """Take in what the other ranks have seen."""
        for contributions in self.contributions.values():
            contributions.moments.reduce()
        for overlap in self.overlaps.values():
            overlap.moments.reduce()
        for _, operands in self.joins.values():
            for operand in operands:
                operand.moments.reduce()


class _Operand:
    """The moments of one operand of a join, by channel.

    Attributes:
        moments: of the value at every place that has a channel of its own.
    """

    def __init__(self, flow: Flow, factor: float, device: torch.device) -> None:
        self._factor, self._ids = factor, flow.ids.reshape(-1)
        self.moments = Moments(len(self._ids), 1, device)

    def add(self, value: Tensor, flow: Flow) -> None:
        """Take in a value whose channels are known."""
        value = value.abs() if value.is_complex() else value
        value = value if value.is_floating_point() else value.float()
        varying = [dim for dim in range(value.dim()) if flow.varies(dim)]
        others = [dim for dim in range(value.dim()) if not flow.varies(dim)]
        self.moments.add(value.permute(varying + others).reshape(len(self._ids), 1, -1))

    def powers(self, *, summed: bool) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Channels, and the variance of each; times the number of its places if `summed`."""
        ids, places = distinct(self._ids)
        index = places.numpy()
        count = np.bincount(index)
        mean = self.moments.mean[:, 0].cpu().numpy()
        variance = self.moments.covariance[:, 0, 0].cpu().numpy()
        average = np.bincount(index, mean) / count
        total = np.bincount(index, variance + (mean - average[index]) ** 2)
        powers = self._factor**2 * (total if summed else total / count)
        return ids.numpy(), np.asarray(powers, dtype=np.float64)


def data_of(node: fx.Node) -> fx.Node:
    """What a convolution or a linear layer reads."""
    call = read_call(node)
    assert call is not None
    data: fx.Node = call.data
    return data


def _factor(node: fx.Node, arg: fx.Node) -> float:
    """What a sum multiplies an operand by."""
    if operator_of(node) not in SCALED or argument(node, "other") is not arg:
        return 1.0
    return float(argument(node, "alpha", default=1))


def _normalised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows that add up to 1, or stay 0."""
    total = values.sum(1, keepdims=True)
    shares: NDArray[np.float64] = np.divide(
        values, total, out=np.zeros_like(values), where=total > 0
    )
    return shares
