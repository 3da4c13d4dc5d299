"""`save` and `load`: weights, masks and shape of a network in a file, without pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ArgumentError, first_line
from ..masking import masked, remove_masks
from ..nn import RefreshMasks
from ..tracing.arguments import check_model, unwrapped
from ..tracing.sandbox import on_cpu, untouched
from ..version import __version__
from .layout import dense_shapes, forms, is_rewritten, named_tensors
from .packing import packed
from .reading import FORMAT, KEY, check_fit, read
from .rebuild import cut_to, fill, put_masks

Model = TypeVar("Model", bound=nn.Module)


@on_cpu()
def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write weights, masks and shape of a network to a file, without pickle.

    The file has the format of safetensors, with JSON in its header, and holds no more numbers than
    the dense network: of masked weights only what is kept, so that after `load` the rest is zero.

    Args:
        model: pruned, compacted, both, or neither; not changed.
        path: of the file; one that is there is replaced as a whole.

    Raises:
        ArgumentError: `compact` has written the model anew, modules keep what is no tensor, or
            masks hold other numbers than 0 and 1.
        OSError: the path is a folder, or in none that there is, or cannot be written.

    >>> import tempfile
    >>> small = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(small, f"{folder}/small.safetensors")
    ...     same = load(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), f"{folder}/small.safetensors")
    >>> torch.equal(same[0].weight, small[0].weight)
    True
    """
    check_model(model)
    model = unwrapped(model)
    _check_storable(model)
    _check_place(path)
    found = [(f"{prefix}{name}", module, name) for prefix, module, name in masked(model)]
    masks = {full: module.get_buffer(f"{name}_mask") for full, module, name in found}
    tensors: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    same: dict[str, str] = {}
    for name, tensor in named_tensors(model):
        known = first.setdefault(id(tensor), name)
        if known != name and _equal(masks.get(known), masks.get(name)):
            same[name] = known
        elif name in masks:
            tensors |= packed(name, tensor, masks[name])
        else:
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    draft = Path(f"{os.fspath(path)}.part")
    try:
        save_file(tensors, draft, {"format": "pt", KEY: json.dumps(_header(model, masks, same))})
        draft.replace(path)
    except SafetensorError as err:
        raise OSError(f"{os.fspath(path)} cannot be written: {first_line(err)}") from err
    finally:
        draft.unlink(missing_ok=True)


@on_cpu()
@torch.inference_mode(False)
def load(model: Model, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> Model:
    """Put what was saved into a newly built dense model, which gets the same masks and shape.

    Args:
        model: of the same code as the one that was saved; changed in place, unless there is an
            error. Types, devices, training mode and what requires gradients stay its own.
        source: a file of `save`, a file with a `state_dict` that `torch.save` or safetensors has
            written, or a `state_dict`; of plain, pruned or wrapped models. A `state_dict` of a
            compacted model does not say how to cut, and fits only a model that is cut already.

    Returns:
        The model.

    Raises:
        ArgumentError: the file does not fit; says which layers differ.
    """
    check_model(model)
    target = unwrapped(model)
    saved = read(source, target)
    check_fit(target, saved)
    with untouched(target, always=False), torch.no_grad():
        remove_masks(target, permanent=False)
        if forms(target) != saved.forms:
            cut_to(target, saved.forms, saved.tensors)
        put_masks(target, saved.masks, saved.callers)
        fill(target, saved.tensors, saved.same)
    return model


def _header(
    model: nn.Module, masks: Mapping[str, Tensor], same: Mapping[str, str]
) -> dict[str, Any]:
    """What a file says of a network besides its tensors, as plain data."""
    return {
        "format": FORMAT,
        "fxlean": __version__,
        "torch": str(torch.__version__),
        "model": type(model).__name__,
        "shapes": dense_shapes(model),
        "forms": forms(model),
        "masked": {name: list(mask.shape) for name, mask in masks.items()},
        "same": same,
        "callers": [
            [place, hook.path]
            for place, module in model.named_modules()
            for hook in module._forward_pre_hooks.values()
            if isinstance(hook, RefreshMasks)
        ],
    }


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    """Whether two parameters are masked alike."""
    if left is None or right is None:
        return left is right
    return torch.equal(left, right)


def _check_place(path: Any) -> None:
    """Reject what is no place for a file."""
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(f"path is a {type(path).__name__}. Pass the path of a file.")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder. Pass the path of a file in it.")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder}. Make it, or pass another path.")


def _check_storable(model: nn.Module) -> None:
    """Reject what cannot be rebuilt from tensors and JSON."""
    for prefix, module, name in masked(model):
        mask = module.get_buffer(f"{name}_mask")
        if not ((mask == 0) | (mask == 1)).all():
            raise ArgumentError(
                f"{prefix}{name}_mask holds other numbers than 0 and 1, as where buffers were "
                "averaged. Copy the masks of the trained model instead, such as by "
                "AveragedModel(model, use_buffers=False)."
            )
    for path, module in model.named_modules():
        where = path or type(model).__name__
        if is_rewritten(module):
            raise ArgumentError(
                f"{where}: compact has written this model anew, as a graph of its own code, which "
                "cannot be stored without pickle. Save the model before it is compacted, and "
                "compact it again after loading; or export it with torch.export."
            )
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ArgumentError(
                f"{where}: {type(module).__name__} keeps state that is no tensor "
                "(get_extra_state). Save model.state_dict() with torch.save instead."
            )
