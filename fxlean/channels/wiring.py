"""`Wiring`: a `ChannelGraph` while it grows, and the weights that will give it its lengths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from .builder import CONSTANT, ZERO, Affine, Bias
from .calls import BatchNorm, Convolution, Linear
from .flow import Flow, distinct, make_flow, meet, reduce_to, scalar_gain
from .graph import Call, ChannelGraph, Kind, Layer, Maker
from .weights import Weight


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

    def call(self) -> Call:
        """Which channels it makes, and with which weight."""
        weight = self.weight
        parameter = weight.origin.parameter if weight.origin else weight.name
        return Call(weight.layer_name, parameter, self.first, self.rows)


@dataclass(eq=False)
class Wiring:
    """The builder of channel graphs: channels and edges so far.

    Attributes:
        blocks: applications of weights, in order.
        biases: (parameter, flat index, channel) of biases and batch norms, which are masked
            where the channel is zero.
        opaque_ops: operators without a rule, with how often they occurred.
        makers: the inputs and operators that have made channels.
    """

    blocks: list[Block] = field(default_factory=list)
    biases: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    opaque_ops: dict[str, int] = field(default_factory=dict)
    makers: list[Maker] = field(default_factory=list)
    _block_of: dict[fx.Node, Block] = field(default_factory=dict)
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
        self.made_by("zero", ZERO)
        self.add_channels(Kind.LIVE, 1)
        self.made_by("constant", CONSTANT)

    @property
    def num_channels(self) -> int:
        """Number of channels so far."""
        return self._num_channels

    def made_by(self, name: str, first: int) -> range:
        """Note what has made the channels from `first` on; returns their numbers."""
        made = range(first, self._num_channels)
        if made:
            self.makers.append(Maker(name, first, len(made)))
        return made

    def add_channels(self, kind: Kind, count: int) -> Tensor:
        """See `Builder`."""
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
        """See `Builder`."""
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
        self,
        call: Convolution | Linear,
        weight: Weight,
        bias: Bias | None,
        sources: Tensor,
        gain: Tensor,
    ) -> Tensor:
        """See `Builder`. A bias that masks cannot drop makes its channels live."""
        groups, columns = sources.shape
        rows = call.node.meta["val"].shape[1]
        group = np.arange(rows, dtype=np.int64) // (rows // groups)
        first, start = self._num_channels, self._num_lengths
        block = Block(weight, first, rows, columns, start, gain.numpy(), np.ones(rows))
        block.biased = bias is not None
        self.blocks.append(block)
        self._block_of[call.node] = block
        live = bias is not None and bias.masks is None and bool(bias.at_zero.any())
        ids = self._append(
            Kind.LIVE if live else Kind.SUM,
            np.full(rows, columns, dtype=np.int64),
            self._num_sources + group * columns,
            self._num_lengths + np.arange(rows, dtype=np.int64) * columns,
        )
        self._add_sources(sources.reshape(-1).numpy())
        self._num_lengths += rows * columns
        self._attach(bias, ids)
        return ids

    def affine(self, call: BatchNorm, flow: Flow, affine: Affine) -> Flow:
        """See `Builder`: folded into the convolution before if that feeds nothing else.

        Else its scale is a gain. Constant channels are dropped, if that can be done by masking.
        """
        scale, constant = affine.scale.abs(), affine.constant
        if call.data in self._block_of and len(call.data.users) == 1:
            self._block_of[call.data].gain_out *= scale.reshape(-1).numpy()
        else:
            flow = make_flow(flow.ids, flow.gain * scale, flow.shape)
        if affine.bias.masks is not None and constant.any():
            flow = self.derive(Kind.DEAD, flow, constant)
        return self.shift(flow, affine.bias)

    def shift(self, flow: Flow, bias: Bias) -> Flow:
        """See `Builder`. The bias is dropped with the channel where that can be done by masking.

        Where it cannot, and is not zero, a new channel is made that is live.
        """
        nonzero = reduce_to((bias.at_zero != 0).cpu(), flow.ids, torch.any)
        shape = torch.broadcast_shapes(flow.ids.shape, nonzero.shape)
        ids = flow.ids.expand(shape)
        live = nonzero.expand(shape) & ((ids == ZERO) | torch.tensor(bias.masks is None))
        if live.any():
            gain = flow.gain.expand(torch.broadcast_shapes(flow.gain.shape, shape))
            flow = self.derive(Kind.LIVE, make_flow(ids, gain, flow.shape), live)
        self._attach(bias, ids)
        return flow

    def _attach(self, bias: Bias | None, ids: Tensor) -> None:
        """Note which elements of parameters are biases of these channels."""
        for parameter, index in (bias and bias.masks) or []:
            index, channels = torch.broadcast_tensors(index, ids)
            usable = (channels != ZERO) & (channels != CONSTANT)
            self.biases.append((parameter, index[usable], channels[usable]))

    def derive(self, kind: Kind, flow: Flow, where: Tensor | None = None) -> Flow:
        """See `Builder`."""
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
        """See `Builder`."""
        key, ids, gains = meet(flows, shape)
        new = self.add_rows(
            kind,
            key.reshape(-1).repeat(len(flows)).numpy(),
            torch.cat([tensor.reshape(-1) for tensor in ids]).numpy(),
            torch.cat([tensor.reshape(-1) for tensor in gains]).numpy(),
            int(key.max()) + 1 if key.numel() else 0,
        )
        return make_flow(new[key], scalar_gain(len(shape)), shape)

    def merge(self, flow: Flow, dims: Sequence[int]) -> Flow:
        """See `Builder`."""
        if flow.varies_only(dims):
            return flow
        rank = len(flow.shape)
        ids, gain = torch.broadcast_tensors(flow.ids, flow.gain)
        kept = [ids.shape[dim] if dim in [d % rank for d in dims] else 1 for dim in range(rank)]
        count = int(np.prod(kept))
        target = torch.arange(count).reshape(kept).expand(ids.shape).reshape(-1)
        sources, lengths = ids.reshape(-1).numpy(), gain.reshape(-1).numpy()
        new = self.add_rows(Kind.SUM, target.numpy(), sources, lengths, count)
        return make_flow(new.reshape(kept), scalar_gain(rank), flow.shape)

    def hub(self, channels: Tensor) -> Tensor:
        """See `Builder`. Along its edges, of length 0, no chain runs."""
        return self._hub(channels, 0.0)

    def opaque(self, operator: str, channels: Tensor) -> Tensor:
        """See `Builder`. Its edges have length 1."""
        self.opaque_ops[operator] = self.opaque_ops.get(operator, 0) + 1
        hub = self._hub(channels, 1.0)
        self._opaque.append(int(hub))
        return hub

    def _hub(self, channels: Tensor, length: float) -> Tensor:
        sources = distinct(channels)[0].numpy()
        lengths = np.full(len(sources), length)
        return self.add_rows(Kind.LIVE, np.zeros_like(sources), sources, lengths, 1)

    def rows(self) -> Callable[[int], NDArray[np.int32]]:
        """A function from a channel to the channels that feed it."""
        sizes, starts = np.concatenate(self._sizes), np.concatenate(self._source_start)
        sources = np.concatenate([np.zeros(0, dtype=np.int32), *self._sources])
        return lambda channel: sources[starts[channel] : starts[channel] + sizes[channel]]

    def is_read(self) -> NDArray[np.bool_]:
        """Which channels feed others, shape (channels,)."""
        read = np.zeros(self._num_channels, dtype=bool)
        for sources in self._sources:
            read[sources] = True
        return read

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
            ties=self._ties(),
            alive=~pruned.numpy(),
            layers=tuple(layers),
            calls=tuple(block.call() for block in self.blocks),
            makers=tuple(self.makers),
        )

    def _ties(self) -> NDArray[np.int32]:
        """Channels that share a bias, connected components numbered by their first channel."""
        import scipy.sparse.csgraph  # here, because it takes a third of the time to import fxlean

        uses: defaultdict[str, list[list[Tensor]]] = defaultdict(list)
        for name, *part in self.biases:
            uses[name].append(part)
        pairs = []
        for parts in uses.values():
            index, ids = (torch.cat(tensors).numpy() for tensors in zip(*parts, strict=True))
            order = np.argsort(index, kind="stable")
            same = np.diff(index[order]) == 0
            pairs.append(np.stack([ids[order][:-1][same], ids[order][1:][same]]))
        left, right = np.concatenate([np.zeros((2, 0), dtype=np.int64), *pairs], axis=1)
        shape = (self._num_channels, self._num_channels)
        links = scipy.sparse.coo_array((np.ones(len(left)), (left, right)), shape=shape)
        _, component = scipy.sparse.csgraph.connected_components(links, directed=False)
        _, first = np.unique(component, return_index=True)
        ties: NDArray[np.int32] = first[component].astype(np.int32)
        return ties

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
