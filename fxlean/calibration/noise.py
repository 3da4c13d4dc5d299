"""Noise in place of images, where there are no data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..tracing.inputs import Arguments
from ..tracing.leaves import replaced, tensors_in

SAMPLES = 256
ELEMENTS = 2**24  # of all noise together; large images get fewer samples


def noise_batches(arguments: Arguments, samples: int = SAMPLES) -> Iterator[Arguments]:
    """Batches of `spectral_noise` of the shapes of some arguments, the same at every call.

    Args:
        arguments: of the model; integers among them, and what is no tensor, stay as they are.
        samples: how many in all, fewer for large images; a batch is as large as the arguments'.
    """
    tensors = tensors_in(arguments)
    batch = max([1, *(tensor.shape[0] for tensor in tensors if tensor.dim())])
    elements = max(1, sum(tensor.numel() for tensor in tensors))
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return spectral_noise(tensor.shape, generator).to(tensor.device, tensor.dtype)

    for _ in range(max(1, min(-(-samples // batch), ELEMENTS // elements))):
        yield replaced(arguments, draw)


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
