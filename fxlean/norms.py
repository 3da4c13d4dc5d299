"""Operator norms of convolution kernels, all kernels of a weight at once.

The squared symbol of a kernel is a trigonometric polynomial, and its coefficients are the
kernel's autocorrelation. With stride s only the lags that are multiples of s remain: that is
what the sum over the s phases of the kernel comes to.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ArgumentError

ORDERS = ("spectral", "frobenius", "nuclear", "l1")

_CPU_CHUNK = 2**18  # numbers in one intermediate array: stays in the cache
_GPU_CHUNK = 2**22  # enough to fill a GPU, and a few such arrays stay below 100 MB
_MATRIX_LIMIT = 2**22  # numbers in a Fourier matrix; above it, transform by FFT
_LAGS_LIMIT = 128  # lags summed one by one; above it, correlate by FFT
_DENSITY = (8, 8, 6)  # coarse grid points per turn of the longest lag, in 1-D, 2-D and 3-D
_SLOPE = (2.0, 2.0, 1.0)  # how far points below a neighbour are marked down, likewise
_NEWTON_STEPS = 12
_LONGEST_STEP = 0.75  # of the distance between two points of the coarse grid
_NUCLEAR_DENSITY = (64, 16, 8)  # points per turn of the longest lag, for the mean


@dataclass(frozen=True)
class _Coarse:
    """Half a turn of equally spaced frequencies, and a rim of one point around."""

    lags: Tensor  # (lags, axes), only axes along which the symbols vary
    points: list[int]  # per turn, for each axis
    places: list[Tensor]  # indices of the points, for each axis
    matrix: Tensor | None  # from coefficients to squared symbols; None where too large

    @property
    def extents(self) -> list[int]:
        return [len(place) for place in self.places]


@torch.no_grad()
def operator_norms(
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    *,
    dilation: int | Sequence[int] = 1,
    order: str = "spectral",
    grid: int | None = None,
) -> Tensor:
    """Norm of every kernel as a periodic convolution.

    The singular values of a kernel are the absolute values of its symbol, the Fourier series
    of its taps; with a stride, the l2 norms of the symbols of its phases. A transposed
    convolution has the norms of its adjoint, and so the same.

    | order | without grid, for every grid size | with ``grid=n`` |
    |---|---|---|
    | spectral | supremum over all frequencies, to a relative 1e-6 | largest singular value |
    | frobenius | root mean square = l2 norm of the taps | root of the sum of squares |
    | nuclear | mean of the singular values, to about 1e-3 | sum of the singular values |
    | l1 | sum of the absolute taps, whatever the stride | the same |

    Args:
        weight: kernels, shape (out, in, *size), any float dtype, any device.
        stride: one for all axes, or one per axis.
        dilation: one for all axes, or one per axis. It matters only together with a stride.
        order: ``"spectral"``, ``"frobenius"``, ``"nuclear"`` or ``"l1"``.
        grid: take the singular values on a grid of this many frequencies per axis, which is
            a periodic convolution with ``grid`` outputs (``grid * stride`` inputs) per axis.

    Returns:
        Norms, shape (out, in), float32 or float64, on the weight's device. A kernel with NaN
        or infinite taps has the norm NaN or infinity.

    Raises:
        ArgumentError: no spatial axis, a weight that is not floating or has no data, a stride,
            dilation or grid below 1, as many strides as there are not axes, an unknown order.

    Source: Sedghi, Gupta and Long (2018), arXiv 1805.10408, theorem 6, for one channel.

    >>> operator_norms(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).item()
    10.0
    >>> operator_norms(torch.full((1, 1, 2, 2), 0.25), stride=2).item()  # average pooling
    0.5
    """
    _check_weight(weight)
    size = weight.shape[2:]
    strides = _per_axis(stride, len(size), "stride")
    dilations = _per_axis(dilation, len(size), "dilation")
    if order not in ORDERS:
        raise ArgumentError(f"order is {order!r}; use one of {', '.join(map(repr, ORDERS))}")
    if grid is not None and (not isinstance(grid, int) or grid < 1):
        raise ArgumentError(f"grid is {grid!r}; use a number of frequencies >= 1, or None")
    steps = [s // math.gcd(s, d) for s, d in zip(strides, dilations, strict=True)]
    kernels = weight.detach().flatten(0, 1)
    norms = torch.zeros(
        len(kernels), dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device
    )
    if not kernels.numel():
        return norms.view(weight.shape[:2])
    if size.numel() == 1 and (grid is None or order in ("spectral", "l1")):
        return kernels.view(weight.shape[:2]).to(norms.dtype).abs()
    lags = _lags(size, steps)
    work_type = _work_type(weight, order)
    coarse = _coarse(lags, weight.new_empty(0, dtype=work_type))
    count = max(1, 2 * _room(weight) // max(len(lags), size.numel()))
    for start in range(0, len(kernels), count):
        taps = kernels[start : start + count].movedim(0, -1).to(work_type).contiguous()
        norms[start : start + count] = _measure(taps, steps, lags, coarse, order, grid)
    return norms.view(weight.shape[:2])


def _check_weight(weight: Tensor) -> None:
    """Refuse a weight that has no kernels to measure."""
    shape = tuple(weight.shape)
    if not weight.is_floating_point():
        raise ArgumentError(
            f"weight has dtype {weight.dtype}, shape {shape}; convert it to a floating dtype"
        )
    if weight.dim() < 3:
        raise ArgumentError(
            f"weight has shape {shape}, without a spatial axis; give it shape (out, in, *size), "
            "for a linear layer weight[:, :, None]"
        )
    if weight.is_meta:
        raise ArgumentError(
            f"weight of shape {shape} is on the meta device, without data; load the weights first"
        )


def _per_axis(value: int | Sequence[int], axes: int, name: str) -> tuple[int, ...]:
    """One positive number per axis."""
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes or not all(isinstance(v, int) and v >= 1 for v in values):
        raise ArgumentError(
            f"{name} is {value!r} for a weight with {axes} spatial axes; "
            f"use one whole number >= 1, or {axes} of them"
        )
    return values


def _work_type(weight: Tensor, order: str) -> torch.dtype:
    """Double where single precision would lose digits."""
    cancels = order == "nuclear"  # roots of small squared symbols, which are differences
    long = max(weight.shape[2:]) > 64  # phases of many turns
    try:
        rounds = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # raised where the caller set the precision backend by backend
        rounds = True
    rounds |= torch.is_autocast_enabled(weight.device.type)
    wide = cancels or long or rounds
    return torch.float64 if wide else torch.promote_types(weight.dtype, torch.float32)


def _lags(size: Sequence[int], steps: Sequence[int]) -> Tensor:
    """Lags in steps, shape (lags, axes): zero, and one of each pair of opposite ones."""
    degrees = [(k - 1) // s for k, s in zip(size, steps, strict=True)]
    full = torch.cartesian_prod(*[torch.arange(-m, m + 1, device="cpu") for m in degrees])
    return full.view(-1, len(size))[len(full) // 2 :]


def _room(like: Tensor) -> int:
    """Numbers that an intermediate array may hold."""
    return _CPU_CHUNK if like.device.type == "cpu" else _GPU_CHUNK


def _measure(
    taps: Tensor,
    steps: Sequence[int],
    lags: Tensor,
    coarse: _Coarse | None,
    order: str,
    grid: int | None,
) -> Tensor:
    """Norms, shape (kernels,), from taps (*size, kernels)."""
    if order == "l1":
        return taps.abs().flatten(0, -2).sum(0)
    scale = taps.abs().flatten(0, -2).amax(0)
    # Without this, squares of very small or large weights leave the range of a float32.
    taps = taps / torch.where(scale > 0, scale, 1)
    if order == "frobenius" and grid is None:
        norms: Tensor = torch.linalg.vector_norm(taps.flatten(0, -2), dim=0) * scale
        return norms
    squares = _autocorrelation(taps, steps, lags)
    if grid is not None:
        return _on_grid(squares, lags, order, grid) * scale
    if coarse is None:
        return squares[0].sqrt() * scale
    if order == "nuclear":
        axes = coarse.lags.shape[1]
        points = _NUCLEAR_DENSITY[axes - 1] * int(coarse.lags.amax())
        return _on_grid(squares, coarse.lags, order, points) / points**axes * scale
    return _suprema(squares, coarse).sqrt() * scale


def _autocorrelation(taps: Tensor, steps: Sequence[int], lags: Tensor) -> Tensor:
    """Cosine coefficients of the squared symbols, shape (lags, kernels)."""
    size = taps.shape[:-1]
    axes = tuple(range(len(size)))
    shifts = lags * torch.tensor(steps)
    if len(lags) > _LAGS_LIMIT:
        room = [2 * k - 1 for k in size]
        spectrum = torch.view_as_real(torch.fft.rfftn(taps, s=room, dim=axes))
        full = torch.fft.irfftn(spectrum.square().sum(-1), s=room, dim=axes)
        squares = full[tuple((shifts % torch.tensor(room)).to(taps.device).unbind(1))]
    else:
        squares = taps.new_empty(len(lags), taps.shape[-1])
        for row, shift in zip(squares, shifts.tolist(), strict=True):
            ahead = tuple(slice(max(t, 0), k + min(t, 0)) for t, k in zip(shift, size, strict=True))
            back = tuple(slice(max(-t, 0), k - max(t, 0)) for t, k in zip(shift, size, strict=True))
            torch.sum(taps[ahead] * taps[back], axes, out=row)
    squares[1:] *= 2
    return squares


def _fourier(lags: Tensor, turns: Tensor, like: Tensor) -> Tensor:
    """Matrix from coefficients to squared symbols, shape (points, lags)."""
    # Whole turns are dropped in double, so that long lags keep their phase.
    phases = (turns @ lags.T.double()) % 1.0
    return torch.cos(phases.mul_(2 * math.pi)).to(like)


def _on_grid(squares: Tensor, lags: Tensor, order: str, points: int) -> Tensor:
    """Norms of the singular values on a grid, shape (kernels,)."""
    # Opposite frequencies have equal values, so half of the first axis is enough.
    extents = [points // 2 + 1] + [points] * (lags.shape[1] - 1)
    total = math.prod(extents)
    block = max(1, min(1024, _MATRIX_LIMIT // len(lags)))
    result = torch.zeros_like(squares[0])
    for start in range(0, total, block):
        flat = torch.arange(start, min(start + block, total), device="cpu")
        place = torch.stack(torch.unravel_index(flat, extents), dim=1)
        matrix = _fourier(lags, place.double() / points, squares)
        alone = (place[:, 0] * 2) % points == 0
        times = torch.where(alone, 1.0, 2.0).to(squares)
        count = max(1, _room(squares) // block)
        for part, sums in zip(squares.split(count, 1), result.split(count), strict=True):
            values = (matrix @ part).clamp_(min=0)
            if order == "spectral":
                torch.maximum(sums, values.amax(0), out=sums)
            else:
                sums += times @ (values.sqrt_() if order == "nuclear" else values)
    return result if order == "nuclear" else result.sqrt_()


def _coarse(lags: Tensor, like: Tensor) -> _Coarse | None:
    """The grid to climb from; None where all symbols are constant."""
    lags = lags[:, lags.amax(0) > 0]
    if not lags.shape[1]:
        return None
    points = [_DENSITY[lags.shape[1] - 1] * m for m in lags.amax(0).tolist()]
    half = points[0] // 2 + 1
    ends = [half + half % 2, *points[1:]]
    places = [torch.arange(-1, end + 1, device="cpu") for end in ends]
    matrix = None
    if len(lags) * math.prod(len(place) for place in places) <= _MATRIX_LIMIT:
        turns = torch.cartesian_prod(*[p / n for p, n in zip(places, points, strict=True)])
        matrix = _fourier(lags, turns.double().view(-1, len(points)), like)
    return _Coarse(lags, points, places, matrix)


def _coarse_values(squares: Tensor, coarse: _Coarse) -> Tensor:
    """Squared symbols, shape (*extents, kernels)."""
    if coarse.matrix is not None:
        return (coarse.matrix @ squares).view(*coarse.extents, -1)
    values = squares.new_zeros(*coarse.points, squares.shape[1])
    values[(coarse.lags % torch.tensor(coarse.points)).to(values.device).unbind(1)] = squares
    values = torch.fft.fftn(values, dim=tuple(range(len(coarse.points)))).real
    for axis, (place, n) in enumerate(zip(coarse.places, coarse.points, strict=True)):
        values = values.index_select(axis, (place % n).to(values.device))
    return values


def _suprema(squares: Tensor, coarse: _Coarse) -> Tensor:
    """Maxima of the squared symbols over all frequencies, shape (kernels,)."""
    bounds = squares.abs().sum(0)
    count = max(1, _room(squares) // math.prod(coarse.extents))
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
    piece = max(1, 4 * _room(squares) // len(coarse.lags))
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
    flat = values.view(-1)
    highest, choice = flat[first], torch.zeros_like(kernel)
    corners = list(itertools.product(range(2), repeat=len(axes)))
    for number, corner in enumerate(corners[1:], 1):
        jump = sum(shift * pace for shift, pace in zip(corner, values.stride(), strict=False))
        height = flat[first + jump]
        choice.masked_fill_(height > highest, number)
        highest = torch.maximum(highest, height)
    # The last axis is the lowest bit of the number of a corner.
    bits = [(choice >> (len(axes) - 1 - axis)) & 1 for axis in axes]
    place = [2 * index + bit for index, bit in zip(block, bits, strict=True)]
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
