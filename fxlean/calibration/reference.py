"""The unpruned network: whether a model with its masks off is still it, and a copy of it."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from ..nn import RefreshMasks
from ..tracing.arguments import public_name
from ..tracing.inputs import Arguments, call
from ..tracing.leaves import tensors_in
from ..tracing.sandbox import copied, running

ATTRIBUTE = "_fxlean_unpruned"  # on a masked model: the fingerprint of what it was made of
CHUNK = 2**22


def is_unpruned(model: nn.Module) -> bool:
    """Whether a model with its masks off is known to be the unpruned network.

    It is if it has no masks, or if nothing but masks has changed since `prune` put them on: no
    training, no repair, no loading, not even of statistics.
    """
    return not is_masked(model) or getattr(model, ATTRIBUTE, None) == fingerprint(model)


def is_masked(model: nn.Module) -> bool:
    """Whether `torch.nn.utils.prune` has put masks on a model."""
    return any(True for _ in _masked(model))


def remember(model: nn.Module, unpruned: int | None) -> None:
    """Note on a masked model the fingerprint of the unpruned network; None if it is not known."""
    vars(model).pop(ATTRIBUTE, None)
    if unpruned is not None:
        vars(model)[ATTRIBUTE] = unpruned


def fingerprint(model: nn.Module) -> int:
    """A number that changes with any parameter or buffer, but not with masks."""
    masks = {f"{path}{name}_mask" for path, _, name in _masked(model)}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    sums = [(public_name(name), _checksum(t)) for name, t in tensors if name not in masks]
    return zlib.crc32(repr(sorted(sums)).encode())


def _checksum(tensor: Tensor) -> int:
    """The sum of the bits of a tensor, taken as integers and weighted by their places."""
    integers = {1: torch.uint8, 2: torch.int16}.get(tensor.element_size(), torch.int32)
    bits = tensor.detach().contiguous().reshape(-1).view(integers)
    total = 0
    for number, part in enumerate(bits.split(CHUNK)):
        places = torch.arange(1, len(part) + 1, device=part.device, dtype=torch.int64)
        total += (number + 1) * int((part.long() * places).sum())
    return total


def without_masks(model: nn.Module) -> nn.Module:
    """A copy of a model with all masks taken off, so that masked elements are what they were."""
    result = copied(model)
    for _, module, name in list(_masked(result)):
        parameter = module._parameters.pop(f"{name}_orig")
        del module._buffers[f"{name}_mask"]
        vars(module).pop(name, None)
        setattr(module, name, parameter)
    for module in result.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, prune.BasePruningMethod | RefreshMasks):
                del module._forward_pre_hooks[number]
    return result


def refresh_masks(model: nn.Module) -> None:
    """Bring the masked weights up to date, which are computed before every forward pass."""
    with torch.no_grad():
        for module in model.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, prune.BasePruningMethod):
                    hook(module, ())


def outputs_of(model: nn.Module, batches: Iterable[Arguments]) -> list[list[Tensor]]:
    """The floating-point tensors that a model returns for each batch."""
    with running(model):
        return [floats_of(call(model, batch)) for batch in batches]


def floats_of(result: Any) -> list[Tensor]:
    """The floating-point tensors in what a model returns."""
    return [tensor for tensor in tensors_in(result) if tensor.is_floating_point()]


def _masked(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Path, module and name of every masked parameter."""
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                yield f"{path}." if path else "", module, hook._tensor_name
