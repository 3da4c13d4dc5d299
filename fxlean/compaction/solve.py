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


def solve(
    slots: Slots, tied: Collection[str] = (), *, pinned: bool = False, fill: bool = False
) -> Kept:
    """Which slots must be kept.

    Args:
        slots: of a model.
        tied: diagonal layers that keep the same channels of source and result.
        pinned: keep all slots, so that layers only change inside.
        fill: keep a few more where that is faster, see `fill_up`.
    """
    label = components(slots, tied)
    kept = torch.full((int(label.max()) + 1 if len(label) else 0,), pinned)
    for numbers in slots.pinned:
        kept[label[numbers]] = True
    ends = [(label[a.source.slots], label[a.result.slots]) for a in slots.applications]
    layers = [*zip(slots.applications, ends, map(torch.cat, ends), strict=True)]
    looked = dict.fromkeys(slots.applications, -1)  # how many of both ends were kept then
    changed = True
    while changed:
        changed = False
        for applied, (source, result), both in reversed(layers):
            count = int(kept[both].sum())
            if count != looked[applied]:
                changed, looked[applied] = True, count
                _keep_needed(applied, kept, source, result, fill=fill)
    return lambda numbers: kept[label[numbers]]


def _keep_needed(
    applied: Application, kept: Tensor, source: Tensor, result: Tensor, *, fill: bool
) -> None:
    """Keep what the results of a layer need; `source` and `result` are their components."""
    rows = kept[result]
    read = applied.columns_read(rows & ~applied.result.zero)
    kept[source[read]] = True
    present = kept[source]
    if not (rows.any() and present.any() and (read.any() or applied.groups == 1)):
        row, column = _at_least_one(applied, rows, present)
        kept[result[row]] = True
        kept[source[column]] = True
    elif fill and (applied.groups == 1 or applied.diagonal):
        # A diagonal layer would have to place zeros where it reads nothing.
        others = ~rows if applied.groups == 1 else present
        kept[result[fill_up(rows, others)]] = True


def is_ragged(slots: Slots, kept: Kept) -> bool:
    """Whether kernels are zero between channels that must be kept and are not always zero.

    Where single kernels were pruned, how many channels happen to be left of a layer can make it
    slow, so that a few more stay. Where whole channels were, somebody chose; a channel that no
    kernel of a layer reads tells nothing, for it may be zero from the start.
    """
    left = zero = 0
    for applied in slots.applications:
        rows = kept(applied.result.slots) & ~applied.result.zero
        columns = kept(applied.source.slots) & ~applied.source.zero
        found = np.count_nonzero(applied.nonzero.numpy()[rows.numpy()], axis=0)
        found = found[columns.numpy()] if applied.groups == 1 else found
        found = found[found > 0]
        left += len(found) * int(rows.sum())
        zero += len(found) * int(rows.sum()) - int(found.sum())
    return zero > RAGGED * left


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
