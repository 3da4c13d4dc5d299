"""Files and `state_dict`s, as plain data; and whether they fit a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import ArgumentError, first_line, some
from .layout import Form, Shapes, dense_shapes, forms, named_tensors
from .packing import unpacked

FORMAT = 1
KEY = "fxlean"  # of our part in the header
COMPILED = "_orig_mod."  # what torch.compile puts into names
COUNTER = "n_averaged"  # of AveragedModel, which holds nothing else by itself
MOST = 5  # differences in one message


@dataclass(frozen=True)
class Saved:
    """What is in a file.

    Attributes:
        origin: where it comes from, for messages.
        shapes: names and shapes of all that the network saves: without masks, and before
            compaction where the file says so.
        forms: of the layers that compaction has changed, see `layout.form_of`.
        tensors: values by name.
        masks: by the name of the parameter, True where it is kept.
        same: names of parameters that are the same as another one, and the name of that.
        callers: see `put_masks`; None for a plain state.
    """

    origin: str
    shapes: Shapes
    forms: Mapping[str, Form]
    tensors: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    same: Mapping[str, str]
    callers: list[list[str]] | None


def read(source: Any, model: nn.Module) -> Saved:
    """What is in a file or `state_dict`, for a model; see `load`."""
    if isinstance(source, Mapping):
        return _of_state(source, "the state_dict", model)
    if not isinstance(source, str | os.PathLike):
        raise ArgumentError(f"source is a {type(source).__name__}. Pass a path or a state_dict.")
    path = os.fspath(source)
    with open(path, "rb") as file:
        is_safe = file.read(9)[8:] == b"{"
    try:
        if not is_safe:
            tensors, header = torch.load(path, map_location="cpu", weights_only=True), None
        else:
            with safe_open(path, "pt") as opened:
                header = (opened.metadata() or {}).get(KEY)
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as err:  # of pickle, zip and safetensors, each its own
        raise ArgumentError(
            f"{path} cannot be read ({type(err).__name__}). Pass a file of fxlean.save, or of "
            "torch.save with a state_dict; of a whole model in a file that you trust, pass "
            "torch.load(path, weights_only=False).state_dict()."
        ) from err
    if header is None:
        return _of_state(tensors, path, model)
    if not any(COMPILED in name for name, _ in model.named_modules()):
        tensors = {name.replace(COMPILED, ""): tensor for name, tensor in tensors.items()}
        header = header.replace(COMPILED, "")
    try:
        return _of_file(tensors, json.loads(header), path)
    except ArgumentError:
        raise
    except (KeyError, TypeError, ValueError) as err:
        raise ArgumentError(
            f"{path} is not as fxlean.save wrote it ({first_line(err)}). Save the model anew."
        ) from err


def _of_file(tensors: dict[str, Tensor], header: dict[str, Any], path: str) -> Saved:
    """What a file of `save` holds."""
    origin = "{} (fxlean {fxlean}, torch {torch}, {model})".format(path, **header)
    if header["format"] > FORMAT:
        raise ArgumentError(
            f"{origin} has format {header['format']}, and this fxlean reads up to {FORMAT}. "
            "Install the newer fxlean."
        )
    same, masks = header["same"], {}
    for name, shape in header["masked"].items():
        if name not in same:
            tensors[name], masks[name] = unpacked(name, tensors, torch.Size(shape))
    masks |= {name: masks[same[name]] for name in header["masked"] if name in same}
    shapes, callers = header["shapes"], header["callers"]
    cut = header["forms"]
    there = {**tensors, **same}
    lost = [name for name in shapes if name not in there and name.rpartition(".")[0] not in cut]
    if lost:
        raise KeyError(some(lost))
    return Saved(origin, shapes, cut, tensors, masks, same, callers)


def _of_state(state: Any, origin: str, model: nn.Module) -> Saved:
    """What a `state_dict` holds; masks as `torch.nn.utils.prune` writes them."""
    if not isinstance(state, Mapping):
        raise ArgumentError(f"{origin} holds a {type(state).__name__}. Pass a state_dict.")
    others = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ArgumentError(
            f"{origin} holds what is no tensor: {some(others)}. Pass the state_dict in it, such as "
            "fxlean.load(model, torch.load(path)['state_dict'])."
        )
    state = _without_wrappers(state, model)
    tensors: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for name, tensor in state.items():
        plain = name.removesuffix("_orig")
        mask = state.get(f"{plain}_mask")
        if plain != name and mask is not None:
            if mask.shape != tensor.shape:
                raise ArgumentError(
                    f"{origin} has a mask of shape {tuple(mask.shape)} for {plain}, which is "
                    f"{tuple(tensor.shape)}. Pass a state_dict as the model gave it."
                )
            tensors[plain], masks[plain] = tensor, mask != 0
        elif f"{name.removesuffix('_mask')}_orig" not in state:
            tensors[name] = tensor
    same = _same(tensors, model)
    shapes = {name: list(tensors[same.get(name, name)].shape) for name in {**tensors, **same}}
    return Saved(origin, shapes, forms(model), tensors, masks, same, None)


def _without_wrappers(state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """A state without what stands before all names and is not in the model.

    As of DistributedDataParallel, torch.compile, AveragedModel, or the attribute of a
    LightningModule.
    """
    known = {name for name, _ in named_tensors(model, remove_duplicate=False)}
    if not any(COMPILED in name for name in known):
        state = {name.replace(COMPILED, ""): tensor for name, tensor in state.items()}
    inner = {name: t for name, t in state.items() if name != COUNTER or name in known}
    while inner and not any(name.removesuffix("_orig") in known for name in inner):
        wrapper = next(iter(inner)).partition(".")[0] + "."
        if not all(name.startswith(wrapper) for name in inner):
            return state
        inner = {name.removeprefix(wrapper): tensor for name, tensor in inner.items()}
    return inner


def _same(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, str]:
    """Names of what is one tensor in the model, and in the state given once or the same."""
    first: dict[int, str] = {}
    same: dict[str, str] = {}
    named = named_tensors(model, remove_duplicate=False)
    for name, tensor in sorted(named, key=lambda pair: pair[0] not in tensors):
        known = first.setdefault(id(tensor), name)
        if known in tensors and known != name:
            given = tensors.get(name)
            if given is None or torch.equal(given, tensors[known]):
                same[name] = known
    return same


def check_fit(model: nn.Module, saved: Saved) -> None:
    """Reject a file that does not fit a model.

    Raises:
        ArgumentError: says which layers differ.
    """
    present, name = forms(model), type(model).__name__
    if present and present != saved.forms:
        layers = sorted(
            path
            for path in {**present, **saved.forms}
            if present.get(path) != saved.forms.get(path)
        )
        raise ArgumentError(
            f"{name} is compacted already, and not as in {saved.origin}: {some(layers)}. Build the "
            "dense model anew, and load into that."
        )
    if saved.callers is None:
        named = named_tensors(model, remove_duplicate=False)
        here = {full: list(tensor.shape) for full, tensor in named}
        hint = ", or save compacted models with fxlean.save"
    else:
        here, hint = dense_shapes(model), ""
    there = saved.shapes
    problems = [
        f"{full} is {tuple(there[full])} there and {tuple(shape)} in the model"
        for full, shape in here.items()
        if full in there and there[full] != shape
    ]
    for where, names in (
        ("there", [full for full in there if full not in here]),
        ("in the model", [full for full in here if full not in there]),
    ):
        problems += [f"only {where}: {some(names)}"] if names else []
    if problems:
        more = f"; and {len(problems) - MOST} more" if len(problems) > MOST else ""
        raise ArgumentError(
            f"{saved.origin} does not fit {name}: {'; '.join(problems[:MOST])}{more}. Build the "
            f"model with the code and the sizes of the one that was saved{hint}."
        )
