"""Operator norms of convolution kernels, all kernels of a weight at once.

The squared symbol of a kernel is a trigonometric polynomial, and its coefficients are the
kernel's autocorrelation. With stride s only the lags that are multiples of s remain: that is
what the sum over the s phases of the kernel comes to.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..tracing.sandbox import on_cpu
from .suprema import Coarse, coarse_grid, room, suprema

ORDERS = ("spectral", "frobenius", "nuclear", "l1")

_LAGS_LIMIT = 128  # lags summed one by one; above it, correlate by FFT
_MATRIX_LIMIT = 2**22  # numbers in a Fourier matrix
_NUCLEAR_DENSITY = (64, 16, 8)  # points per turn of the longest lag, for the mean


@torch.no_grad()
@on_cpu()
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
        ArgumentError: no tensor, no spatial axis, a weight that is not floating or has no data,
            a stride, dilation or grid below 1, as many strides as there are not axes, an unknown
            order.

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
    coarse = None
    if order == "spectral" and grid is None and len(lags) > 1:
        coarse = coarse_grid(lags, weight.new_empty(0, dtype=work_type))
    count = max(1, 2 * room(weight) // max(len(lags), size.numel()))
    for start in range(0, len(kernels), count):
        taps = kernels[start : start + count].movedim(0, -1).to(work_type).contiguous()
        norms[start : start + count] = _measure(taps, steps, lags, coarse, order, grid)
    return norms.view(weight.shape[:2])


def _check_weight(weight: Tensor) -> None:
    """Refuse a weight that has no kernels to measure."""
    if not isinstance(weight, Tensor):
        raise ArgumentError(
            f"weight is a {type(weight).__name__}; pass a tensor of shape (out, in, *size), such "
            "as conv.weight"
        )
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
    values = tuple(value) if isinstance(value, Sequence) else (value,) * axes
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
    full = torch.cartesian_prod(*[torch.arange(-m, m + 1) for m in degrees])
    return full.view(-1, len(size))[len(full) // 2 :]


def _measure(
    taps: Tensor,
    steps: Sequence[int],
    lags: Tensor,
    coarse: Coarse | None,
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
    if coarse is not None:
        return suprema(squares, coarse).sqrt() * scale
    if len(lags) == 1:  # the symbol is constant
        return squares[0].sqrt() * scale
    varying = lags[:, lags.amax(0) > 0]
    axes = varying.shape[1]
    points = _NUCLEAR_DENSITY[axes - 1] * int(varying.amax())
    return _on_grid(squares, varying, "nuclear", points) / float(points) ** axes * scale


def _autocorrelation(taps: Tensor, steps: Sequence[int], lags: Tensor) -> Tensor:
    """Cosine coefficients of the squared symbols, shape (lags, kernels)."""
    size = taps.shape[:-1]
    axes = tuple(range(len(size)))
    shifts = lags * torch.tensor(steps)
    if len(lags) > _LAGS_LIMIT:
        padded = [2 * k - 1 for k in size]
        spectrum = torch.view_as_real(torch.fft.rfftn(taps, s=padded, dim=axes))
        full = torch.fft.irfftn(spectrum.square().sum(-1), s=padded, dim=axes)
        place = shifts % torch.tensor(padded)
        squares: Tensor = full[tuple(place.to(taps.device).unbind(1))]
    else:
        squares = taps.new_empty(len(lags), taps.shape[-1])
        for row, shift in zip(squares, shifts.tolist(), strict=True):
            ahead = tuple(slice(max(t, 0), k + min(t, 0)) for t, k in zip(shift, size, strict=True))
            back = tuple(slice(max(-t, 0), k - max(t, 0)) for t, k in zip(shift, size, strict=True))
            torch.sum(taps[ahead] * taps[back], axes, out=row)
    squares[1:] *= 2
    return squares


def _on_grid(squares: Tensor, lags: Tensor, order: str, points: int) -> Tensor:
    """Norms of the singular values on a grid, shape (kernels,)."""
    # Opposite frequencies have equal values, so half of the first axis is enough.
    extents = [points // 2 + 1] + [points] * (lags.shape[1] - 1)
    total = math.prod(extents)
    block = max(1, min(1024, _MATRIX_LIMIT // len(lags)))
    result = torch.zeros_like(squares[0])
    for start in range(0, total, block):
        flat = torch.arange(start, min(start + block, total))
        place = torch.stack(torch.unravel_index(flat, extents), dim=1)
        matrix = _fourier(lags, place.double() / points, squares)
        alone = (place[:, 0] * 2) % points == 0
        times = torch.where(alone, 1.0, 2.0).to(squares)
        count = max(1, room(squares) // block)
        for part, sums in zip(squares.split(count, 1), result.split(count), strict=True):
            values = (matrix @ part).clamp_(min=0)
            if order == "spectral":
                torch.maximum(sums, values.amax(0), out=sums)
            else:
                sums += times @ (values.sqrt_() if order == "nuclear" else values)
    return result if order == "nuclear" else result.sqrt_()


def _fourier(lags: Tensor, turns: Tensor, like: Tensor) -> Tensor:
    """Matrix from coefficients to squared symbols, shape (points, lags)."""
    # Whole turns are dropped in double, so that long lags keep their phase.
    phases = (turns @ lags.T.double()) % 1.0
    return torch.cos(phases.mul_(2 * math.pi)).to(like)
