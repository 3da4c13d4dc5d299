"""`Wiring`: a `ChannelGraph` while it grows, and the weights that will give it its lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .flow import Flow, distinct, make_flow, scalar_gain
from .graph import ChannelGraph, Kind, Layer
from .weights import Weight

ZERO = 0
CONSTANT = 1


@dataclass(eq=False)
class Block:
    """The rows of one application of a weight, whose lengths are still to be computed.

    Attributes:
        weight: the kernels.
        first: the first of its output channels.
        rows, columns: number of output channels, and of edges into each.
        start: where the block begins among the lengths.
        gain_in: gain at every edge of a row, shape (groups, columns).
        gain_out: batch norm folded into the kernels, shape (rows,).
        biased: whether a constant is added to its channels.
    """

    weight: Weight
    first: int
    rows: int
    columns: int
    start: int
    gain_in: NDArray[np.float64]
    gain_out: NDArray[np.float64]
    biased: bool = False


@dataclass(eq=False)
class Wiring:
    """Channels and edges so far. Channel 0 is always zero, channel 1 a constant.

    Attributes:
        blocks: applications of weights, in order.
        constants: (parameter, flat index, channel) of biases and batch norms, which are masked
            where the channel is zero.
        opaque_ops: operators without a rule, with how often they occurred.
        skipped: what is left unpruned, and why.
    """

    blocks: list[Block] = field(default_factory=list)
    constants: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    opaque_ops: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    _kinds: list[NDArray[np.uint8]] = field(default_factory=list)
    _sizes: list[NDArray[np.int64]] = field(default_factory=list)
    _source_start: list[NDArray[np.int64]] = field(default_factory=list)
    _length_start: list[NDArray[np.int64]] = field(default_factory=list)
    _sources: list[NDArray[np.int32]] = field(default_factory=list)
    _fixed_lengths: list[tuple[int, NDArray[np.float32]]] = field(default_factory=list)
    _opaque: list[int] = field(default_factory=list)
    _num_channels: int = 0
    _num_sources: int = 0
    _num_lengths: int = 0

    def __post_init__(self) -> None:
        self.add_channels(Kind.DEAD, 1)
        self.add_channels(Kind.LIVE, 1)

    @property
    def num_channels(self) -> int:
        """Number of channels so far."""
        return self._num_channels

    def add_channels(self, kind: Kind, count: int) -> Tensor:
        """New channels without incoming edges."""
        none = np.zeros(count, dtype=np.int64)
        return self._append(kind, none, none, none)

    def add_rows(
        self,
        kind: Kind,
        targets: NDArray[np.int64],
        sources: NDArray[np.int64],
        lengths: NDArray[np.float64],
        count: int,
    ) -> Tensor:
        """New channels with fixed edges `sources[i] -> targets[i]`; targets count from 0."""
        order = np.lexsort((sources, targets))
        targets, sources, lengths = targets[order], sources[order], lengths[order]
        fresh = np.ones(len(order), dtype=bool)
        fresh[1:] = (np.diff(targets) != 0) | (np.diff(sources) != 0)
        first = np.flatnonzero(fresh)
        longest = np.maximum.reduceat(lengths, first) if len(first) else lengths
        sizes = np.bincount(targets[first], minlength=count)
        offsets = np.cumsum(sizes) - sizes
        self._fixed_lengths.append((self._num_lengths, longest.astype(np.float32)))
        ids = self._append(kind, sizes, self._num_sources + offsets, self._num_lengths + offsets)
        self._add_sources(sources[first])
        self._num_lengths += len(first)
        return ids

    def add_block(
        self, weight: Weight, kind: Kind, sources: Tensor, gain: Tensor, rows: int
    ) -> Block:
        """New channels fed by a weight; sources and gain have shape (groups, columns)."""
        groups, columns = sources.shape
        group = np.arange(rows, dtype=np.int64) // (rows // groups)
        first, start = self._num_channels, self._num_lengths
        block = Block(weight, first, rows, columns, start, gain.numpy(), np.ones(rows))
        self.blocks.append(block)
        self._append(
            kind,
            np.full(rows, columns, dtype=np.int64),
            self._num_sources + group * columns,
            self._num_lengths + np.arange(rows, dtype=np.int64) * columns,
        )
        self._add_sources(sources.reshape(-1).numpy())
        self._num_lengths += rows * columns
        return block

    def derive(self, kind: Kind, flow: Flow, where: Tensor | None = None) -> Flow:
        """New channels of a kind, one for every channel of the flow, each fed by it alone.

        `where` says at which positions, broadcasting with `flow.ids`; elsewhere the channel stays.
        """
        where = torch.ones_like(flow.ids, dtype=torch.bool) if where is None else where
        ids, gain, positions = torch.broadcast_tensors(flow.ids, flow.gain, where)
        old, target = distinct(ids[positions])
        new = self.add_rows(
            kind, target.numpy(), ids[positions].numpy(), gain[positions].numpy(), len(old)
        )
        result, scale = ids.clone(), gain.clone()
        result[positions] = new[target]
        scale[positions] = 1.0
        return make_flow(result, scale, flow.shape)

    def join(self, kind: Kind, flows: Sequence[Flow], shape: Sequence[int]) -> Flow:
        """One new channel for each distinct tuple of channels that meet at a position."""
        rank = len(shape)
        padded = [make_flow(flow.ids, flow.gain, _padded(flow.shape, rank)) for flow in flows]
        tensors = torch.broadcast_tensors(*[t for flow in padded for t in (flow.ids, flow.gain)])
        key = torch.zeros_like(tensors[0])
        for ids in tensors[::2]:
            key = distinct(key * self._num_channels + ids)[1]
        count = int(key.max()) + 1 if key.numel() else 0
        new = self.add_rows(
            kind,
            key.reshape(-1).repeat(len(flows)).numpy(),
            torch.cat([ids.reshape(-1) for ids in tensors[::2]]).numpy(),
            torch.cat([gain.reshape(-1) for gain in tensors[1::2]]).numpy(),
            count,
        )
        return make_flow(new[key], scalar_gain(rank), shape)

    def merge(self, flow: Flow, dims: Sequence[int]) -> Flow:
        """The flow with channels that vary along `dims` only, merging those that differ."""
        rank = len(flow.shape)
        dims = [dim % rank for dim in dims]
        if all(d in dims or flow.ids.shape[d] == flow.gain.shape[d] == 1 for d in range(rank)):
            return flow
        ids, gain = torch.broadcast_tensors(flow.ids, flow.gain)
        kept = [ids.shape[dim] if dim in dims else 1 for dim in range(rank)]
        count = int(np.prod(kept))
        target = torch.arange(count).reshape(kept).expand(ids.shape).reshape(-1)
        sources, lengths = ids.reshape(-1).numpy(), gain.reshape(-1).numpy()
        new = self.add_rows(Kind.SUM, target.numpy(), sources, lengths, count)
        return make_flow(new.reshape(kept), scalar_gain(rank), flow.shape)

    def hub(self, channels: Tensor, *, opaque: bool) -> Tensor:
        """One channel fed by all of these, shape (1,); opaque ones are never redundant.

        The edges of an opaque hub have length 1; others, length 0, stand for the dependence of
        a normalisation on all of its inputs, along which no chain runs.
        """
        sources = distinct(channels)[0].numpy()
        lengths = np.full(len(sources), float(opaque))
        hub = self.add_rows(Kind.LIVE, np.zeros_like(sources), sources, lengths, 1)
        if opaque:
            self._opaque.append(int(hub))
        return hub

    def attach(self, parameter: str, index: Tensor, ids: Tensor) -> None:
        """Note that these elements of a bias or batch norm are constants of these channels."""
        self.constants.append((parameter, index.reshape(-1), ids.reshape(-1)))

    def rows(self) -> Callable[[int], NDArray[np.int32]]:
        """A function from a channel to the channels that feed it."""
        sizes, starts = np.concatenate(self._sizes), np.concatenate(self._source_start)
        sources = np.concatenate([np.zeros(0, dtype=np.int32), *self._sources])
        return lambda channel: sources[starts[channel] : starts[channel] + sizes[channel]]

    def finish(self, outputs: Tensor, prunable: dict[int, Layer], pruned: Tensor) -> ChannelGraph:
        """The wiring as a graph, with the lengths of prunable and linear layers still zero.

        Args:
            outputs: channels that the model returns.
            prunable: the layer of a block, by its number; other blocks are fixed edges.
            pruned: shape (kernels,), True for kernels that were pruned earlier.
        """
        kernel_start = np.full(self._num_channels, -1, dtype=np.int64)
        for number, layer in prunable.items():
            block = self.blocks[number]
            rows = np.arange(block.rows, dtype=np.int64)
            kernel_start[block.first : block.first + block.rows] = (
                layer.start + rows * block.columns
            )
        kinds = np.concatenate(self._kinds)
        for number, block in enumerate(self.blocks):
            if block.biased and number not in prunable:
                kinds[block.first : block.first + block.rows] = Kind.LIVE
        lengths = np.zeros(self._num_lengths, dtype=np.float32)
        for start, values in self._fixed_lengths:
            lengths[start : start + len(values)] = values
        layers = sorted(set(prunable.values()), key=lambda layer: layer.start)
        flags = np.zeros((2, self._num_channels), dtype=bool)
        flags[0, outputs.numpy()] = True
        flags[1, self._opaque] = True
        return ChannelGraph(
            kinds=kinds,
            sizes=np.concatenate(self._sizes),
            source_start=np.concatenate(self._source_start),
            length_start=np.concatenate(self._length_start),
            kernel_start=kernel_start,
            sources=np.concatenate([np.zeros(0, dtype=np.int32), *self._sources]),
            lengths=lengths,
            outputs=flags[0],
            opaque=flags[1],
            groups=self._groups(),
            alive=~pruned.numpy(),
            layers=tuple(layers),
        )

    def _groups(self) -> NDArray[np.int32]:
        """Channels that share a constant, connected components numbered by their first channel."""
        import scipy.sparse.csgraph  # here, because it takes a third of the time to import fxlean

        pairs = []
        for parameter in {name for name, _, _ in self.constants}:
            parts = [(index, ids) for name, index, ids in self.constants if name == parameter]
            index = torch.cat([index for index, _ in parts]).numpy()
            ids = torch.cat([ids for _, ids in parts]).numpy()
            order = np.argsort(index, kind="stable")
            same = np.diff(index[order]) == 0
            pairs.append(np.stack([ids[order][:-1][same], ids[order][1:][same]]))
        left, right = np.concatenate([np.zeros((2, 0), dtype=np.int64), *pairs], axis=1)
        shape = (self._num_channels, self._num_channels)
        links = scipy.sparse.coo_array((np.ones(len(left)), (left, right)), shape=shape)
        _, component = scipy.sparse.csgraph.connected_components(links, directed=False)
        _, first = np.unique(component, return_index=True)
        groups: NDArray[np.int32] = first[component].astype(np.int32)
        return groups

    def _append(
        self,
        kind: Kind,
        sizes: NDArray[np.int64],
        source_start: NDArray[np.int64],
        length_start: NDArray[np.int64],
    ) -> Tensor:
        first = self._num_channels
        self._num_channels += len(sizes)
        self._kinds.append(np.full(len(sizes), kind, dtype=np.uint8))
        self._sizes.append(sizes)
        self._source_start.append(source_start)
        self._length_start.append(length_start)
        return torch.arange(first, self._num_channels)

    def _add_sources(self, sources: NDArray[np.int64]) -> None:
        self._sources.append(sources.astype(np.int32))
        self._num_sources += len(sources)


def _padded(shape: Sequence[int], rank: int) -> tuple[int, ...]:
    return (1,) * (rank - len(shape)) + tuple(shape)
