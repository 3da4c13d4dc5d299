"""Suprema of cosine polynomials, many at once: a coarse grid, then Newton steps uphill from it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_CPU_CHUNK = 2**20  # numbers in one intermediate array: stays in the cache
_GPU_CHUNK = 2**22  # enough to fill a GPU, and a few such arrays stay below 100 MB
MATRIX_LIMIT = 2**22  # numbers in a Fourier matrix; above it, transform by FFT
_DENSITY = (8, 8, 6)  # coarse grid points per turn of the longest lag, in 1-D, 2-D and 3-D
_SLOPE = (2.0, 2.0, 1.0)  # how far points below a neighbour are marked down, likewise
_NEWTON_STEPS = 12
_LONGEST_STEP = 0.75  # of the distance between two points of the coarse grid


@dataclass(frozen=True)
class Coarse:
    """Half a turn of equally spaced frequencies, and a rim of one point around."""

    lags: Tensor  # (lags, axes), only axes along which the symbols vary
    points: list[int]  # per turn, for each axis
    places: list[Tensor]  # indices of the points, for each axis
    matrix: Tensor | None  # from coefficients to squared symbols; None where too large

    @property
    def extents(self) -> list[int]:
        """Number of points along each axis, the rim included."""
        return [len(place) for place in self.places]


def room(like: Tensor) -> int:
    """How many numbers an intermediate array may hold."""
    return _CPU_CHUNK if like.device.type == "cpu" else _GPU_CHUNK


def fourier(lags: Tensor, turns: Tensor, like: Tensor) -> Tensor:
    """Matrix from coefficients to squared symbols, shape (points, lags)."""
    # Whole turns are dropped in double, so that long lags keep their phase.
    phases = (turns @ lags.T.double()) % 1.0
    return torch.cos(phases.mul_(2 * math.pi)).to(like)


def coarse_grid(lags: Tensor, like: Tensor) -> Coarse | None:
    """The grid to climb from; None where all symbols are constant."""
    lags = lags[:, lags.amax(0) > 0]
    if not lags.shape[1]:
        return None
    points = [_DENSITY[lags.shape[1] - 1] * m for m in lags.amax(0).tolist()]
    half = points[0] // 2 + 1
    ends = [half + half % 2, *points[1:]]
    places = [torch.arange(-1, end + 1, device="cpu") for end in ends]
    matrix = None
    if len(lags) * math.prod(len(place) for place in places) <= MATRIX_LIMIT:
        turns = torch.cartesian_prod(*[p / n for p, n in zip(places, points, strict=True)])
        matrix = fourier(lags, turns.double().view(-1, len(points)), like)
    return Coarse(lags, points, places, matrix)


def _coarse_values(squares: Tensor, coarse: Coarse) -> Tensor:
    """Squared symbols, shape (*extents, kernels)."""
    if coarse.matrix is not None:
        return (coarse.matrix @ squares).view(*coarse.extents, -1)
    values: Tensor = squares.new_zeros(*coarse.points, squares.shape[1])
    values[(coarse.lags % torch.tensor(coarse.points)).to(values.device).unbind(1)] = squares
    values = torch.fft.fftn(values, dim=tuple(range(len(coarse.points)))).real
    for axis, (place, n) in enumerate(zip(coarse.places, coarse.points, strict=True)):
        values = values.index_select(axis, (place % n).to(values.device))
    return values


def suprema(squares: Tensor, coarse: Coarse) -> Tensor:
    """Maxima of the squared symbols over all frequencies, shape (kernels,)."""
    bounds = squares.abs().sum(0)
    count = max(1, room(squares) // math.prod(coarse.extents))
    found, tight = [], []
    for start in range(0, len(bounds), count):
        part = slice(start, start + count)
        values = _coarse_values(squares[:, part], coarse)
        starts, reached = _starts(values, bounds[part])
        starts[0] += start
        found.append(starts)
        tight.append(reached)
    result = torch.where(torch.cat(tight), bounds, 0)
    points = torch.tensor(coarse.points, device=squares.device)[:, None]
    spacing = (2 * math.pi / points).to(squares.dtype)
    piece = max(1, room(squares) // len(coarse.lags))
    for kernel, *place in torch.cat(found, 1).split(piece, 1):
        frequency = torch.stack(place) * spacing
        _climb(result, kernel, squares[:, kernel], coarse.lags.to(squares), frequency, spacing)
    return result


def _scores(values: Tensor) -> Tensor:
    """Squared symbols without the rim, less than they are beside a higher point.

    Shape (*blocks, kernels): the best of each block of two points per axis. A block has one
    local maximum at most, and there are fewer to search.
    """
    axes = range(values.dim() - 1)
    inner, around = values, values
    for axis in axes:
        count = values.shape[axis] - 2
        inner = inner.narrow(axis, 1, count)
        beside = torch.maximum(around.narrow(axis, 0, count), around.narrow(axis, 2, count))
        around = torch.maximum(beside, around.narrow(axis, 1, count), out=beside)
    scores = torch.lerp(around, inner, 1 + _SLOPE[len(axes) - 1])
    for axis in axes:
        halves = scores.unflatten(axis, (-1, 2))
        scores = torch.maximum(halves.select(axis + 1, 0), halves.select(axis + 1, 1))
    return scores


def _starts(values: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Where to climb from: kernels and places, shape (1 + axes, starts); and a mask.

    The mask is True for kernels that reach their bound, all cosines one, at a grid point.
    """
    scores = _scores(values)
    axes = range(scores.dim() - 1)
    top = scores.flatten(0, -2).amax(0)
    reached = ~(top < bounds * (1 - 1e-6))
    # Riesz: a T >= 0 of exponential type m has T(x + d) >= T(x) cos(m d / 2)^2 at its maximum x.
    nearest = math.cos(math.pi * len(axes) / (2 * _DENSITY[len(axes) - 1])) ** 2
    threshold = torch.where(reached, math.inf, top * nearest)
    *block, kernel = (scores > threshold).nonzero().unbind(1)
    # Each block starts from its highest point: compare its corners.
    first = kernel.clone()
    for index, pace in zip(block, values.stride(), strict=False):
        first += (2 * index + 1) * pace
    corners = torch.cartesian_prod(*[torch.arange(2, device="cpu")] * len(axes)).view(-1, len(axes))
    jumps = (corners @ torch.tensor(values.stride()[:-1], device="cpu")).to(values.device)
    heights = values.view(-1)[first + jumps[:, None]].view(*[2] * len(axes), -1)
    place = []
    for axis, index in enumerate(block):
        low, high = heights.movedim(axis, 0).reshape(2, len(corners) // 2, -1).amax(1)
        place.append(2 * index + (high > low))
    return torch.stack([kernel, *place]), reached


def _climb(
    result: Tensor, kernel: Tensor, squares: Tensor, lags: Tensor, place: Tensor, spacing: Tensor
) -> None:
    """Raise the result of each kernel to the maxima of its squared symbol near the places."""
    pairs = (lags[:, :, None] * lags[:, None, :]).flatten(1).T.contiguous()
    # Zero and half a turn are stationary by symmetry, and may be minima: start beside them.
    step = spacing * torch.linspace(0.05, 0.1, len(place)).to(spacing)[:, None]
    reach = spacing * _LONGEST_STEP
    value = gain = torch.zeros_like(squares[0])
    for _ in range(_NEWTON_STEPS):
        trial = place + step
        phase = lags @ trial
        even = phase.cos().mul_(squares)
        slope = -(lags.T @ phase.sin_().mul_(squares))
        height = even.sum(0)
        newton = _ascent(slope, (pairs @ even).view(len(place), len(place), -1))
        newton = newton * (reach / newton.abs()).amin(0).clamp_(max=1)
        better = height > value
        place = torch.where(better, trial, place)
        value = torch.where(better, height, value)
        step = torch.where(better, newton, step / 4)
        gain = torch.where(better, (slope * newton).sum(0), gain / 4)
        result.scatter_reduce_(0, kernel, value, "amax")
        rising = gain > 2e-6 * value
        keep = rising.nonzero()[:, 0]
        if not len(keep):
            break
        if 4 * len(keep) < 3 * len(kernel):
            kernel, value, gain = kernel[keep], value[keep], gain[keep]
            squares, place, step = squares[:, keep], place[:, keep], step[:, keep]


def _ascent(slope: Tensor, bend: Tensor) -> Tensor:
    """Newton step uphill, shape (axes, points); bend is the negative Hessian."""
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
    return torch.stack(right)
