"""Which slots must be kept, from what is pinned, linked and read."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import torch
from torch import Tensor

from .slots import Application, Slots

Kept = Callable[[Tensor], Tensor]  # from slot numbers to True where they are kept
RAGGED = 0.01  # from this fraction of zero kernels on, the number of channels is an accident
WIDTH = 16  # channels that vector units and tensor cores take at a time


def solve(slots: Slots, tied: Collection[str] = (), *, pinned: bool = False) -> Kept:
    """Which slots must be kept, and more where that is faster.

    Where single kernels were pruned, how many channels happen to be left of a layer can make it
    slow, so that a few more stay, see `fill_up`. Where whole channels were, somebody chose.

    Args:
        slots: of a model.
        tied: diagonal layers that keep the same channels of source and result.
        pinned: keep all slots, so that layers only change inside.
    """
    label = components(slots, tied)
    kept = _needed(slots, label, pinned=pinned, fill=False)
    if not _is_whole(slots, kept[label]):
        kept = _needed(slots, label, pinned=pinned, fill=True)
    return lambda numbers: kept[label[numbers]]


def _needed(slots: Slots, label: Tensor, *, pinned: bool, fill: bool) -> Tensor:
    """Which components must be kept."""
    kept = torch.full((int(label.max()) + 1 if len(label) else 0,), pinned)
    for numbers in slots.pinned:
        kept[label[numbers]] = True
    before = -1
    while before != int(kept.sum()):
        before = int(kept.sum())
        for applied in reversed(slots.applications):
            rows = kept[label[applied.result.slots]]
            read = applied.columns_read(rows & ~applied.result.zero)
            kept[label[applied.source.slots[read]]] = True
            present = kept[label[applied.source.slots]]
            if not (rows.any() and present.any() and (read.any() or applied.groups == 1)):
                row, column = _at_least_one(applied, rows, present)
                kept[label[applied.result.slots[row]]] = True
                kept[label[applied.source.slots[column]]] = True
            elif fill and (applied.groups == 1 or applied.diagonal):
                # A diagonal layer would have to place zeros where it reads nothing.
                others = ~rows if applied.groups == 1 else present
                kept[label[applied.result.slots[fill_up(rows, others)]]] = True
    return kept


def _is_whole(slots: Slots, kept: Tensor) -> bool:
    """Whether hardly a kernel is zero between channels that are kept and not always zero."""
    left = zero = 0
    for applied in slots.applications:
        rows = kept[applied.result.slots] & ~applied.result.zero
        columns = kept[applied.source.slots] & ~applied.source.zero
        grouped = applied.nonzero[rows].reshape(-1, applied.nonzero.shape[1])
        found = grouped[:, columns] if applied.groups == 1 else grouped
        left += found.numel()
        zero += int((~found).sum())
    return zero <= RAGGED * left


def components(slots: Slots, tied: Collection[str] = ()) -> Tensor:
    """The number of the connected component of every slot, with some layers tied."""
    nothing = torch.zeros(0, dtype=torch.int64)
    ties = [(c.source.slots, c.result.slots) for c in slots.applications if c.layer in tied]
    links = [(nothing, nothing), *slots.links, *ties]
    left, right = (torch.cat(side).numpy() for side in zip(*links, strict=True))
    shape = (slots.count, slots.count)
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


def _at_least_one(applied: Application, rows: Tensor, present: Tensor) -> tuple[int, int]:
    """A row of a dead layer and a column of its group, those that are there anyway if possible.

    There are no layers without channels, so a dead one keeps a row and a column of zeros.
    """
    height, width = len(rows) // applied.groups, applied.nonzero.shape[1]
    both = rows.reshape(-1, height).any(1) & present.reshape(-1, width).any(1)
    group = int((both if both.any() else rows.reshape(-1, height).any(1)).long().argmax())
    row = int(rows[group * height :][:height].long().argmax())
    column = int(present[group * width :][:width].long().argmax())
    return group * height + row, group * width + column
