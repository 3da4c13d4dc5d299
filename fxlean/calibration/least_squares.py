"""Least squares over the kept elements of a layer, by masked conjugate gradients.

For every output channel, over its kept elements `d` and, where it is free, a constant `b`,

    minimise  |conv(x, d) + b - r|^2 + ridge * sum of D * d^2

where D, the diagonal of the normal equations, makes the ridge independent of how channels are
scaled. All output channels are solved at once, each with its own step lengths, and the
convolution and the gradient of its weight are the only operators, so nothing is unfolded.

The iterates of every ridge are compared on held-out samples, and each output channel takes the
best one it has seen, or none. Stopping early is a regularisation of its own: what few samples
cannot tell is left as it was.

Source: preconditioned conjugate gradients on the normal equations, Björck (1996), "Numerical
Methods for Least Squares Problems", algorithm 7.4.1, for A^T A + ridge D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..channels.calls import argument
from ..channels.weights import Weight

aten = torch.ops.aten
STEPS = 6
RIDGES = (1e-3, 1e-1)


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
        return self._kernels(found)

    def _kernels(self, native: Tensor) -> Tensor:
        return self.weight.kernels(native) if self.options[3] else native

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
    names = ("stride", "padding", "dilation", "transposed", "output_padding")
    return Operator(weight, tuple(argument(node, name) for name in names))


@dataclass(frozen=True)
class Sample:
    """Part of the data: what the layer reads, (n, channels, *size), and what it lacks."""

    x: Tensor
    lacks: Tensor


@dataclass(frozen=True)
class Correction:
    """What to add to a layer.

    Attributes:
        kernels: shape (out, in, *size), zero where nothing is kept.
        bias: shape (out,), zero where it is not free.
        before, after: squared held-out error of every output channel, float64.
    """

    kernels: Tensor
    bias: Tensor
    before: Tensor
    after: Tensor


def correct(
    operator: Operator,
    mask: Tensor,
    free: Tensor,
    fit: Sequence[Sample],
    held: Sequence[Sample],
    *,
    steps: int = STEPS,
    ridges: Sequence[float] = RIDGES,
) -> Correction:
    """The correction of a layer that lowers its held-out error most, channel by channel.

    Args:
        operator: the layer.
        mask: True for elements that may change, shape (out, in, *size).
        free: True for output channels with a constant, shape (out,).
        fit: samples to solve for.
        held: samples to choose by.
        steps: conjugate gradient steps for each ridge.
        ridges: relative to the diagonal of the normal equations.
    """
    solver = _Solver(operator, mask, free, fit)
    zero = torch.zeros_like(solver.start)
    best = Best(zero, torch.zeros_like(solver.lacking), held)
    best.consider(zero, solver.lacking * free, [None] * len(held))
    for ridge in ridges:
        kernels, mean = zero, torch.zeros_like(solver.lacking)
        gradient = solver.start
        scaled = solver.precondition(gradient, ridge)
        direction, product = scaled, _dot(gradient, scaled)
        held_results: list[Tensor | None] = [None] * len(held)
        for _ in range(steps):
            curved, drift = solver.normal(direction, ridge)
            length = _ratio(product, _dot(direction, curved))
            kernels = kernels + _by_row(length, kernels) * direction
            mean = mean + length * drift
            gradient = gradient - _by_row(length, kernels) * curved
            held_results = best.moved(operator, held_results, direction, length)
            best.consider(kernels, (solver.lacking - mean) * free, held_results)
            scaled = solver.precondition(gradient, ridge)
            following = _dot(gradient, scaled)
            direction = scaled + _by_row(_ratio(following, product), scaled) * direction
            product = following
    return best.correction()


class _Solver:
    """The normal equations of all output channels.

    Attributes:
        start: the right-hand side, shape (out, in, *size).
        lacking: mean of what each output channel lacks, shape (out,).
    """

    def __init__(
        self, operator: Operator, mask: Tensor, free: Tensor, fit: Sequence[Sample]
    ) -> None:
        self._operator, self._fit = operator, fit
        self._mask = mask.to(fit[0].x.dtype)
        self._free = free.to(self._mask.dtype)
        self._count = sum(sample.lacks.numel() // len(free) for sample in fit)
        # One output channel for each group adds up what every element of a kernel reads.
        groups = operator.weight.groups
        single = self._mask.new_zeros(groups, *mask.shape[1:])
        total, squares = torch.zeros_like(single), torch.zeros_like(single)
        start, lacking = torch.zeros_like(self._mask), torch.zeros_like(self._free)
        for sample in fit:
            size = sample.lacks.shape
            ones = sample.x.new_ones(size[0], groups, *size[2:])
            total += operator.gradient(sample.x, ones, single)
            squares += operator.gradient(sample.x.square(), ones, single)
            start += operator.gradient(sample.x, sample.lacks, self._mask)
            lacking += _per_channel(sample.lacks)
        repeats = len(mask) // groups
        self._total = total.repeat_interleave(repeats, 0)
        self.lacking = lacking / self._count
        centred = squares.repeat_interleave(repeats, 0)
        centred -= _by_row(self._free, centred) * self._total.square() / self._count
        self._diagonal = centred.clamp(min=0) * self._mask
        self.start = self._centred(start, self.lacking)

    def _centred(self, gradient: Tensor, mean: Tensor) -> Tensor:
        """The gradient of what is left of a residual of this mean once free constants took it."""
        return (gradient - _by_row(mean * self._free, gradient) * self._total) * self._mask

    def normal(self, kernels: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """The normal equations applied to kernels, and the mean of every channel's result."""
        found, mean = torch.zeros_like(kernels), torch.zeros_like(self.lacking)
        for sample in self._fit:
            result = self._operator.apply(sample.x, kernels)
            mean += _per_channel(result)
            found += self._operator.gradient(sample.x, result, kernels)
        mean /= self._count
        return self._centred(found, mean) + ridge * self._diagonal * kernels, mean

    def precondition(self, gradient: Tensor, ridge: float) -> Tensor:
        """The gradient divided by the diagonal, zero where that is."""
        return _ratio(gradient, self._diagonal * (1 + ridge))


