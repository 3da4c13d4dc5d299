"""Slots: the places along dimension 1 of every value, and which of them stand or fall together.

An addition, an activation or a pooling treats its channels one by one, so its operands and its
result must keep the same channels: their slots share a number, or are linked. A convolution, a
batch norm and a linear layer read some slots and write others; these calls are where a network
can be cut to size. Whatever else reads or writes a value pins its slots: they stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

Kept = Callable[[Tensor], Tensor]  # from slot numbers to True where they are kept
WIDTH = 16  # channels that vector units and tensor cores take at a time


@dataclass(frozen=True, eq=False)
class Value:
    """The channels of one value along its dimension 1.

    Attributes:
        slots: slot numbers, shape (channels,).
        zero: shape (channels,), True where the value is zero for every input.
    """

    slots: Tensor
    zero: Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """One application of a layer that reads slots and writes others.

    Attributes:
        layer: name of the module.
        source, result: the values that it reads and writes.
        alive: shape (rows, columns of a group), True where the weight is not zero.
        groups: of the layer; a batch norm has one for each channel.
        size: elements of one channel in the source, and in the result.
        work: multiply-accumulates of one kernel; 0 for a batch norm.
    """

    layer: str
    source: Value
    result: Value
    alive: Tensor
    groups: int
    size: tuple[int, int]
    work: int

    @property
    def diagonal(self) -> bool:
        """Whether every channel of the result depends on its own channel of the source alone."""
        return self.groups == len(self.alive) == len(self.source.slots)

    def columns_read(self, rows: Tensor) -> Tensor:
        """The source channels that these rows (True where wanted) depend on, shape (columns,)."""
        grouped = self.alive.reshape(self.groups, -1, self.alive.shape[1])
        wanted = rows.reshape(self.groups, -1, 1)
        read = (grouped & wanted).any(1).reshape(-1)
        # In groups a channel that is zero is read as well: its group may have a bias.
        return read & ~self.source.zero if self.groups == 1 else read


@dataclass(eq=False)
class Slots:
    """All slots of a model while its graphs are walked.

    Attributes:
        calls: applications of layers, in order.
        refused: layers that are used in a way that does not let them shrink.
        strangers: how many convolutions with pruned kernels belong to no layer.
    """

    calls: list[Call] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    strangers: int = 0
    _count: int = 0
    _links: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _pinned: list[Tensor] = field(default_factory=list)

    def new(self, count: int) -> Tensor:
        """New slots, shape (count,)."""
        self._count += count
        return torch.arange(self._count - count, self._count)

    def fresh(self, count: int) -> Value:
        """A value of new slots that cannot be removed."""
        slots = self.new(count)
        self.pin(slots)
        return Value(slots, torch.zeros(count, dtype=torch.bool))

    def link(self, left: Tensor, right: Tensor) -> None:
        """Keep or remove these slots together, pair by pair."""
        self._links.append((left, right))

    def link_groups(self, slots: Tensor, groups: int) -> None:
        """Keep or remove all slots of a group together."""
        members = slots.reshape(groups, -1)
        self.link(members[:, :-1].reshape(-1), members[:, 1:].reshape(-1))

    def pin(self, slots: Tensor) -> None:
        """Never remove these slots."""
        self._pinned.append(slots)

    def solve(self, tied: Collection[str] = (), *, pinned: bool = False) -> Kept:
        """Which slots must be kept.

        Args:
            tied: diagonal layers that keep the same channels of source and result.
            pinned: keep all slots, so that layers only change inside.
        """
        label = self.components(tied)
        kept = torch.full((int(label.max()) + 1 if len(label) else 0,), pinned)
        for slots in self._pinned:
            kept[label[slots]] = True
        before = -1
        while before != int(kept.sum()):
            before = int(kept.sum())
            for call in reversed(self.calls):
                rows = kept[label[call.result.slots]]
                read = call.columns_read(rows & ~call.result.zero)
                kept[label[call.source.slots[read]]] = True
                present = kept[label[call.source.slots]]
                if not (rows.any() and present.any() and (read.any() or call.groups == 1)):
                    row, column = _at_least_one(call, rows, present)
                    kept[label[call.result.slots[row]]] = True
                    kept[label[call.source.slots[column]]] = True
                elif call.groups == 1 or call.diagonal:
                    # A diagonal layer would have to place zeros where it reads nothing.
                    others = ~rows if call.groups == 1 else present
                    kept[label[call.result.slots[fill_up(rows, others)]]] = True
        return lambda slots: kept[label[slots]]

    def components(self, tied: Collection[str] = ()) -> Tensor:
        """The number of the connected component of every slot, with some layers tied."""
        nothing = torch.zeros(0, dtype=torch.int64)
        ties = [(c.source.slots, c.result.slots) for c in self.calls if c.layer in tied]
        links = [(nothing, nothing), *self._links, *ties]
        left, right = (torch.cat(side).numpy() for side in zip(*links, strict=True))
        shape = (self._count, self._count)
        import scipy.sparse.csgraph  # here, because it takes a third of the time to import fxlean

        matrix = scipy.sparse.coo_array((np.ones(len(left)), (left, right)), shape=shape)
        _, component = scipy.sparse.csgraph.connected_components(matrix, directed=False)
        return torch.from_numpy(component.astype(np.int64))


def fill_up(chosen: Tensor, among: Tensor) -> Tensor:
    """The chosen channels, and more of those given where fewer would not be faster.

    All of them, if less than a tenth of the channels would go: a small layer can become slower
    by that. Else a few, where it makes a multiple of `WIDTH`: a convolution of 255 channels takes
    longer than one of 256, up to twice as long if depthwise.
    """
    count, others = int(chosen.sum()), among & ~chosen
    if 9 * int(others.sum()) < count:
        return chosen | others
    missing = -count % WIDTH
    if 3 * missing > count:
        return chosen
    return chosen | (others & (others.cumsum(0) <= missing))


def _at_least_one(call: Call, rows: Tensor, present: Tensor) -> tuple[int, int]:
    """A row of a dead layer and a column of its group, those that are there anyway if possible.

    There are no layers without channels, so a dead one keeps a row and a column of zeros.
    """
    height, width = len(rows) // call.groups, call.alive.shape[1]
    both = rows.reshape(-1, height).any(1) & present.reshape(-1, width).any(1)
    group = int((both if both.any() else rows.reshape(-1, height).any(1)).long().argmax())
    row = int(rows[group * height :][:height].long().argmax())
    column = int(present[group * width :][:width].long().argmax())
    return group * height + row, group * width + column


def joined(slots: Slots, values: Sequence[Value], zero: Tensor) -> Value:
    """The result of an operator on values that meet channel by channel."""
    first = values[0]
    for value in values[1:]:
        slots.link(first.slots, value.slots)
    return Value(first.slots, zero)
