"""A dense network cut to the form of a compacted one, with masks and values put in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..compaction.fold import without_norm
from ..errors import ArgumentError
from ..masking import masked, put_mask, refresh_from, refresh_masks
from ..nn import Selected
from .layout import Form, mark_cut, own_shapes, own_tensors


def cut_to(model: nn.Module, forms: Mapping[str, Form], tensors: Mapping[str, Tensor]) -> None:
    """Give layers of a dense network the forms that they have in a file; in place.

    Args:
        model: dense.
        forms: of the layers that differ, by path.
        tensors: all that is in the file, by name.
    """
    for path, form in forms.items():
        before = model.get_submodule(path)
        shapes = own_shapes(before)
        after = _formed(before, form, tensors, f"{path}." if path else "")
        mark_cut(after, shapes)
        if after is not before:
            _replace(model, before, after)


def _formed(module: nn.Module, form: Form, tensors: Mapping[str, Tensor], prefix: str) -> nn.Module:
    if "layer" in form:
        layer = _formed(module, form["layer"], tensors, f"{prefix}layer.")
        device = next((tensor.device for _, _, tensor in own_tensors(module)), None)
        reads, places = (
            None if tensor is None else tensor.to(device)
            for tensor in (tensors.get(f"{prefix}{name}") for name in ("reads", "places"))
        )
        return Selected(layer, reads, places, form["channels"]).train(module.training)
    if "folded" in form:
        rest = without_norm(module)
        if rest is None:
            raise ArgumentError(
                f"{prefix}: the batch norm was folded, and what else {type(module).__name__} does "
                "cannot be traced. Save the model before it is compacted, and compact it again."
            )
        return rest.train(module.training)
    for name, width in form["widths"].items():
        setattr(module, name, width)
    _resize(module, tensors, prefix)
    return module


def _resize(module: Any, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Room for the parameters and buffers that a file has for a layer."""
    like = next((tensor for _, _, tensor in own_tensors(module)), torch.zeros(()))
    for held in (module._parameters, module._buffers):
        for key, old in held.items():
            stored = tensors.get(f"{prefix}{key}")
            if stored is not None and (old is None or old.shape != stored.shape):
                model = like if old is None else old
                new = model.detach().new_zeros(stored.shape)
                trained = held is module._parameters
                held[key] = nn.Parameter(new, model.requires_grad) if trained else new


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, everywhere."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old and parent is not new:
                parent._modules[name] = new


def put_masks(
    model: nn.Module, masks: Mapping[str, Tensor], callers: list[list[str]] | None
) -> None:
    """Mask the parameters that have a mask in the file.

    Args:
        model: without masks; in place.
        masks: by the name of the parameter, True where it is kept.
        callers: modules, and paths below them of modules with masks which are never called; None
            if that is not known, so that those count which cannot be called.
    """
    for path, module in list(model.named_modules()):
        prefix = f"{path}." if path else ""
        for name, key, tensor in list(own_tensors(module)):
            if f"{prefix}{name}" in masks:
                put_mask(module, key, masks[f"{prefix}{name}"].to(tensor.device))
    for caller, below in _callers(model) if callers is None else callers:
        refresh_from(model.get_submodule(caller), below)


def _callers(model: nn.Module) -> list[list[str]]:
    """The closest module that can be called above each masked one that cannot."""
    found = []
    for prefix, _, _ in masked(model):
        path = prefix.removesuffix(".")
        caller = path
        while caller and type(model.get_submodule(caller)).forward is nn.Module.forward:
            caller = caller.rpartition(".")[0]
        if caller != path:
            found.append([caller, path[len(caller) :].lstrip(".")])
    return found


def fill(model: nn.Module, values: Mapping[str, Tensor], same: Mapping[str, str]) -> None:
    """Write values into all parameters and buffers of a model; in place.

    Args:
        model: of the form that the values have.
        values: by name.
        same: names of parameters that are the same as another one, and the name of that.
    """
    filled: dict[nn.Parameter, str] = {}
    first: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, key, tensor in own_tensors(module):
            full = f"{path}.{name}" if path else name
            source = same.get(full, full)
            if isinstance(tensor, nn.Parameter):
                tensor = first.setdefault(source, tensor)
                if filled.setdefault(tensor, source) != source:
                    # One parameter here, which are two in the file.
                    tensor = first[source] = nn.Parameter(
                        tensor.detach().clone(), tensor.requires_grad
                    )
                    filled[tensor] = source
                module._parameters[key] = tensor
            tensor.copy_(values[source])
    refresh_masks(model)
