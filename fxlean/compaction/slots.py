"""Slots: the places along the channels of every value, and which of them stand or fall together.

An addition, an activation or a pooling treats its channels one by one, so its operands and its
result must keep the same channels: their slots are one, or are linked. A convolution, a batch norm
and a linear layer read some slots and write others; these applications are where a network can be
cut to size. Whatever cannot do with fewer channels pins its slots: they stay.

`Slots` is a `Builder`, so the rules of pruning make them: what is a channel there is a slot here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..channels.builder import Affine, Bias
from ..channels.calls import BatchNorm, Convolution, Linear, nonzero_kernels
from ..channels.flow import Flow, distinct, make_flow, meet, reduce_to, scalar_gain
from ..channels.graph import Kind
from ..channels.weights import Weight


@dataclass(frozen=True, eq=False)
class Value:
    """The channels that a layer reads or writes, one by one.

    Attributes:
        slots: slot numbers, shape (channels,).
        zero: shape (channels,), True where the value is zero for every input.
    """

    slots: Tensor
    zero: Tensor


@dataclass(frozen=True, eq=False)
class Application:
    """One application of a layer that reads slots and writes others.

    Attributes:
        call: of the operator.
        layer: name of the module.
        weight: name of the parameter; "" for a batch norm.
        source, result: the values that it reads and writes.
        nonzero: shape (rows, columns of a group), True where the weight is not zero.
        groups: of the layer; a batch norm has one for each channel.
        size: elements of one channel in the source, and in the result, for one sample.
        work: multiply-accumulates of one kernel for one sample; 0 for a batch norm.
    """

    call: Convolution | Linear | BatchNorm
    layer: str
    weight: str
    source: Value
    result: Value
    nonzero: Tensor
    groups: int
    size: tuple[int, int]
    work: int

    @property
    def form(self) -> tuple[object, ...]:
        """Equal for calls with the same kernels in the same way, on as many channels."""
        transposed = getattr(self.call, "transposed", False)
        return self.weight, transposed, self.groups, len(self.source.slots), len(self.result.slots)

    @property
    def diagonal(self) -> bool:
        """Whether every channel of the result depends on its own channel of the source alone."""
        return self.groups == len(self.nonzero) == len(self.source.slots)

    def columns_read(self, rows: Tensor) -> Tensor:
        """The source channels that these rows (True where wanted) depend on, shape (columns,)."""
        # In numpy, whose `any` takes a thirtieth of the time of torch's, here and below.
        if self.groups == 1:
            return torch.from_numpy(self.nonzero.numpy()[rows.numpy()].any(0)) & ~self.source.zero
        # In groups a channel that is zero is read as well: its group may have a bias.
        grouped = (self.nonzero & rows[:, None]).reshape(self.groups, -1, self.nonzero.shape[1])
        return torch.from_numpy(grouped.numpy().any(1).reshape(-1))


@dataclass(eq=False)
class Slots:
    """All slots of a model while its graphs are walked.

    Attributes:
        batch: number of samples in the traced values.
        applications: of layers, in order.
        tensors: parameters and buffers of element-wise operators, by name: for each use, the
            dimension that lies along channels, and their slots.
        groups: of the group norms, by layer: how many, and the slots of all channels.
        refused: layers that are used in a way that does not let them shrink.
        strangers: how many convolutions with pruned kernels belong to no layer.
        count: of the slots; they are numbered from 0.
        links: pairs of slots that stay or go together.
        pinned: slots that stay.
        pinned_by: for each entry of `pinned`, what was walked then.
        walked: the operator that is walked, or what else may pin: "constant", "input", "output".
        assumed: whether sizes in the code were taken to follow the number of channels.
    """

    batch: int = 1
    applications: list[Application] = field(default_factory=list)
    tensors: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    groups: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    strangers: int = 0
    count: int = 0
    links: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    pinned: list[Tensor] = field(default_factory=list)
    pinned_by: list[str] = field(default_factory=list)
    walked: str = "constant"
    assumed: bool = False
    _zero: Tensor = field(default_factory=lambda: torch.zeros(1024, dtype=torch.bool))

    def __post_init__(self) -> None:
        self.add_channels(Kind.DEAD, 1)
        self.add_channels(Kind.LIVE, 1)

    def new(self, zero: Tensor) -> Tensor:
        """New slots, shape (count,), from whether each of them is always zero."""
        first, self.count = self.count, self.count + len(zero)
        while len(self._zero) < self.count:
            self._zero = torch.cat([self._zero, torch.zeros_like(self._zero)])
        self._zero[first : self.count] = zero
        return torch.arange(first, self.count)

    def is_zero(self, slots: Tensor) -> Tensor:
        """Which of these slots are zero for every input."""
        return self._zero[slots]

    def set_zero(self, slots: Tensor) -> None:
        """These slots are zero for every input."""
        self._zero[slots] = True

    def link(self, left: Tensor, right: Tensor) -> None:
        """Keep or remove these slots together, pair by pair."""
        self.links.append((left.reshape(-1), right.reshape(-1)))

    def link_groups(self, slots: Tensor, groups: int) -> None:
        """Keep or remove all slots of a group together."""
        members = slots.reshape(groups, -1)
        self.link(members[:, :-1], members[:, 1:])

    def pin(self, slots: Tensor) -> None:
        """Never remove these slots."""
        self.pinned.append(slots.reshape(-1))
        self.pinned_by.append(self.walked)

    def add_channels(self, kind: Kind, count: int) -> Tensor:
        """See `Builder`: pinned, for nothing here makes them."""
        slots = self.new(torch.full((count,), kind == Kind.DEAD))
        self.pin(slots)
        return slots

    def add_rows(
        self,
        kind: Kind,
        targets: NDArray[np.int64],
        sources: NDArray[np.int64],
        lengths: NDArray[np.float64],
        count: int,
    ) -> Tensor:
        """See `Builder`: pinned, and so is what they depend on."""
        self.pin(torch.from_numpy(sources))
        return self.add_channels(Kind.LIVE, count)

    def add_block(
        self,
        call: Convolution | Linear,
        weight: Weight,
        bias: Bias | None,
        sources: Tensor,
        gain: Tensor,
    ) -> Tensor:
        """See `Builder`: an application of its layer; pinned if it has none that can be cut."""
        nonzero = nonzero_kernels(call, weight.value)
        slots = sources.reshape(-1) if weight.columns is None else sources[0, weight.columns]
        if weight.layer is None:
            if weight.columns is None:
                self.strangers += not nonzero.all()
            self.pin(slots)
            return self.add_channels(Kind.LIVE, len(nonzero))
        source = Value(slots, self.is_zero(slots))
        grouped = nonzero.reshape(call.groups, -1, nonzero.shape[1])
        fed = grouped & ~source.zero.reshape(call.groups, 1, -1)
        zero = ~torch.from_numpy(fed.numpy().any(2).reshape(-1))
        if bias is not None:
            constant = bias.at_zero.ne(0).cpu()
            zero &= ~constant
            nonzero = nonzero if call.groups == 1 else nonzero | constant[:, None]
        result = Value(self.new(zero), zero)
        if call.groups > 1:
            self.link_groups(slots, call.groups)
            self.link_groups(result.slots, call.groups)
        work = call.positions * weight.value.shape[2:].numel() // self.batch
        self._apply(call, weight.layer, weight.name, source, result, nonzero, call.groups, work)
        return result.slots

    def affine(self, call: BatchNorm, flow: Flow, affine: Affine) -> Flow:
        """See `Builder`: an application of its layer, of which a channel may be zero for good.

        Without parameters it leaves a zero channel zero. An instance norm has the channels of all
        samples side by side.
        """
        if not any(call.parameters):
            return flow
        channels = len(affine.scale.reshape(-1)) // call.samples
        slots = flow.ids.reshape(-1).expand(flow.shape[1]).reshape(call.samples, channels)
        if affine.layer is None or not torch.equal(slots, slots[:1].expand_as(slots)):
            self.pin(slots)
            result = self.add_channels(Kind.LIVE, channels)
        else:
            source = Value(slots[0], self.is_zero(slots[0]))
            shifted = affine.bias.at_zero.reshape(-1)[:channels] != 0
            nonzero = (affine.scale.reshape(-1)[:channels] != 0) | shifted
            zero = ~nonzero | (source.zero & ~shifted)
            result = self.new(zero)
            value = Value(result, zero)
            self._apply(call, affine.layer, "", source, value, nonzero[:, None], channels, 0)
        ids = result.repeat(call.samples).reshape(1, -1, *[1] * (len(flow.shape) - 2))
        return make_flow(ids, scalar_gain(len(flow.shape)), flow.shape)

    def _apply(
        self,
        call: Convolution | Linear | BatchNorm,
        layer: str,
        weight: str,
        source: Value,
        result: Value,
        nonzero: Tensor,
        groups: int,
        work: int,
    ) -> None:
        read, written = call.data.meta["val"], call.node.meta["val"]
        written = written[0] if isinstance(written, tuple | list) else written
        size = (
            read.numel() // len(source.slots) // self.batch,
            written.numel() // len(result.slots) // self.batch,
        )
        self.applications.append(
            Application(call, layer, weight, source, result, nonzero, groups, size, work)
        )

    def shift(self, flow: Flow, bias: Bias) -> Flow:
        """See `Builder`: what is not zero at zero is linked to what it is made of."""
        shifted = reduce_to((bias.at_zero != 0).cpu(), flow.ids, torch.any)
        if not shifted.any():
            return flow
        return self.derive(Kind.LIVE, flow, shifted)

    def derive(self, kind: Kind, flow: Flow, where: Tensor | None = None) -> Flow:
        """See `Builder`: linked to what they are made of."""
        where = torch.ones_like(flow.ids, dtype=torch.bool) if where is None else where
        ids, where = torch.broadcast_tensors(flow.ids, where)
        old, target = distinct(ids[where])
        new = self.new(self.is_zero(old) & (kind != Kind.LIVE))
        self.link(old, new)
        result = ids.clone()
        result[where] = new[target]
        return make_flow(result, scalar_gain(len(flow.shape)), flow.shape)

    def join(self, kind: Kind, flows: Sequence[Flow], shape: Sequence[int]) -> Flow:
        """See `Builder`: linked to what meets, but what is broadcast is pinned."""
        key, ids, _ = meet(flows, shape)
        place = torch.zeros(int(key.max()) + 1, dtype=torch.int64)
        place[key.reshape(-1)] = torch.arange(key.numel())
        zeros = torch.stack([self.is_zero(slots.reshape(-1)[place]) for slots in ids])
        zero = zeros.any(0) if kind == Kind.PRODUCT else zeros.all(0)
        new = self.new(zero & (kind != Kind.LIVE))
        result = make_flow(new[key], scalar_gain(len(shape)), shape)
        varying = [dim for dim in range(len(shape)) if result.varies(dim)]
        for flow, slots in zip(flows, ids, strict=True):
            sizes = (1,) * (len(shape) - len(flow.shape)) + flow.shape
            if any(sizes[dim] < shape[dim] for dim in varying):
                self.pin(slots)
            else:
                self.link(new[key], slots)
        return result

    def merge(self, flow: Flow, dims: Sequence[int]) -> Flow:
        """See `Builder`: pinned where they differ."""
        if flow.varies_only(dims):
            return flow
        self.pin(flow.ids)
        rank = len(flow.shape)
        kept = [n if dim in [d % rank for d in dims] else 1 for dim, n in enumerate(flow.ids.shape)]
        slots = self.add_channels(Kind.LIVE, int(np.prod(kept))).reshape(kept)
        return make_flow(slots, scalar_gain(rank), flow.shape)

    def hub(self, channels: Tensor) -> Tensor:
        """See `Builder`: pinned, and so is what it depends on."""
        self.pin(channels)
        return self.add_channels(Kind.LIVE, 1)

    def opaque(self, operator: str, channels: Tensor) -> Tensor:
        """See `Builder`: a hub like others."""
        return self.hub(channels)
