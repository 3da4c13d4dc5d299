"""Tensors in the containers that models take and return: the one answer to what is in them."""

from __future__ import annotations

import copy
import gc
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# What refers to half of the process, but is no data of a model.
CODE = (type, ModuleType, FunctionType, BuiltinFunctionType, nn.Module)
LOOKED_AT = 10_000  # objects that are searched for tensors


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested containers, named tuples and dataclasses, in order.

    Containers are mappings, lists, tuples, sets and deques, and all that descends from them.
    """
    if isinstance(tree, Tensor):
        return [tree]
    return [tensor for child in _children(tree) or () for tensor in tensors_in(child)]


def strangers_in(tree: Any) -> list[str]:
    """Types of the objects that hold tensors, but are none of the containers of `tensors_in`."""
    children = _children(tree)
    if children is not None:
        return [name for child in children for name in strangers_in(child)]
    return [type(tree).__qualname__] if _holds_tensors(tree) else []


def replaced(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """The tree with every tensor changed, containers in the types that they had."""
    if isinstance(tree, Tensor):
        return change(tree)
    if not tensors_in(tree):
        return tree
    if isinstance(tree, tuple):
        parts = [replaced(part, change) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if isinstance(tree, set | frozenset):
        return type(tree)(replaced(part, change) for part in tree)
    result = copy.copy(tree)
    if isinstance(tree, Mapping):
        for key, part in tree.items():
            result[key] = replaced(part, change)
    elif isinstance(tree, list | deque):
        for number, part in enumerate(tree):
            result[number] = replaced(part, change)
    else:
        for item in fields(tree):
            object.__setattr__(result, item.name, replaced(getattr(tree, item.name), change))
    return result


def as_real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, in a last dimension; others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor has data of its own, and is no subclass that computes in its own way."""
    plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return plain and tensor.layout is torch.strided and not tensor.is_meta


def _children(tree: Any) -> list[Any] | None:
    """What a container holds, nothing in a tensor; None for anything else."""
    if isinstance(tree, Tensor):
        return []
    if isinstance(tree, Mapping):
        return list(tree.values())
    if isinstance(tree, list | tuple | set | frozenset | deque):
        return list(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, item.name, None) for item in fields(tree)]
    return None


def _holds_tensors(tree: Any) -> bool:
    """Whether a tensor is within reach of an object."""
    found, seen = [tree], {id(tree)}
    for number, thing in enumerate(found):
        if isinstance(thing, Tensor):
            return True
        if isinstance(thing, CODE) or number > LOOKED_AT:
            continue
        new = [part for part in gc.get_referents(thing) if id(part) not in seen]
        seen |= {id(part) for part in new}
        found += new
    return False
