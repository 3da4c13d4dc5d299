"""Hooks of modules: those that take part in what a model computes, and those that only look."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import prune

from ..nn import RefreshMasks
from .leaves import tensors_in

# These find each other by their types, and always take part.
MASKING = (prune.BasePruningMethod, RefreshMasks)


@contextmanager
def watched_hooks(model: nn.Module) -> Iterator[tuple[set[int], int]]:
    """The numbers of the hooks that take part, while the model runs, and how many there are.

    One that returns something does, one that writes into a tensor in place, and one before the
    call that gives tensors to its module, as weight norm does. All others only look.
    """
    active: set[int] = set()
    before, after = _dictionaries(model)
    originals = [(hooks, dict(hooks)) for hooks in [*before, *after]]
    try:
        for dictionaries, assigns in ((before, True), (after, False)):
            for hooks in dictionaries:
                for number, hook in hooks.items():
                    if isinstance(hook, MASKING):
                        active.add(number)
                    else:
                        hooks[number] = _watched(hook, number, active, assigns)
        yield active, sum(len(content) for _, content in originals)
    finally:
        _put_back(originals)


@contextmanager
def only_hooks(model: nn.Module, active: Set[int]) -> Iterator[None]:
    """Without all other hooks."""
    before, after = _dictionaries(model)
    originals = [(hooks, dict(hooks)) for hooks in [*before, *after]]
    try:
        for hooks, content in originals:
            for number in content.keys() - active:
                del hooks[number]
        yield
    finally:
        _put_back(originals)


def holding_others(model: nn.Module) -> list[str]:
    """Names of the modules with a hook whose function holds on to a module of another model.

    A lambda with `self` in it does in a copy: functions are not copied, so it writes into the model
    that it was written for.
    """
    own = set(model.modules())
    return [
        name
        for name, module in model.named_modules()
        for hook in [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        for held in _closed_over(hook)
        if isinstance(held, nn.Module) and held not in own
    ]


def _closed_over(hook: Any) -> Iterator[Any]:
    """What a function refers to of where it was defined."""
    for cell in getattr(hook, "__closure__", None) or ():
        with suppress(ValueError):  # where it has not been set
            yield cell.cell_contents


def _dictionaries(model: nn.Module) -> tuple[list[dict[int, Any]], list[dict[int, Any]]]:
    """The hooks before and after the calls of all modules, with those of every model."""
    before: list[Any] = [torch_module._global_forward_pre_hooks]
    after: list[Any] = [torch_module._global_forward_hooks]
    for module in model.modules():
        before.append(module._forward_pre_hooks)
        after.append(module._forward_hooks)
    return before, after


def _put_back(originals: list[tuple[dict[int, Any], dict[int, Any]]]) -> None:
    for hooks, content in originals:
        hooks.clear()
        hooks.update(content)


def _watched(
    hook: Callable[..., Any], number: int, active: set[int], assigns: bool
) -> Callable[..., Any]:
    def run(module: nn.Module, *given: Any) -> Any:
        before = _state(module, given, assigns)
        result = hook(module, *given)
        if result is not None or _state(module, given, assigns) != before:
            active.add(number)
        return result

    return run


def _state(module: nn.Module, given: tuple[Any, ...], assigns: bool) -> list[int]:
    """How often the tensors were written, and which tensors the modules have."""
    found = [tensor._version for tensor in tensors_in(given) if not tensor.is_inference()]
    if assigns:
        for child in module.modules():
            attributes = (vars(child), child._parameters, child._buffers)
            found += [id(tensor) for held in attributes for tensor in tensors_in([*held.values()])]
    return found
