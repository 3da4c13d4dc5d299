"""Checks of models, and of what users name in them."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, shown, some


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Reject what is no whole number, or too small."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ArgumentError(f"{name} is {shown(value)}. Pass a whole number of at least {least}.")


def check_model(model: Any, argument: str = "model") -> None:
    """Reject what is no module, or has no values to weigh."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{argument} is a {type(model).__name__}. Pass a torch.nn.Module.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError(
            f"{type(model).__name__} is compiled by TorchScript, which cannot be traced. Prune "
            "the original module, then script it."
        )
    sharded = [name or type(m).__name__ for name, m in model.named_modules() if _is_sharded(m)]
    if sharded:
        raise ArgumentError(
            f"sharded over processes, so that no process has whole weights: {some(sharded)}. Prune "
            "the model before it is sharded; masks are sharded with it."
        )
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ArgumentError(
            f"parameters have no shape yet: {some(lazy)}. Run the model once before pruning."
        )
    made = [name for name, parameter in model.named_parameters() if parameter.is_inference()]
    if made:
        raise ArgumentError(
            f"parameters were made in inference mode, where nothing can be trained: {some(made)}. "
            "Pass a copy that is made outside of it: copy.deepcopy(model)."
        )
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if meta:
        raise ArgumentError(
            f"parameters are on the meta device and hold no values: {some(meta)}. Load weights "
            "with model.to_empty(device=...) and load_state_dict before pruning."
        )


def check_traceable(model: nn.Module) -> None:
    """Reject modules and weights that no trace can stand for."""
    modules = dict(model.named_modules())
    scripted = [n for n, module in modules.items() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        raise ArgumentError(
            f"compiled by TorchScript, which cannot be traced: {some(scripted)}. Prune with the "
            "original modules in their place, then script them."
        )
    quantised = [name for name, module in modules.items() if _quantises(module)]
    if quantised:
        raise ArgumentError(
            f"prepared for quantisation, with observers that cannot be traced: {some(quantised)}. "
            "Prune the model before torch.ao.quantization prepares it."
        )
    convolutions = {n: m for n, m in modules.items() if isinstance(m, nn.modules.conv._ConvNd)}
    unreal = [n for n, m in convolutions.items() if any(p.is_complex() for p in m.parameters())]
    if unreal:
        raise ArgumentError(
            f"convolutions with complex weights: {some(unreal)}. Norms are of real kernels: keep "
            "real and imaginary parts in convolutions of their own."
        )
    _check_tensors([*model.named_parameters(), *model.named_buffers()])


def check_unfrozen(model: nn.Module) -> None:
    """Reject a model of which no parameter may change."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ArgumentError(
            f"no parameter of {type(model).__name__} requires gradients, so none may change. Set "
            "requires_grad where weights may change, model.requires_grad_(True) for all."
        )


def _quantises(module: nn.Module) -> bool:
    """Whether a module observes or imitates quantisation, if anybody has loaded such modules."""
    kinds = {"observer": "ObserverBase", "fake_quantize": "FakeQuantizeBase"}
    loaded = {
        kind: sys.modules.get(f"torch.ao.quantization.{name}") for name, kind in kinds.items()
    }
    return any(isinstance(module, getattr(found, kind, ())) for kind, found in loaded.items())


def _is_sharded(module: nn.Module) -> bool:
    """Whether FSDP, 1 or 2, has the weights of a module, if anybody has loaded it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = [getattr(fsdp, name, None) for name in ("FullyShardedDataParallel", "FSDPModule")]
    return isinstance(module, tuple(kind for kind in kinds if kind is not None))


def _check_tensors(named: Iterable[tuple[str, Tensor]]) -> None:
    """Reject tensors that compute in their own way."""
    plain = Tensor.__torch_dispatch__
    others = {
        name: tensor for name, tensor in named if type(tensor).__torch_dispatch__ is not plain
    }
    if others:
        kinds = sorted({type(tensor).__name__ for tensor in others.values()})
        raise ArgumentError(
            f"{some([*others])}: of type {some(kinds)}, tensors that compute in their own way and "
            "cannot be traced. Prune the model before they replace its weights (quantisation, "
            "sharding)."
        )


def check_finite(model: nn.Module, used: Container[str]) -> None:
    """Reject biases and scales that hold NaN or infinity, among the parameters that are used."""
    broken = [
        name.rpartition(".")[0] or name
        for name, parameter in model.named_parameters()
        if parameter.dim() < 2 and name in used and not parameter.isfinite().all()
    ]
    if broken:
        raise ArgumentError(
            f"biases or scales hold NaN or infinity in: {some(broken)}. Repair or reload these "
            "layers before pruning."
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile` and the data-parallel wrappers."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, wrappers):
            model = model.module
        else:
            return model


def resolve_ignored(model: nn.Module, ignore: Any, option: str = "ignore") -> frozenset[str]:
    """Names of the parameters that `ignore` covers.

    Args:
        model: whose parameters they are.
        ignore: names of modules or parameters, glob patterns, modules, module types, or one of
            them. A module covers what it contains.
        option: what the user calls them.

    Raises:
        ArgumentError: an entry is of another type, or matches nothing.
    """
    several = isinstance(ignore, Iterable) and not isinstance(ignore, str | nn.Module | type)
    entries = list(ignore) if several else [ignore]
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    ignored: set[int] = set()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = []
    for entry in entries:
        roots = [name for name, module in modules.items() if _matches(entry, name, module)]
        direct = [n for n in names if isinstance(entry, str) and _glob(entry, public_name(n))]
        if not roots and not direct:
            missing.append(entry)
        below = [n for n in names for root in roots if n.startswith(f"{root}.") or root == ""]
        ignored |= {id(parameters[name]) for name in direct + below}
    if missing:
        raise ArgumentError(
            f"{option} entries match nothing in {type(model).__name__}: "
            f"{', '.join(repr(entry) for entry in missing)}. Pass names from "
            "model.named_modules(), glob patterns on them, modules of this model or their types."
        )
    return frozenset(name for name, parameter in parameters.items() if id(parameter) in ignored)


def _matches(entry: Any, name: str, module: nn.Module) -> bool:
    if isinstance(entry, str):
        return _glob(entry, name)
    if isinstance(entry, type):
        return isinstance(module, entry)
    return module is entry


def _glob(pattern: str, name: str) -> bool:
    return bool(name) and (name == pattern or fnmatchcase(name, pattern))


def public_name(name: str) -> str:
    """The name of a parameter without the suffix that `torch.nn.utils.prune` gives it."""
    return name.removesuffix("_orig")
