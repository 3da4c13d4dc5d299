"""Suprema of cosine polynomials, many at once: a coarse grid, then Newton steps uphill from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

_CPU_CHUNK = 2**20  # numbers in one intermediate array: stays in the cache
_GPU_CHUNK = 2**22  # enough to fill a GPU
_MATRIX_LIMIT = 2**20  # numbers in the Fourier matrix of an axis; above it, transform by FFT
# What follows was tuned on random kernels of many kinds, see the tests, to miss no maximum.
_DENSITY = (8, 8, 6)  # coarse grid points per turn of the longest lag, in 1-D, 2-D and 3-D
_SHIFT = (0.5, -0.55, -0.6)  # of the grid along each axis, in units of its spacing
_SLOPE = (2.0, 2.0, 1.0)  # how far blocks beside a higher point are marked down, for 1 to 3 axes
_PROMISE = 1.5  # how far a maximum may be above the point beside it, in gains of its first step
_SLACK = 0.05  # and how much farther, as a fraction of the highest value
_FIRST_STEP = (0.9, 0.85, 0.8)  # of the way to the estimated maximum, along each axis
_LONGEST_STEP = 0.75  # in units of the spacing
_NEWTON_STEPS = 12
_WAITING = 8  # chunks' worth of values around starts, before climbing from all of them


@dataclass(frozen=True)
class Coarse:
    """Half a turn of equally spaced frequencies, and a rim of one point around.

    Squared symbols are even, so zero and half turns are stationary, and may be minima. The grid
    is shifted away from them, not by half of its spacing along every axis, so that no point is
    as far from one maximum as from its mirror image.
    """

    lags: Tensor  # (lags, axes), in lexicographic order from zero on
    points: list[int]  # per turn, for each axis
    extents: list[int]  # number of points along each axis, the rim included
    transforms: list[Tensor | None]  # Fourier matrix of each axis; None where too large


class _Starts(NamedTuple):
    """Where to climb from, in units of the spacing."""

    kernel: Tensor  # (starts,)
    place: Tensor  # (axes, starts)
    step: Tensor  # a little less than to the estimated maximum, (axes, starts)
    gain: Tensor  # of the squared symbol by its slope, all the way there, (starts,)


def room(like: Tensor) -> int:
    """How many numbers an intermediate array may hold."""
    return _CPU_CHUNK if like.device.type == "cpu" else _GPU_CHUNK


def coarse_grid(lags: Tensor, like: Tensor) -> Coarse:
    """The grid to climb from, for lags of shape (lags, axes) that vary along some axis."""
    lags = lags[:, lags.amax(0) > 0]
    degrees = lags.amax(0).tolist()
    points = [_DENSITY[len(degrees) - 1] * m for m in degrees]
    half = points[0] // 2
    extents = [end + 2 for end in (half + half % 2, *points[1:])]
    transforms: list[Tensor | None] = []
    for axis, (m, n) in enumerate(zip(degrees, points, strict=True)):
        lag = _lags_along(axis, m)
        if len(lag) * extents[axis] > _MATRIX_LIMIT:
            transforms.append(None)
            continue
        place = torch.arange(-1, extents[axis] - 1, dtype=torch.double) + _SHIFT[axis]
        phase = 2 * math.pi / n * place[:, None] * lag
        cos, sin = phase.cos(), phase.sin()
        # Shape (part, place, lag, part), the parts being real and imaginary. Coefficients, which
        # the last axis reads, are real, and so are the values, which the first axis makes.
        parts = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)])
        parts = parts[: 2 if axis else 1, ..., : 2 if axis + 1 < len(points) else 1]
        transforms.append(parts.flatten(2).flatten(0, 1).to(like))
    return Coarse(lags, points, extents, transforms)


def _lags_along(axis: int, degree: int) -> Tensor:
    """The lags along an axis; the first axis has no negative ones."""
    return torch.arange(-degree if axis else 0, degree + 1)


def _coarse_values(squares: Tensor, coarse: Coarse) -> Tensor:
    """Squared symbols, shape (*extents, kernels)."""
    lags = [_lags_along(axis, m) for axis, m in enumerate(coarse.lags.amax(0).tolist())]
    sizes = [len(lag) for lag in lags]
    # Zeros take the places of the lags before zero.
    values = pad(squares, (0, 0, math.prod(sizes[1:]) // 2, 0))
    for axis in reversed(range(len(sizes))):
        matrix, before = coarse.transforms[axis], math.prod(sizes[:axis])
        if matrix is None:
            parts = 2 if axis + 1 < len(sizes) else 1
            values = _by_fft(
                values.reshape(before, sizes[axis], parts, -1), lags[axis], axis, coarse
            )
        else:
            values = matrix.expand(before, -1, -1) @ values.reshape(before, matrix.shape[1], -1)
    return values.reshape(*coarse.extents, -1)


def _by_fft(values: Tensor, lags: Tensor, axis: int, coarse: Coarse) -> Tensor:
    """What the Fourier matrix of an axis makes of values of shape (before, lags, parts, after)."""
    points = coarse.points[axis]
    phase = 2 * math.pi / points * _SHIFT[axis] * lags.to(values)
    shift = torch.complex(phase.cos(), phase.sin())[:, None]
    real, imaginary = pad(values, (0, 0, 0, 2 - values.shape[2])).unbind(2)
    numbers = torch.complex(real, imaginary) * shift
    spread = numbers.new_zeros(len(values), points, values.shape[-1])
    spread.index_copy_(1, (lags % points).to(values.device), numbers)
    place = torch.arange(-1, coarse.extents[axis] - 1) % points
    result = torch.fft.ifft(spread, dim=1, norm="forward")
    result = result.index_select(1, place.to(values.device))
    return (
        torch.stack([result.real, result.imag], 1).flatten(1, 2)
        if axis
        else result.real.contiguous()
    )


def suprema(squares: Tensor, coarse: Coarse) -> Tensor:
    """Maxima over all frequencies, shape (kernels,); NaN where a coefficient is.

    Args:
        squares: cosine coefficients of the squared symbols, shape (lags, kernels), of which none
            is negative anywhere.
        coarse: the grid for these lags.
    """
    bounds = squares.abs().sum(0)
    # Zero and half turns are stationary by symmetry, and often the maximum.
    odd = _box([2] * len(coarse.points)) @ coarse.lags.T % 2
    result = ((1 - 2 * odd).to(squares) @ squares).amax(0)
    # Where all cosines are one there is no more to gain, nor from NaN; constants are such.
    done = ~(result < bounds * (1 - 1e-6))
    result = torch.where(done, bounds, result)
    floor = torch.where(done, math.inf, result)
    count = max(1, room(squares) // math.prod(coarse.extents))
    found, waiting = [], 0
    for start in range(0, len(bounds), count):
        part = slice(start, start + count)
        kernel, place, around = _blocks(_coarse_values(squares[:, part], coarse), floor[part])
        found.append((kernel + start, place, around))
        waiting += around.numel()
        if waiting > _WAITING * room(squares) or start + count >= len(bounds):
            blocks = [torch.cat(each, -1) for each in zip(*found, strict=True)]
            found, waiting = [], 0
            _climb(result, squares, coarse, _starts(result, *blocks))
    return result


def _blocks(values: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of two points per axis in which a symbol may have its supremum, above a floor.

    Returns:
        Of each block, its kernel, shape (blocks,), its highest point, shape (axes, blocks), and
        the values there and around, shape (3 ** axes, blocks).
    """
    axes = values.dim() - 1
    scores = _scores(values)
    highest = torch.maximum(scores.flatten(0, -2).amax(0), floor)
    # Riesz: a T >= 0 of exponential type m has T(x + d) >= T(x) cos(m d / 2)^2 at its maximum x.
    nearest = math.cos(math.pi * axes / (2 * _DENSITY[axes - 1])) ** 2
    chosen = (scores > highest * nearest).view(-1).nonzero()[:, 0]
    block, kernel = chosen // scores.shape[-1], chosen % scores.shape[-1]
    strides = torch.tensor(values.stride()[:-1])
    origins, corners, around = 2 * _box(scores.shape[:-1]), _box([2] * axes), _box([3] * axes) - 1
    first = ((origins + 1) @ strides).to(chosen).index_select(0, block) + kernel
    jumps = (corners @ strides).to(chosen)
    corner = _take(values, first + jumps[:, None]).max(0).indices
    place = origins.T.to(chosen).index_select(1, block)
    place += corners.T.to(chosen).index_select(1, corner)
    here = first + jumps.index_select(0, corner)
    return kernel, place, _take(values, here + (around @ strides).to(chosen)[:, None])


