"""How much variance each kernel of a layer contributes to its output channels.

Kernel (o, i) contributes the variance of `weight[o, i] * x[i]` over samples and positions. With
the covariance `R_i` of what the taps of a kernel see of channel `i`, that is `k^T R_i k`: exact,
with strides, dilation and padding, from one pass over the input whatever the number of kernels.
Kernels of more than `TAPS` taps are applied at `POSITIONS` random positions of each batch instead;
for a kurtosis of K the variance then has a relative standard error of sqrt((K - 1) / n) over n
positions in all: 2 % for normal values in one batch, at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..channels.calls import argument
from ..channels.weights import Weight
from .moments import Moments

TAPS = 128  # a covariance of 128 taps has 16,384 entries for each channel
POSITIONS = 4096
ELEMENTS = 2**23  # that are held at a time
CACHED = 2**19  # of patches on a CPU, which then stay in its caches


@dataclass(frozen=True)
class Geometry:
    """Where the kernels of a convolution look; one entry for each spatial axis."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]  # zeros added, or removed where negative
    after: tuple[int, ...]
    spread: tuple[int, ...]  # distance of the input's elements, for transposed convolutions


def options_of(node: fx.Node) -> tuple[Any, ...]:
    """Stride, padding, dilation, transposed and output padding of a call of `aten.convolution`."""
    names = ("stride", "padding", "dilation", "transposed", "output_padding")
    return tuple(argument(node, name) for name in names)


def geometry_of(size: Sequence[int], options: Sequence[Any]) -> Geometry:
    """The geometry of a convolution with these options; transposed ones as ordinary ones."""

    def each(given: Sequence[int]) -> tuple[int, ...]:
        return tuple(given) * len(size) if len(given) == 1 else tuple(given)

    stride, padding, dilation, more = (each(options[place]) for place in (0, 1, 2, 4))
    size, ones = tuple(size), (1,) * len(size)
    if not options[3]:
        return Geometry(size, stride, dilation, padding, padding, ones)
    before = tuple(d * (n - 1) - p for d, n, p in zip(dilation, size, padding, strict=True))
    after = tuple(width + extra for width, extra in zip(before, more, strict=True))
    return Geometry(size, ones, dilation, before, after, stride)


def windows(x: Tensor, geometry: Geometry) -> Tensor:
    """What the kernel sees at every position: a view of shape (n, channels, *positions, *size)."""
    axes = range(len(geometry.size))
    if any(step > 1 for step in geometry.spread):
        sizes = [(x.shape[2 + i] - 1) * geometry.spread[i] + 1 for i in axes]
        wide = x.new_zeros(*x.shape[:2], *sizes)
        _every(wide, geometry.spread).copy_(x)
        x = wide
    x = F.pad(x, [w for i in reversed(axes) for w in (geometry.before[i], geometry.after[i])])
    for i in axes:
        reach = geometry.dilation[i] * (geometry.size[i] - 1) + 1
        x = x.unfold(2 + i, reach, geometry.stride[i])
    return _every(x, geometry.dilation)


def _every(x: Tensor, steps: Sequence[int]) -> Tensor:
    """Every n-th element along the last axes, as a view."""
    for axis, step in enumerate(steps, x.dim() - len(steps)):
        index = [slice(None)] * axis + [slice(None, None, step)]
        x = x[tuple(index)]
    return x


