"""Noise in place of images, where there are no data.

Of the data that a network was trained on, its first batch norm has kept means and variances. Scale
and offset of the noise are those with which it sees the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..tracing.inputs import Arguments, batch_size, call
from ..tracing.leaves import replaced, tensors_in
from ..tracing.sandbox import running

SAMPLES = 256
ELEMENTS = 2**24  # of all noise together; large images get fewer samples


def noise_batches(
    model: nn.Module, arguments: Arguments, samples: int = SAMPLES
) -> Iterator[Arguments]:
    """Batches of noise of the shapes of some arguments, the same at every call.

    Args:
        model: for the range of its inputs, see `input_range`.
        arguments: of the model; integers among them, and what is no tensor, stay as they are.
        samples: how many in all, fewer for large images; a batch is as large as the arguments'.
    """
    scale, offset = input_range(model, arguments)
    tensors = tensors_in(arguments)
    batch = batch_size(arguments)
    elements = max(1, sum(tensor.numel() for tensor in tensors))
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = scale * spectral_noise(tensor.shape, generator) + offset
        return noise.to(tensor.device, tensor.dtype)

    for _ in range(max(1, min(-(-samples // batch), ELEMENTS // elements))):
        yield replaced(arguments, draw)


def input_range(model: nn.Module, arguments: Arguments) -> tuple[float, float]:
    """Standard deviation and mean of inputs from which the first batch norm gets its statistics.

    They come from how it responds to noise, and to inputs of one value everywhere: the mean by
    least squares over its channels, the variance from the sum over them, less what a mean brings
    about at borders. 1 and 0 where there is no batch norm with statistics, or nothing fits them.
    """
    generator = torch.Generator().manual_seed(0)
    noise = _first_norm(model, arguments, lambda tensor: spectral_noise(tensor.shape, generator))
    zeros = _first_norm(model, arguments, torch.zeros_like)
    ones = _first_norm(model, arguments, torch.ones_like)
    if noise is None or zeros is None or ones is None:
        return 1.0, 0.0
    norm, _, variance = noise
    response = ones[1] - zeros[1]
    target = norm.running_mean.double() - zeros[1]
    offset = (target @ response) / (response @ response)
    left = (norm.running_var.double() - offset.square() * ones[2]).sum()
    scale = (left / variance.sum()).sqrt()
    return (float(scale), float(offset)) if 0 < scale < torch.inf else (1.0, 0.0)


def _first_norm(
    model: nn.Module, arguments: Arguments, fill: Any
) -> tuple[Any, Tensor, Tensor] | None:
    """The first batch norm that runs on such inputs, and mean and variance of what it reads."""
    seen: list[tuple[Any, Tensor, Tensor]] = []

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        values = given[0].double().transpose(0, 1).flatten(1)
        seen.append((module, values.mean(1), values.var(1)))

    def filled(tensor: Tensor) -> Tensor:
        return fill(tensor).to(tensor) if tensor.is_floating_point() else tensor

    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    hooks = [
        norm.register_forward_pre_hook(look) for norm in norms if norm.running_mean is not None
    ]
    try:
        if hooks:
            with running(model):
                call(model, replaced(arguments, filled))
    finally:
        for hook in hooks:
            hook.remove()
    return seen[0] if seen else None


def spectral_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise whose amplitude falls as 1 over the frequency, as in photographs.

    Args:
        shape: (n, channels, *size); without spatial axes, the noise is white.
        generator: of random numbers on the CPU.

    Returns:
        Mean 0 and variance 1 in expectation; whole images differ in their mean as well.

    Source: Field (1987), "Relations between the statistics of natural images and the response
    properties of cortical cells": amplitudes fall as 1/f.
    """
    white = torch.randn(shape, generator=generator)
    dims = list(range(2, len(shape)))
    if not dims:
        return white
    spectrum = torch.fft.fftn(white, dim=dims)
    grids = torch.meshgrid(*[torch.fft.fftfreq(shape[dim]) for dim in dims], indexing="ij")
    frequency = torch.stack(grids).square().sum(0).sqrt()
    lowest = 1 / max(shape[dim] for dim in dims)
    amplitude = 1 / frequency.clamp(min=lowest)
    amplitude /= amplitude.square().mean().sqrt()
    noise: Tensor = torch.fft.ifftn(spectrum * amplitude, dim=dims).real
    return noise
