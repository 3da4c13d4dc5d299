"""Samples: how many a batch holds, which are held out, and the error of the outputs on those."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import inf, nan
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..channels.calls import aten, operator_of
from ..errors import ArgumentError
from ..ranks import summed
from ..tracing.inputs import Arguments, batch_size, call_on_copies, some_samples
from ..tracing.sandbox import running
from .batches import form_of
from .corrections import relative, spreads_of

HELD = 4  # one in so many samples is held out


def sample_counts(model: nn.Module, batches: Iterable[Arguments]) -> list[int]:
    """Number of samples of every batch; 1 if the model takes it only as a whole.

    A batch can be divided if, of its first sample alone, a convolution gets as many times less.
    Lists of images cannot, nor images without a batch dimension.
    """
    known: dict[str, int] = {}
    counts = []
    for batch in batches:
        form = form_of(batch)
        if form not in known:
            known[form] = batch_size(batch) if _can_be_divided(model, batch) else 1
        counts.append(known[form])
    return counts


def _can_be_divided(model: nn.Module, batch: Arguments) -> bool:
    size = batch_size(batch)
    if size == 1:
        return False
    whole = _convolved(model, batch)
    try:
        part = _convolved(model, some_samples(batch, slice(0, 1)))
    except Exception:  # whatever the model raises for what it rejects
        return False
    return not whole or any(all_ == size * one for all_, one in zip(whole, part, strict=False))


def _convolved(model: nn.Module, batch: Arguments) -> list[int]:
    """Of how many samples every convolution is, in a run on a batch."""
    seen = _Convolutions()
    with running(model), seen:
        call_on_copies(model, batch)
    return seen.sizes


class _Convolutions(TorchDispatchMode):
    """Notes how many samples convolutions get; below the calls that add a batch dimension."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator."""
        if operator_of(func) is aten.convolution:
            self.sizes.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))


def held_out(sizes: Sequence[int]) -> list[float]:
    """The fraction of every batch that is held out: a quarter, or each fourth of single samples.

    Two samples at least, of four or more: one alone has no variance that errors could be relative
    to.

    >>> held_out([8, 3])
    [0.25, 0.3333333333333333]
    >>> held_out([4])
    [0.5]
    >>> held_out([1, 1, 1, 1])
    [0.0, 1.0, 0.0, 1.0]
    """
    divisible = sum(size > 1 for size in sizes)
    if divisible:
        least = 2 if divisible == 1 else 1
        return [max(min(least, size // 2), size // HELD) / size for size in sizes]
    if len(sizes) < 2:
        raise ArgumentError(
            "batches hold one sample, or one batch that the model takes only as a whole. Pass at "
            "least two: one in four is held out to choose by."
        )
    every = spacing(len(sizes), HELD)
    return [float(number % every == every - 1) for number in range(len(sizes))]


def spacing(samples: int, most: int) -> int:
    """In how many single samples one is held out: `most`, or fewer where two would not be."""
    return min(most, max(2, samples // 2))


def output_error(
    found: Sequence[Sequence[Tensor]],
    wanted: Sequence[Sequence[Tensor]],
    sizes: Sequence[int],
    held: Sequence[float],
) -> tuple[float, float]:
    """Squared error of the outputs on held-out samples of all ranks, and what it is relative to.

    Args:
        found: outputs on every batch.
        wanted: those of the reference.
        sizes: numbers of samples of the batches.
        held: the fraction of each that is held out. What is not one entry, or as many, for each
            sample counts whole, if any are.

    Returns:
        The squared differences of tensors of equal shape where what is wanted is finite, added up:
        infinite if one is NaN, and NaN if there is nothing to compare. And the squared deviations
        of what is wanted.
    """
    error, compared, targets = 0.0, 0, defaultdict[tuple[int, int], list[Tensor]](list)
    for ours, theirs, size, part in zip(found, wanted, sizes, held, strict=True):
        for number, (mine, target) in enumerate(zip(ours, theirs, strict=False)):
            if mine.shape == target.shape:
                mine, target = (_last(values, size, part).double() for values in (mine, target))
                # Masked logits, infinite in both, are nothing to compare.
                mine, target = (v.where(target.isfinite(), 0) for v in (mine, target))
                error += float((mine - target).square().sum())
                compared += target.numel()
                targets[number, target.shape[1]].append(target)
    total, compared = summed(torch.tensor([error, compared], dtype=torch.float64)).tolist()
    spread = sum(float(spreads_of(parts).sum()) for parts in targets.values())
    return (nan if compared == 0 else inf if total != total else total), spread


def relative_output_error(
    found: Sequence[Sequence[Tensor]], wanted: Sequence[Sequence[Tensor]]
) -> float:
    """The root of the squared error of the outputs over their squared deviations."""
    return relative(*output_error(found, wanted, [1] * len(wanted), [1.0] * len(wanted)))


def _last(values: Tensor, size: int, part: float) -> Tensor:
    """The last part of the samples of a batch, of shape (entries, channels, ...)."""
    by_entry = values if values.dim() > 1 else values.reshape(-1, 1)
    whole = part > 0 and len(by_entry) % size
    return by_entry[0 if whole else round(len(by_entry) * (1 - part)) :]
