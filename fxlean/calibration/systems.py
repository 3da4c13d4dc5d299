"""The normal equations of a layer on some samples, from a covariance or by convolutions.

Everything is centred: with a constant in every output channel, which least squares would find for
itself, only deviations from means count. What means do is told apart, for layers without one.

A covariance of what the taps of the kernels see costs one product of matrices, after which the
samples are not needed any more; where there are more taps than that is worth, the equations are
applied by the convolution and the gradient of its weight, and nothing is unfolded.

In a process group all sums are over the samples of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from ..channels.weights import Weight
from ..ranks import summed
from .contributions import by_channel, geometry_of, options_of, spans, windows

aten = torch.ops.aten
LARGEST = 2**24  # entries of a covariance
LEAST = 512  # positions at a time that are worth going over a covariance
NARROW = 16  # fewer output channels do not make a convolution cheaper


@dataclass(frozen=True)
class Operator:
    """A convolution without a bias, as a linear function of kernels (out, in, *size).

    A linear layer is one of size 1.
    """

    weight: Weight
    options: tuple[object, ...]  # stride, padding, dilation, transposed, output padding

    def apply(self, x: Tensor, kernels: Tensor) -> Tensor:
        """The result for an input of shape (n, channels, *size)."""
        groups = self.weight.groups
        result: Tensor = aten.convolution(x, self._native(kernels), None, *self.options, groups)
        return result

    def gradient(self, x: Tensor, y: Tensor, kernels: Tensor) -> Tensor:
        """The adjoint at `y`: the gradient of `(apply(x, kernels) * y).sum()`."""
        groups = self.weight.groups
        native = self._native(kernels)
        only = [False, True, False]
        found = aten.convolution_backward(y, x, native, None, *self.options, groups, only)[1]
        return self.weight.kernels(found) if self.options[3] else found

    def _native(self, kernels: Tensor) -> Tensor:
        return in_layout(self.weight, kernels) if self.options[3] else kernels


def in_layout(weight: Weight, kernels: Tensor) -> Tensor:
    """Kernels (out, in of the group, *size) in the layout of a weight; undoes `weight.kernels`."""
    if not weight.transposed:
        return kernels
    split = kernels.reshape(weight.groups, -1, *kernels.shape[1:])
    return split.transpose(1, 2).reshape(-1, split.shape[1], *kernels.shape[2:])


def operator_of(weight: Weight, node: fx.Node) -> Operator:
    """The operator of a call of a convolution or of a linear layer."""
    if weight.columns is not None:
        return Operator(weight, ([1], [0], [1], False, [0]))
    return Operator(weight, options_of(node))


@dataclass(frozen=True)
class Sample:
    """Part of the data: what the layer reads, (n, channels, *size), and what it lacks."""

    x: Tensor
    lacks: Tensor


@dataclass(frozen=True)
class System:
    """With A the map from kernels to results: A^T A and so on, of deviations from means.

    Attributes:
        count: number of positions.
        mean: of what each element of a kernel reads, shape (out, in, *size).
        diagonal: of A^T A, likewise.
        start: A^T applied to what is lacking, likewise.
        lacking: the mean of what each output channel lacks, shape (out,).
        energy: its squared deviations, shape (out,), float64.
        product: applies A^T A to kernels.
    """

    count: int
    mean: Tensor
    diagonal: Tensor
    start: Tensor
    lacking: Tensor
    energy: Tensor
    product: Callable[[Tensor], Tensor]


def systems(
    operator: Operator, shape: torch.Size, fit: Sequence[Sample], held: Sequence[Sample], steps: int
) -> tuple[System, System]:
    """The equations of two sets of samples, in the way that is cheaper for so many products.

    Args:
        operator: the layer.
        shape: of its kernels, (out, in of the group, *size).
        fit: samples.
        held: samples.
        steps: how often each of the two is applied.
    """
    rows, columns = max(shape[0], NARROW * operator.weight.groups), prod(shape[1:])
    positions = _positions([*fit, *held])
    entries = operator.weight.groups * columns**2
    by_covariance = positions * entries + 2 * steps * rows * columns**2
    by_convolution = 2 * steps * positions * rows * columns
    build = _covariance if by_covariance < by_convolution and entries <= LARGEST else _convolution
    return build(operator, shape, fit), build(operator, shape, held)


def _covariance(operator: Operator, shape: torch.Size, samples: Sequence[Sample]) -> System:
    """From the covariance of all that the kernels of a group see.

    Values are taken as deviations from the means of the first sample, so that no digits are lost.
    """
    groups, transposed = operator.weight.groups, bool(operator.options[3])
    axes = tuple(range(2, len(shape))) if transposed else ()
    first = samples[0]
    means = [_per_channel(t) / t[:, 0].numel() for t in (first.x, first.lacks)]
    parts = summed(first.x.new_ones(()))
    offset, middle = (summed(mean).reshape(groups, -1, 1) / parts for mean in means)
    offset = offset.repeat_interleave(prod(shape[2:]), 1)
    columns, rows = offset.shape[1], middle.shape[1]
    gram = offset.new_zeros(groups, columns, columns)
    cross = offset.new_zeros(groups, rows, columns)
    total, lacking, energy = (
        offset.new_zeros(groups, size, dtype=torch.float64) for size in (columns, rows, rows)
    )
    for seen, missing in _seen(operator, shape, samples):
        seen, missing = seen - offset, missing - middle
        gram.baddbmm_(seen, seen.mT)
        cross.baddbmm_(missing, seen.mT)
        total += seen.sum(-1)
        lacking += missing.sum(-1)
        energy += missing.double().square().sum(-1)
    count = _positions(samples)
    gram, cross, total, lacking, energy = map(summed, (gram, cross, total, lacking, energy))
    mean, lacking = total / count, lacking / count
    gram -= count * (mean[:, :, None] * mean[:, None, :]).to(gram.dtype)
    cross -= count * (lacking[:, :, None] * mean[:, None, :]).to(gram.dtype)
    energy -= count * lacking.square()

    def outward(values: Tensor) -> Tensor:
        """Values of shape (groups, rows, columns) as kernels."""
        return values.reshape(shape).flip(axes)

    def each(values: Tensor) -> Tensor:
        """Values of shape (groups, columns), the same for every row, as kernels."""
        return outward(values[:, None].expand(-1, rows, -1))

    def product(kernels: Tensor) -> Tensor:
        return outward(kernels.flip(axes).reshape(groups, rows, columns) @ gram)

    return System(
        count,
        each(mean.to(gram.dtype) + offset[..., 0]),
        each(gram.diagonal(dim1=1, dim2=2)),
        outward(cross),
        (lacking + middle[..., 0]).flatten().to(gram.dtype),
        energy.flatten().clamp(min=0),
        product,
    )


def _seen(
    operator: Operator, shape: torch.Size, samples: Sequence[Sample]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What kernels see and what is lacking, (groups, taps or rows, positions), part by part."""
    groups, geometry = operator.weight.groups, geometry_of(shape[2:], operator.options)
    axes, least = len(shape) - 2, LEAST * groups * prod(shape[1:])
    for sample in samples:
        view = windows(sample.x, geometry)
        for number, rows in spans(view, least):
            part, lacks = view[number, :, rows], sample.lacks[number, :, rows]
            seen = by_channel(part, axes)
            missing = lacks.transpose(0, 1).reshape(groups, lacks.shape[1] // groups, -1)
            yield seen.reshape(groups, -1, seen.shape[-1]), missing


def _convolution(operator: Operator, shape: torch.Size, samples: Sequence[Sample]) -> System:
    """With the convolution and the gradient of its weight as the only operators."""
    groups, x = operator.weight.groups, samples[0].x
    count = _positions(samples)
    lacking = torch.stack([_per_channel(sample.lacks.double()) for sample in samples]).sum(0)
    lacking = summed(lacking) / count
    # One output channel for each group adds up what every element of a kernel reads.
    single = x.new_zeros(groups, *shape[1:])
    total, squares, start = torch.zeros_like(single), torch.zeros_like(single), x.new_zeros(shape)
    energy = torch.zeros_like(lacking)
    for sample in samples:
        size = sample.lacks.shape
        ones = sample.x.new_ones(size[0], groups, *size[2:])
        left = sample.lacks - _along(lacking.to(x.dtype), sample.lacks)
        total += operator.gradient(sample.x, ones, single)
        squares += operator.gradient(sample.x.square(), ones, single)
        start += operator.gradient(sample.x, left, start)
        energy += _per_channel(left.double().square())
    total, squares, start, energy = map(summed, (total, squares, start, energy))
    mean = total / count

    def product(kernels: Tensor) -> Tensor:
        found = torch.zeros_like(kernels)
        shift = (kernels * each(mean)).flatten(1).sum(1)
        for sample in samples:
            result = operator.apply(sample.x, kernels)
            found += operator.gradient(sample.x, result - _along(shift, result), kernels)
        return summed(found)

    def each(values: Tensor) -> Tensor:
        return values.repeat_interleave(shape[0] // groups, 0)

    diagonal = (squares - mean * total).clamp(min=0)
    lacking = lacking.to(x.dtype)
    return System(count, each(mean), each(diagonal), start, lacking, energy, product)


def _positions(samples: Sequence[Sample]) -> int:
    """Number of positions of the result."""
    return int(summed(torch.tensor(sum(sample.lacks[:, 0].numel() for sample in samples))))


def _per_channel(values: Tensor) -> Tensor:
    """Sums over everything but dimension 1."""
    return values.sum([dim for dim in range(values.dim()) if dim != 1])


def _along(values: Tensor, like: Tensor) -> Tensor:
    """One value for each channel, dimension 1, of a tensor."""
    return values.reshape(-1, *[1] * (like.dim() - 2))