def _scores(values: Tensor) -> Tensor:
    """Highest squared symbol of each block, less where a point beside the block is higher.

    Shape (*blocks, kernels). A block hardly ever has more than one local maximum.
    """
    inner = around = values
    for axis in range(values.dim() - 1):
        count = inner.shape[axis] - 2
        inner = _higher_of_pairs(inner.narrow(axis, 1, count), axis)
        around = _higher_of_pairs(around, axis)
        halves = (around.narrow(axis, start, count // 2) for start in range(2))
        around = torch.maximum(*halves)
    return torch.lerp(around, inner, 1 + _SLOPE[values.dim() - 2])


def _higher_of_pairs(values: Tensor, axis: int) -> Tensor:
    """Of places 0 and 1, 2 and 3, and so on along an axis."""
    pairs = values.unflatten(axis, (-1, 2))
    return torch.maximum(pairs.select(axis + 1, 0), pairs.select(axis + 1, 1))


def _box(sizes: Sequence[int]) -> Tensor:
    """All places in a box, in order, shape (places, axes)."""
    ranges = [torch.arange(size) for size in sizes]
    return torch.cartesian_prod(*ranges).view(-1, len(sizes))


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Values at places in memory; on a CPU far faster than indexing."""
    return values.view(-1).index_select(0, index.view(-1)).view(index.shape)


def _starts(result: Tensor, kernel: Tensor, place: Tensor, around: Tensor) -> _Starts:
    """Points next to maxima that may be the highest; raises the result to the values there."""
    axes = len(place)
    slope, bend = (_differences(axes).to(around) @ around).split([axes, axes**2])
    step = _step(slope, bend.view(axes, axes, -1))
    gain = (slope * step).sum(0)
    value = around[len(around) // 2]
    result.scatter_reduce_(0, kernel, value, "amax")
    # The parabola through the values around rises by half of the gain only.
    keep = value + _PROMISE * gain > (1 - _SLACK) * result.index_select(0, kernel)
    kernel, place, step, gain = (
        each.index_select(-1, keep.nonzero()[:, 0]) for each in (kernel, place, step, gain)
    )
    pair = torch.tensor((_SHIFT[:axes], _FIRST_STEP[:axes]))
    shift, first = pair.to(step).unsqueeze(2)
    return _Starts(kernel, place + shift, step * first, gain)


def _differences(axes: int) -> Tensor:
    """From the values around a point to the slope there and the negative Hessian.

    Shape (axes + axes ** 2, 3 ** axes): products of differences along the axes.
    """
    along = torch.tensor([[0, 1, 0], [-0.5, 0, 0.5], [1, -2, 1]])
    unit = torch.eye(axes, dtype=torch.long)
    orders = torch.cat([unit, (unit[:, None] + unit).flatten(0, 1)])
    matrix = torch.where(orders.sum(1, keepdim=True) > 1, -1.0, 1.0)
    for order in orders.T:
        matrix = (matrix[:, :, None] * along[order][:, None]).flatten(1)
    return matrix


def _climb(result: Tensor, squares: Tensor, coarse: Coarse, starts: _Starts) -> None:
    """Raise the result of each kernel to the maxima of its squared symbol near the starts."""
    points = torch.tensor(coarse.points, dtype=torch.double)
    lags = (coarse.lags * (2 * math.pi / points)).to(squares)
    piece = max(1, room(squares) // len(lags))
    for some in zip(*[each.split(piece, -1) for each in starts], strict=True):
        _climb_together(result, squares, lags, _Starts(*some))


def _climb_together(result: Tensor, squares: Tensor, lags: Tensor, starts: _Starts) -> None:
    """As `_climb`, for as many starts as fit, with lags in units of the grid."""
    kernel, place, step, gain = starts
    squares = squares.index_select(1, kernel)
    pairs = (lags[:, :, None] * lags[:, None, :]).flatten(1).T.contiguous()
    value = torch.zeros_like(gain)
    for _ in range(_NEWTON_STEPS):
        trial = place + step
        phase = lags @ trial
        even = phase.cos().mul_(squares)
        slope = -(lags.T @ phase.sin_().mul_(squares))
        height = even.sum(0)
        newton = _step(slope, (pairs @ even).view(len(place), len(place), -1))
        better = height > value
        place = torch.where(better, trial, place)
        value = torch.where(better, height, value)
        step = torch.where(better, newton, step / 4)
        gain = torch.where(better, (slope * newton).sum(0), gain / 4)
        result.scatter_reduce_(0, kernel, value, "amax")
        keep = (gain > 2e-6 * value).nonzero()[:, 0]
        if not len(keep):
            break
        if 4 * len(keep) < 3 * len(kernel):
            kernel, value, gain, squares, place, step = (
                each.index_select(-1, keep) for each in (kernel, value, gain, squares, place, step)
            )


def _step(slope: Tensor, bend: Tensor) -> Tensor:
    """Newton step uphill, cut short, shape (axes, points); bend is the negative Hessian."""
    # Elimination with pivots made positive: the Newton step where the Hessian is negative
    # definite, else a step that still goes up. The floor keeps flat directions finite.
    rows, right, axes = list(bend.unbind(0)), list(slope.unbind(0)), range(len(slope))
    for i in axes:
        pivot = rows[i][i].abs().clamp(min=1e-6)
        rows[i] = rows[i] / pivot
        right[i] = right[i] / pivot
        for j in axes[i + 1 :]:
            right[j] = right[j] - rows[j][i] * right[i]
            rows[j] = rows[j] - rows[j][i] * rows[i]
    for i in reversed(axes):
        for j in axes[i + 1 :]:
            right[i] = right[i] - rows[i][j] * right[j]
    step = torch.stack(right)
    return step * (_LONGEST_STEP / step.abs().amax(0)).clamp_(max=1)