class Best:
    """The best correction of every output channel so far, by its error on held-out samples."""

    def __init__(self, kernels: Tensor, bias: Tensor, held: Sequence[Sample]) -> None:
        self._kernels, self._bias, self._held = kernels.clone(), bias.clone(), held
        squares = [_per_channel(sample.lacks.double().square()) for sample in held]
        self._before = torch.stack(squares).sum(0)
        self._error = self._before.clone()

    def moved(
        self,
        operator: Operator,
        results: Sequence[Tensor | None],
        direction: Tensor,
        length: Tensor,
    ) -> list[Tensor | None]:
        """The results on held-out samples after a step."""
        found: list[Tensor | None] = []
        for sample, result in zip(self._held, results, strict=True):
            step = operator.apply(sample.x, _by_row(length, direction) * direction)
            found.append(step if result is None else result + step)
        return found

    def consider(self, kernels: Tensor, bias: Tensor, results: Sequence[Tensor | None]) -> None:
        """Take over what is better, channel by channel."""
        error = torch.zeros_like(self._error)
        for sample, result in zip(self._held, results, strict=True):
            left = sample.lacks if result is None else sample.lacks - result
            shift = bias.reshape(-1, *[1] * (left.dim() - 2))
            error += _per_channel((left - shift).double().square())
        better = error < self._error
        self._kernels[better], self._bias[better] = kernels[better], bias[better]
        self._error[better] = error[better]

    def correction(self) -> Correction:
        """What was best."""
        return Correction(self._kernels, self._bias, self._before, self._error)


def _per_channel(values: Tensor) -> Tensor:
    """Sums over everything but dimension 1."""
    return values.sum([dim for dim in range(values.dim()) if dim != 1])


def _by_row(values: Tensor, like: Tensor) -> Tensor:
    """One value for each row of a tensor, ready to multiply it."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Scalar products of the rows, shape (rows,)."""
    return (left * right).flatten(1).sum(1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotients, 0 where the denominator is not positive."""
    positive = denominator > 0
    return torch.where(
        positive, numerator / denominator.where(positive, denominator.new_ones(())), 0
    )
