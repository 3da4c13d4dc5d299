"""Masked weights as tensors that take no more room than dense ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BITS = ":bits"  # behind the name of a weight: which of its elements are kept, eight a byte


def packed(name: str, values: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """A masked weight as tensors to store; elements that are masked are not kept.

    These are the kept elements and their places in bits, where that is smaller, else all elements
    with NaN in place of the masked ones.

    >>> packed("w", torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True]))
    {'w': tensor([1., 3.]), 'w:bits': tensor([160], dtype=torch.uint8)}
    >>> packed("w", torch.tensor([1.0]), torch.tensor([True]))
    {'w': tensor([1.])}
    """
    values, mask = values.detach().cpu(), mask.detach().cpu() != 0
    kept, bits = values[mask], torch.from_numpy(np.packbits(mask.numpy()))
    ambiguous = bool(kept.isnan().any())
    if ambiguous or kept.nbytes + bits.nbytes < values.nbytes:
        return {name: kept, f"{name}{BITS}": bits}
    return {name: values.masked_fill(~mask, float("nan")).contiguous()}


def unpacked(name: str, tensors: dict[str, Tensor], shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Values, zero where masked, and mask of a weight that was packed."""
    stored, bits = tensors[name], tensors.get(f"{name}{BITS}")
    if bits is None:
        return stored.nan_to_num(
            nan=0.0, posinf=float("inf"), neginf=-float("inf")
        ), ~stored.isnan()
    flat = np.unpackbits(bits.numpy(), count=shape.numel()).astype(bool)
    mask = torch.from_numpy(flat).reshape(shape)
    return stored.new_zeros(shape).masked_scatter_(mask, stored), mask
