"""The unpruned network: whether a model with its masks off is still it, and a copy of it."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, first_line
from ..masking import is_masked, masked
from ..tracing.arguments import check_model, public_name, unwrapped
from ..tracing.inputs import Arguments, call_on_copies
from ..tracing.leaves import as_real, tensors_in
from ..tracing.sandbox import running

ATTRIBUTE = "_fxlean_unpruned"  # on a masked model: the fingerprint of what it was made of
CHUNK = 2**16  # words that stay in a cache
MIX = 0x1E3779B97F4A7C15  # odd, with bits everywhere


def is_unpruned(model: nn.Module) -> bool:
    """Whether a model with its masks off is known to be the unpruned network.

    It is if it has no masks, or if nothing but masks has changed since `prune` put them on: no
    training, no repair, no loading, not even of statistics.
    """
    return not is_masked(model) or getattr(model, ATTRIBUTE, None) == fingerprint(model)


def remember(model: nn.Module, unpruned: int | None) -> None:
    """Note on a masked model the fingerprint of the unpruned network; None if it is not known."""
    vars(model).pop(ATTRIBUTE, None)
    if unpruned is not None:
        vars(model)[ATTRIBUTE] = unpruned


def fingerprint(model: nn.Module) -> int:
    """A number that changes with any parameter or buffer, but not with masks."""
    masks = {f"{path}{name}_mask" for path, _, name in masked(model)}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    sums = [(public_name(name), _checksum(t)) for name, t in tensors if name not in masks]
    return zlib.crc32(repr(sorted(sums)).encode())


def _checksum(tensor: Tensor) -> int:
    """A hash of the bits of a tensor, eight bytes at a time.

    Sums overflow, but every factor is odd, so that a change of one word always shows; and mixed, so
    that changes of several do not cancel.
    """
    octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if len(octets) % 8 or octets.storage_offset() % 8:
        octets = torch.cat([octets, octets.new_zeros(-len(octets) % 8)])
    words = octets.view(torch.int64)
    factors = MIX * torch.arange(1, 1 + min(len(words), CHUNK), device=words.device)
    factors = (factors ^ (factors >> 32)) * MIX | 1
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for part in words.split(CHUNK):
        total = MIX * total + (part * factors[: len(part)]).sum()
    return int(total)


def check_reference(model: nn.Module, reference: Any) -> None:
    """Reject what cannot be the unpruned network of a model."""
    check_model(reference, "reference")
    if unwrapped(reference) is unwrapped(model):
        raise ArgumentError(
            "reference is the model itself. Pass a copy of it from before it was pruned."
        )


def outputs_of(model: nn.Module, batches: Iterable[Arguments]) -> list[list[Tensor]]:
    """The floating-point tensors that a model returns for each batch."""
    with running(model):
        # Copies, for a model may return a buffer that its next run overwrites.
        results = (floats_of(call_on_copies(model, batch)) for batch in batches)
        return [[tensor.detach().clone() for tensor in tensors] for tensors in results]


def wanted_of(reference: nn.Module, batches: Sequence[Arguments]) -> list[list[Tensor]]:
    """The outputs of the unpruned network on batches that the pruned one takes.

    Raises:
        ArgumentError: the reference does not take them.
    """
    try:
        return outputs_of(reference, batches)
    except Exception as err:  # whatever the code of the model raises
        raise ArgumentError(
            f"the reference {type(reference).__name__} rejects batches that the pruned network "
            f"takes: {first_line(err)}. Pass the network that was pruned, in the same type."
        ) from err


def floats_of(result: Any) -> list[Tensor]:
    """The floating-point tensors in what a model returns; complex ones as their parts."""
    found = map(as_real, tensors_in(result))
    return [tensor for tensor in found if tensor.is_floating_point()]
