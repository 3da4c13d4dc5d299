"""Masks of `torch.nn.utils.prune` on modules: found, put on, brought up to date, and taken off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from .nn import RefreshMasks
from .tracing.sandbox import copied


def masked(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Path with a full stop behind it, module and name of every masked parameter."""
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                yield f"{path}." if path else "", module, hook._tensor_name


def is_masked(model: nn.Module) -> bool:
    """Whether `torch.nn.utils.prune` has put masks on a model."""
    return any(True for _ in masked(model))


def put_mask(module: nn.Module, name: str, mask: Tensor) -> None:
    """Mask one parameter; a mask that is there is narrowed, not wrapped once more.

    The order of the module's parameters, by which optimizers and averages know them, stays.
    """
    plain = name.removesuffix("_orig")
    existing = getattr(module, f"{plain}_mask", None)
    if name != plain and existing is not None:
        module._buffers[f"{plain}_mask"] = existing * mask.to(existing.device, existing.dtype)
        _masking_hook(module, plain)(module, ())
        return
    # As `prune.custom_from_mask` does, which also makes a mask of ones and multiplies by it.
    order = [f"{key}_orig" if key == name else key for key in module._parameters]
    parameter = module._parameters.pop(name)
    assert parameter is not None
    module.register_parameter(f"{name}_orig", parameter)
    _reorder(module, order)
    # Laid out like the parameter, channels last perhaps, so that their product is as well.
    module.register_buffer(f"{name}_mask", torch.empty_like(parameter.detach()).copy_(mask))
    hook = prune.CustomFromMask(mask)
    hook._tensor_name = name
    setattr(module, name, hook.apply_mask(module))
    # A weight norm of the same parameter must find it masked when its own hook runs.
    module.register_forward_pre_hook(hook, prepend=True)


def refresh_from(module: nn.Module, below: str) -> None:
    """Let a module apply, before each call, the masks of one below it that is never called."""
    known = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, RefreshMasks)]
    if below not in [hook.path for hook in known]:
        module.register_forward_pre_hook(RefreshMasks(below))


def refresh_masks(model: nn.Module) -> None:
    """Bring the masked weights up to date, which are computed before every forward pass."""
    with torch.no_grad():
        for module in model.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, prune.BasePruningMethod):
                    hook(module, ())


def without_masks(model: nn.Module, *, permanent: bool = True) -> nn.Module:
    """A copy of a model with all masks taken off, see `remove_masks`."""
    found = [(module, name) for _, module, name in masked(model)]
    masks = [module._buffers[f"{name}_mask"] for module, name in found]
    computed = [vars(module).get(name) for module, name in found]
    result = copied(model, [*masks, *computed])  # what comes off need not be copied
    remove_masks(result, permanent=permanent)
    return result


def remove_masks(model: nn.Module, *, permanent: bool = True) -> None:
    """Take off all masks, in place, with the order of parameters as it is.

    Masked elements become zero, or what they were before with `permanent=False`.
    """
    for _, module, name in list(masked(model)):
        original, mask = module._parameters[f"{name}_orig"], module._buffers[f"{name}_mask"]
        assert original is not None
        assert mask is not None
        order = [name if key == f"{name}_orig" else key for key in module._parameters]
        if permanent:
            with torch.no_grad():
                original.data = original * mask.to(original.dtype)
        del module._parameters[f"{name}_orig"], module._buffers[f"{name}_mask"]
        vars(module).pop(name, None)
        module.register_parameter(name, original)
        _reorder(module, order)
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, prune.BasePruningMethod | RefreshMasks):
                del module._forward_pre_hooks[number]


def _reorder(module: nn.Module, order: Sequence[str]) -> None:
    for key in order:
        module._parameters[key] = module._parameters.pop(key)


def _masking_hook(module: nn.Module, name: str) -> Any:
    """The pruning hook of a parameter."""
    return next(
        hook
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name
    )
