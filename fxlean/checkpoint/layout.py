"""What a network holds, name by name, and what it held before compaction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune

from ..nn import Selected

DENSE = "_fxlean_dense"  # on a layer that compaction has changed: names and shapes from before
KEPT = "_fxlean_kept"  # likewise: which places are left, by name and dimension of a tensor
WIDTHS = (
    *("in_channels", "out_channels", "groups", "in_features", "out_features"),
    *("num_features", "num_groups", "num_channels", "num_parameters"),
)
Shapes: TypeAlias = dict[str, list[int]]
Form: TypeAlias = dict[str, Any]


def own_tensors(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """What a module itself saves: name without mask, key, tensor; parameters, then buffers."""
    hooks = module._forward_pre_hooks.values()
    masked = {hook._tensor_name for hook in hooks if isinstance(hook, prune.BasePruningMethod)}
    for key, parameter in module._parameters.items():
        if parameter is not None:
            plain = key.removesuffix("_orig")
            yield plain if plain in masked else key, key, parameter
    for key, buffer in module._buffers.items():
        passing = key in module._non_persistent_buffers_set
        if buffer is not None and not passing and key.removesuffix("_mask") not in masked:
            yield key, key, buffer


def named_tensors(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """All that a network saves as it is, by name, without masks; shared tensors more than once.

    As in a `state_dict`, what is in a shared module has several names with
    `remove_duplicate=False`.
    """
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        for name, _, tensor in own_tensors(module):
            yield f"{path}.{name}" if path else name, tensor


def note_dense(dense: nn.Module, small: nn.Module) -> None:
    """Note on every layer that compaction has changed what it was before.

    Args:
        dense: the network before; one that was compacted itself knows what it was first.
        small: the compacted network.
    """
    if isinstance(small, fx.GraphModule) and not isinstance(dense, fx.GraphModule):
        small.meta[DENSE] = "rewritten"
        return
    for path, before in dense.named_modules():
        after = _counterpart(small, path)
        if after is None:  # of a norm that is folded into a convolution, and is gone as a whole
            continue
        if is_cut(before) or _signature(before) != _signature(after):
            mark_cut(after, own_shapes(before))


def _counterpart(small: nn.Module, path: str) -> nn.Module | None:
    """What is left of a module in a compacted network, by its path before."""
    module: nn.Module | None = small
    for name in path.split(".") if path else ():
        if isinstance(module, Selected) and name not in module._modules:
            module = innermost(module)
        module = None if module is None else module._modules.get(name)
    return module


def mark_cut(module: nn.Module, shapes: Shapes) -> None:
    """Note what a layer that compaction has changed saved before."""
    vars(module)[DENSE] = shapes


def note_kept(module: nn.Module, name: str, dim: int, places: Tensor) -> None:
    """Note which places along a dimension of a tensor are left, of those that were until now."""
    # Plain data, for TorchScript looks at it.
    known: dict[int, list[int]] = vars(module).setdefault(KEPT, {}).setdefault(name, {})
    left = places.tolist()
    known[dim] = [known[dim][place] for place in left] if dim in known else left


def kept_places(module: nn.Module, name: str) -> dict[int, Tensor]:
    """Which places of a tensor are left, by the dimensions along which it was cut."""
    known: dict[int, list[int]] = vars(module).get(KEPT, {}).get(name, {})
    return {
        dim: torch.tensor(places, dtype=torch.long, device="cpu") for dim, places in known.items()
    }


def is_cut(module: nn.Module) -> bool:
    """Whether compaction has changed a layer."""
    return DENSE in vars(module)


def is_rewritten(model: nn.Module) -> bool:
    """Whether compaction has written a new graph in place of the model's own code."""
    # Some, such as torchvision's feature extractors, have no `meta`.
    return isinstance(model, fx.GraphModule) and DENSE in getattr(model, "meta", ())


def own_shapes(module: nn.Module) -> Shapes:
    """Names and shapes of what a module itself saves, before compaction."""
    if is_cut(module):
        found: Shapes = vars(module)[DENSE]
        return found
    return {name: list(tensor.shape) for name, _, tensor in own_tensors(module)}


def dense_shapes(model: nn.Module) -> Shapes:
    """Names and shapes of all that a network saves, as before compaction and without masks."""
    return {
        f"{prefix}{name}": shape
        for prefix, module in dense_modules(model)
        for name, shape in own_shapes(module).items()
    }


def forms(model: nn.Module) -> dict[str, Form]:
    """The form of every layer that compaction has changed, by its path."""
    return {
        prefix.removesuffix("."): form_of(module)
        for prefix, module in dense_modules(model)
        if is_cut(module)
    }


def form_of(module: nn.Module) -> Form:
    """What to make of a dense layer to get this one, as plain data."""
    if isinstance(module, Selected):
        return {"channels": module.channels, "layer": form_of(module.layer)}
    if isinstance(module, nn.Identity | fx.GraphModule):
        return {"folded": True}
    return {"widths": _widths(module)}


def dense_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules behind the names that they have in the dense network, each once."""
    return _dense_modules(model, "", set())


def _dense_modules(
    module: nn.Module, prefix: str, seen: set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    if module in seen:
        return
    seen.add(module)
    yield prefix, module
    if is_cut(module):
        module = innermost(module)
    for name, child in module.named_children():
        yield from _dense_modules(child, f"{prefix}{name}.", seen)


def innermost(module: nn.Module) -> nn.Module:
    """The layer inside of selections."""
    while isinstance(module, Selected):
        module = module.layer
    return module


def _signature(module: nn.Module) -> tuple[Any, ...]:
    # Every graph module has a class of its own, copies as well.
    kind = fx.GraphModule if isinstance(module, fx.GraphModule) else type(module)
    return kind, own_shapes(module), _widths(module)


def _widths(module: nn.Module) -> dict[str, int]:
    own = vars(module)  # what is computed from other things cannot be set
    return {name: own[name] for name in WIDTHS if isinstance(own.get(name), int)}
