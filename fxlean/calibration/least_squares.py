"""Least squares over the kept elements of a layer, by masked conjugate gradients.

For every output channel, over its kept elements `d` and, where it is free, a constant `b`,

    minimise  |conv(x, d) + b - r|^2 + ridge * sum of D * d^2

where D, the diagonal of the normal equations, makes the ridge independent of how channels are
scaled. All output channels are solved at once, or of a very large layer some at a time, each with
its own step lengths.

The iterates of every ridge are compared on held-out samples, and each output channel takes the
best one it has seen, or none. Stopping early is a regularisation of its own: what few samples
cannot tell is left as it was.

Source: preconditioned conjugate gradients on the normal equations, Björck (1996), "Numerical
Methods for Least Squares Problems", algorithm 7.4.1, for A^T A + ridge D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .systems import Operator, Sample, System, systems

STEPS = 6
RIDGES = (1e-3, 1e-1)
LARGE = 2**23  # elements that are solved for at once; some 30 numbers are kept for each


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
    rows = max(1, LARGE // mask[0].numel())
    if operator.weight.groups > 1 or rows >= len(mask):
        return _solved(operator, mask, free, fit, held, steps, ridges)
    parts = []
    for start in range(0, len(mask), rows):
        span = slice(start, start + rows)
        solve, judge = (
            [Sample(sample.x, sample.lacks[:, span]) for sample in samples]
            for samples in (fit, held)
        )
        parts.append(_solved(operator, mask[span], free[span], solve, judge, steps, ridges))
    names = [field.name for field in fields(Correction)]
    return Correction(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _solved(
    operator: Operator,
    mask: Tensor,
    free: Tensor,
    fit: Sequence[Sample],
    held: Sequence[Sample],
    steps: int,
    ridges: Sequence[float],
) -> Correction:
    """The correction of all output channels at once."""
    products = steps * len(ridges)
    solved, judged = systems(operator, mask.shape, fit, held, products)
    equations = _Equations(solved, mask, free)
    best = _Best(judged, solved, free)
    for ridge in ridges:
        best.restart()
        gradient = equations.start
        scaled = equations.precondition(gradient, ridge)
        direction, product = scaled, _dot(gradient, scaled)
        for _ in range(steps):
            curved = equations.apply(direction, ridge)
            length = _ratio(product, _dot(direction, curved))
            best.move(_by_row(length, direction) * direction)
            gradient = gradient - _by_row(length, curved) * curved
            scaled = equations.precondition(gradient, ridge)
            following = _dot(gradient, scaled)
            direction = scaled + _by_row(_ratio(following, product), scaled) * direction
            product = following
    return best.correction()


class _Equations:
    """The normal equations over the kept elements; means count where there is no constant.

    Attributes:
        start: the right-hand side, shape (out, in, *size).
    """

    def __init__(self, system: System, mask: Tensor, free: Tensor) -> None:
        self._system, self._mask = system, mask.to(system.start.dtype)
        self._fixed = system.count * (~free).to(system.start.dtype)
        mean = system.mean
        self.start = (
            system.start + _by_row(self._fixed * system.lacking, mean) * mean
        ) * self._mask
        diagonal = system.diagonal + _by_row(self._fixed, mean) * mean.square()
        self._diagonal = diagonal * self._mask

    def apply(self, kernels: Tensor, ridge: float) -> Tensor:
        """The equations applied to kernels that are zero where nothing is kept."""
        mean = self._system.mean
        found = self._system.product(kernels)
        found = found + _by_row(self._fixed * _dot(mean, kernels), mean) * mean
        return found * self._mask + ridge * self._diagonal * kernels

    def precondition(self, gradient: Tensor, ridge: float) -> Tensor:
        """The gradient divided by the diagonal, zero where that is."""
        return _ratio(gradient, self._diagonal * (1 + ridge))


class _Best:
    """The best correction of every output channel so far, by its error on held-out samples."""

    def __init__(self, held: System, solved: System, free: Tensor) -> None:
        self._held, self._solved, self._free = held, solved, free
        self.restart()
        self._best, self._bias = self._kernels, torch.zeros_like(held.lacking)
        self._before = held.energy + held.count * held.lacking.double().square()
        self._error = self._before
        self._consider()

    def restart(self) -> None:
        """Begin again at no change."""
        self._kernels = self._image = torch.zeros_like(self._held.start)

    def move(self, step: Tensor) -> None:
        """Add to the kernels, and take over what is better, channel by channel."""
        self._kernels = self._kernels + step
        self._image = self._image + self._held.product(step)
        self._consider()

    def _consider(self) -> None:
        held, kernels = self._held, self._kernels
        bias = (self._solved.lacking - _dot(self._solved.mean, kernels)) * self._free
        shift = (held.lacking - _dot(held.mean, kernels) - bias).double()
        error = held.energy + _dot(kernels.double(), self._image.double() - 2 * held.start.double())
        error = error.clamp(min=0) + held.count * shift.square()
        better = error < self._error
        self._best = torch.where(_by_row(better, kernels), kernels, self._best)
        self._bias = torch.where(better, bias, self._bias)
        self._error = torch.where(better, error, self._error)

    def correction(self) -> Correction:
        """What was best."""
        return Correction(self._best, self._bias, self._before, self._error)


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
