"""A real run of a model before its trace, so that caches fill and Python takes its true way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ArgumentError, TraceError, first_line, some
from .hooks import holding_others, watched_hooks
from .inputs import Arguments, as_arguments, call, describe, guesses, names_only
from .leaves import is_ordinary, replaced, tensors_in
from .sandbox import running, unwritten
from .snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class Call:
    """Arguments and result of the first call of a module in the real run."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """What a real run has shown.

    Attributes:
        arguments: that the model accepted.
        calls: the first call of every module that was called, by name.
        hooks: numbers of the hooks that take part in what the model computes.
        onlookers: whether there are others.
        dependent: the tensors that were computed from the inputs, or are left from a call before.
    """

    arguments: Arguments
    calls: Mapping[str, Call]
    hooks: frozenset[int]
    onlookers: bool
    dependent: Dependent


def rehearse(model: nn.Module, arguments: Arguments) -> Rehearsal:
    """Run a model once on copies of the arguments; raises whatever the model raises."""
    calls: dict[str, Call] = {}
    copies: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        return copies.setdefault(id(tensor), tensor.detach().clone())

    with running(model) as before, watched_hooks(model) as (hooks, watched):
        own = replaced(arguments, copied)
        for name, module in model.named_modules():
            _record(module, name, calls)
        with Dependent(tensors_in(own)) as dependent:
            result = call(model, own)
        dependent.add_unread(before.replaced())
        # A model may have a `__call__` of its own, which no hook sees.
        args, kwargs = ((), own) if isinstance(own, dict) else (own, {})
        calls.setdefault("", Call(args, kwargs, result))
    return Rehearsal(arguments, calls, frozenset(hooks), watched > len(hooks), dependent)


def fill_caches(model: nn.Module, name: str, first: Call) -> Dependent:
    """Call a module of a model again, for what it keeps in attributes, which then stays there.

    Returns the tensors that were computed from its inputs.

    Raises:
        TraceError: it keeps nothing.
    """
    args, kwargs = replaced((first.args, dict(first.kwargs)), lambda tensor: tensor.clone())
    before = Snapshot(model)
    dependent = Dependent(tensors_in((args, kwargs)))
    with unwritten(model), dependent:
        model.get_submodule(name)(*args, **kwargs)
    if not before.has_changed():
        raise TraceError("it keeps nothing from call to call")
    return dependent


def rehearsed(model: nn.Module, example_inputs: Any = None) -> Rehearsal:
    """A real run on the example inputs, or on the first of the common sizes that fits.

    Raises:
        ArgumentError: the model rejects the example inputs that it was given.
        TraceError: no inputs that were tried fit.
    """
    if example_inputs is not None:
        candidates = [as_arguments(example_inputs)]
    else:
        candidates = list(guesses(model))
    failure: Exception | None = None
    for arguments in candidates:
        try:
            return rehearse(model, arguments)
        except Exception as err:  # whatever the model raises at a size that it rejects
            failure = err
    assert failure is not None
    if example_inputs is not None:
        raise ArgumentError(
            f"{type(model).__name__} rejects the example inputs {describe(candidates[0])}: "
            f"{first_line(failure)}. {_next_step(model)}"
        ) from failure
    tried = ", ".join(describe(arguments) for arguments in candidates)
    raise TraceError(
        f"{type(model).__name__} accepts none of the inputs tried ({tried}); the last failed "
        f"with: {first_line(failure)}. Pass example_inputs=, a tensor, a tuple of arguments or a "
        "dict of keyword arguments."
    ) from failure


def _next_step(model: nn.Module) -> str:
    names = names_only(model)
    if names:
        given = ", ".join(f"{name}=..." for name in names)
        return f"Its forward takes {some(names)} by name: pass example_inputs=dict({given})."
    hooked = holding_others(model)
    if hooked:
        return (
            f"It may be for the hooks of {some(hooked)}: their functions hold another module, as a "
            "lambda with self in it does in every copy of its model. Register methods instead, or "
            "functools.partial(function, self), which are copied with it."
        )
    return (
        "Pass example_inputs that model(*example_inputs) accepts, or a dict for "
        "model(**example_inputs)."
    )


def _record(module: nn.Module, name: str, calls: dict[str, Call]) -> None:
    """Note the first call of a module; a call may be inside of another of the same module."""
    started: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        started.append((args, kwargs))

    def after(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        given, named = started.pop()
        calls.setdefault(name, Call(given, named, result))

    module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    module.register_forward_hook(after, with_kwargs=True)


class Dependent(TorchDispatchMode):
    """Follows which tensors are computed from others while it is active."""

    def __init__(self, sources: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # A weak reference keeps the address of a storage from being used again.
        self._storages: dict[int, StorageWeakRef] = {}
        self._read: set[int] = set()
        for tensor in sources:
            self._add(tensor)

    def add_unread(self, tensors: Sequence[Tensor]) -> None:
        """Take those for dependent that no operator has read, and that have lived all the while."""
        for tensor in tensors:
            if is_ordinary(tensor) and tensor.untyped_storage()._cdata not in self._read:
                self._add(tensor)

    def __contains__(self, tensor: Tensor) -> bool:
        return is_ordinary(tensor) and tensor.untyped_storage()._cdata in self._storages

    def _add(self, tensor: Tensor) -> None:
        if is_ordinary(tensor) and tensor not in self:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = StorageWeakRef(storage)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator; what it returns depends on what it is given, if more than its shape."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [t for t in tensors_in((args, kwargs)) if is_ordinary(t)]
        self._read.update(tensor.untyped_storage()._cdata for tensor in given)
        reads = not func.__name__.startswith("new_") and "_like." not in func.__name__
        if reads and any(tensor in self for tensor in given):
            for tensor in tensors_in(result):
                self._add(tensor)
        return result