class Contributions:
    """Collects what a layer reads, batch by batch, and says what its kernels contribute.

    Attributes:
        moments: of what the taps of each input channel see, or of what sampled kernels give.
    """

    def __init__(self, weight: Weight) -> None:
        kernels = weight.kernels(weight.value.detach())
        self._features: Tensor | None = None
        if weight.columns is not None:
            self._features = feature_table(weight.columns).to(kernels.device)
            kernels = F.pad(kernels, (0, 1))[:, self._features]
        elif weight.transposed:
            kernels = kernels.flip(list(range(2, kernels.dim())))
        out, columns, taps = kernels.flatten(2).shape
        grouped = kernels.reshape(weight.groups, out // weight.groups, columns, taps)
        # By input channel, shape (channels, out of the group, taps).
        self._kernels = grouped.transpose(1, 2).reshape(weight.groups * columns, -1, taps)
        self._groups, self._sampled = weight.groups, taps > TAPS
        self._generator = torch.Generator().manual_seed(0)
        shape = (self._kernels[..., 0].numel(), 1) if self._sampled else (len(self._kernels), taps)
        self.moments = Moments(*shape, kernels.device)

    def add(self, x: Tensor, node: fx.Node) -> None:
        """Take in the input of one call, of shape (n, channels, *size) or (n, features)."""
        if self._features is not None:
            axes, view = 1, F.pad(x, (0, 1))[:, self._features]
        else:
            size = argument(node, "weight").meta["val"].shape[2:]
            geometry = geometry_of(size, options_of(node))
            axes, view = len(geometry.size), windows(x, geometry)
        if self._sampled:
            self._add_sampled(view, axes)
            return
        for number, rows in spans(view):
            self.moments.add(by_channel(view[number, :, rows], axes))

    def _add_sampled(self, view: Tensor, axes: int) -> None:
        """Apply the kernels at random positions, or at all where there are few."""
        places = (view.shape[0], *view.shape[2 : view.dim() - axes])
        index = some_places(places, self._generator, view.device)
        at_once = max(1, ELEMENTS // max(1, self._kernels[..., 0].numel()))
        for number in range(0, len(index[0]), at_once):
            where = [i[number : number + at_once] for i in index]
            seen = view.movedim(1, len(places))[tuple(where)]  # (positions, channels, *size)
            results = self._kernels @ seen.flatten(2).permute(1, 2, 0)
            self.moments.add(results.reshape(-1, 1, results.shape[-1]))

    def variances(self) -> Tensor:
        """What each kernel contributes, shape (out, in of the group), float64, at least 0."""
        channels, rows, taps = self._kernels.shape
        if self._sampled:
            found = self.moments.covariance.reshape(channels, rows)
        else:
            at_once = max(1, ELEMENTS // (rows * taps))
            pairs = zip(
                self._kernels.split(at_once), self.moments.covariance.split(at_once), strict=True
            )
            found = torch.cat([((k.double() @ r) * k).sum(-1) for k, r in pairs])
        found = found.reshape(self._groups, -1, rows).transpose(1, 2)
        return found.reshape(self._groups * rows, -1).clamp(min=0)


def some_places(
    sizes: Sequence[int], generator: torch.Generator, device: torch.device
) -> list[Tensor]:
    """Indices of `POSITIONS` random places in a tensor of some sizes, or of all of fewer."""
    chosen = torch.randperm(prod(sizes), generator=generator)[:POSITIONS]
    return [index.to(device) for index in torch.unravel_index(chosen, tuple(sizes))]


def feature_table(columns: Tensor) -> Tensor:
    """The features of every channel of a linear layer, shape (channels, most features).

    Channels with fewer features than others are filled up with the number of features, as if
    there were one more that is zero.

    >>> feature_table(torch.tensor([0, 1, 1]))
    tensor([[0, 3],
            [1, 2]])
    """
    order, times = columns.argsort(stable=True), columns.bincount()
    table = torch.full((len(times), int(times.max())), len(columns))
    within = torch.arange(len(columns)) - (times.cumsum(0) - times)[columns[order]]
    table[columns[order], within] = order
    return table


def spans(view: Tensor, least: int = 1) -> Iterator[tuple[slice, slice]]:
    """Slices of samples and of the first axis of positions, as many as are held at a time.

    Args:
        view: patches, as `windows` returns them.
        least: about how many elements are worth the work on each slice.
    """
    elements = max(least, CACHED if view.device.type == "cpu" else ELEMENTS)
    each = max(1, view[0].numel())
    at_once = max(1, elements // each)
    rows = max(1, elements * view.shape[2] // each) if view.dim() > 3 else view.shape[2]
    for number in range(0, view.shape[0], at_once):
        for row in range(0, view.shape[2], rows):
            yield slice(number, number + at_once), slice(row, row + rows)


def by_channel(view: Tensor, axes: int) -> Tensor:
    """A view (n, channels, *positions, *size) as (channels, taps, all positions)."""
    first = view.dim() - axes
    order = [1, *range(first, view.dim()), 0, *range(2, first)]
    moved = view.permute(order)
    return moved.reshape(view.shape[1], prod(view.shape[first:]), -1)
