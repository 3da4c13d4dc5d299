"""What repair does at the norms that stand between its layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from ..channels.calls import aten, operator_of
from ..ranks import summed
from .corrections import OtherDataError, Pair, mean_of, visits
from .elements import Elements, elements_of
from .shares import data_of
from .side_by_side import Side
from .uses import Uses

Parts = list[tuple[Tensor, Tensor]]  # what a norm gives and what it should give, (entries, places)


def correct_norm(pairs: Sequence[Pair], uses: Uses, mean: Tensor, reference: Tensor) -> None:
    """Shift the running mean of a batch norm by as much as its input has shifted, in place.

    Only of channels whose held-out error falls.

    Args:
        pairs: at least one of them holds samples out.
        uses: the stops that are this batch norm.
        mean: the running mean, changed in place.
        reference: the running mean in the reference.
    """
    fit: list[Tensor] = []
    held: list[Tensor] = []
    for pair, node, twin in visits(pairs, uses):
        x = pair.mine.running.value(data_of(node))
        y = pair.theirs.running.value(data_of(twin))
        if x.shape != y.shape:
            raise OtherDataError
        dtype = torch.promote_types(x.dtype, torch.float32)
        for part, found in zip(pair.split(x.to(dtype) - y.to(dtype)), (fit, held), strict=True):
            found.append(part.transpose(0, 1).flatten(1))
    known = (mean - reference).to(dtype)
    shift = mean_of(fit).to(dtype) - known
    before, after = torch.zeros_like(known.double()), torch.zeros_like(known.double())
    for part in held:
        left = part - known[:, None]
        before += left.square().sum(1, dtype=torch.float64)
        after += (left - shift[:, None]).square().sum(1, dtype=torch.float64)
    mean += torch.where(summed(after) < summed(before), shift, 0).to(mean.dtype)


def correct_scale(model: nn.Module, pairs: Sequence[Pair], uses: Uses, shared: set[str]) -> None:
    """Fit scale and shift of a group or layer norm to what it gives in the reference, in place.

    Channels that have gone change what all others of their group are divided by. Only of entries
    whose held-out error falls.

    Args:
        model: whose norm it is.
        pairs: at least one of them holds samples out.
        uses: the stops that are this norm.
        shared: parameters that must stay, because others read them as well.
    """
    found = _scale_and_shift(model, pairs[0].mine, uses, shared)
    if found is None:
        return
    scale, shift = found
    fit, held = _given(pairs, uses, scale.index.numel())
    mean, wanted = (mean_of(parts) for parts in zip(*fit, strict=True))
    moved = [(given - mean[:, None], target - wanted[:, None]) for given, target in fit]
    spread = summed(torch.stack([given.square().sum(1) for given, _ in moved]).sum(0))
    common = summed(torch.stack([given.mul(target).sum(1) for given, target in moved]).sum(0))
    factor = torch.where(spread > 0, common / spread, 1.0)
    constant = wanted - factor * mean
    better = _error(held, factor, constant) < _error(held, torch.ones_like(factor), 0 * constant)
    grown, constant = (
        torch.where(better, change, 0).reshape(scale.index.shape)
        for change in (factor - 1, constant)
    )
    shift.add(grown * shift.value() + constant)
    scale.add(grown * scale.value())


def _scale_and_shift(
    model: nn.Module, side: Side, uses: Uses, shared: set[str]
) -> tuple[Elements, Elements] | None:
    """What a norm multiplies by and adds, if both may change."""
    found = []
    for node in side.stops[uses[0]].scale_and_shift:
        elements = elements_of(model, side.running.origin(node), side.running.value(node), shared)
        if isinstance(elements, str):
            return None
        found.append(elements)
    return found[0], found[1]


def _given(pairs: Sequence[Pair], uses: Uses, entries: int) -> tuple[Parts, Parts]:
    """What a norm gives in both networks: to solve for, and held out."""
    fit: Parts = []
    held: Parts = []
    for pair, node, _ in visits(pairs, uses):
        target, given = pair.theirs.run()[0], pair.mine.running.compute(node)[0]
        if given.shape != target.shape:
            raise OtherDataError
        halves = zip(pair.split(given), pair.split(target), strict=True)
        for (ours, theirs), found in zip(halves, (fit, held), strict=True):
            found.append((_by_entry(ours, node, entries), _by_entry(theirs, node, entries)))
    return fit, held


def _by_entry(values: Tensor, node: fx.Node, entries: int) -> Tensor:
    """By the channels of a group norm, or by all that a layer norm normalises; in float64."""
    if operator_of(node) is aten.native_group_norm:
        return values.transpose(0, 1).reshape(entries, -1).double()
    return values.reshape(-1, entries).T.double()


def _error(parts: Parts, factor: Tensor, constant: Tensor) -> Tensor:
    """Squared error of every entry once it is scaled and shifted, over all ranks."""
    errors = [
        (given * factor[:, None] + constant[:, None] - target).square().sum(1)
        for given, target in parts
    ]
    return summed(torch.stack(errors).sum(0))
