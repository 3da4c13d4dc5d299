"""Blocks of code that leave a model as they found it, or ignore the default device."""

from __future__ import annotations

import copy
import gc
import logging
import random
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ArgumentError, first_line, telling_once
from .leaves import is_ordinary, tensors_in
from .snapshot import Snapshot

# Tracing and random states are of the whole process, so one thread at a time has them.
LOCK = threading.RLock()
AUTOCAST = ("cpu", "cuda")


@contextmanager
def ordinary() -> Iterator[None]:
    """Neither inference mode nor autocast, in which a caller may be: values as the model has them.

    What is made there are ordinary tensors, that can be trained. No warning is given twice.
    """
    with telling_once(), ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in filter(torch.is_autocast_enabled, AUTOCAST):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def untouched(model: nn.Module, *, always: bool = True) -> Iterator[Snapshot]:
    """Put back attributes, parameters, buffers, hooks, training flags and random states on leaving.

    With `always=False` only if the block raises, and random states never. Values that the block
    writes into tensors in place are put back for buffers, not for parameters and masks. Yields the
    model as it was.
    """
    with LOCK, same_random_states(model) if always else nullcontext():
        before = Snapshot(model)
        done = False
        try:
            yield before
            done = not always
        finally:
            if not done:
                before.put_back()


@contextmanager
def same_random_states(model: nn.Module) -> Iterator[None]:
    """Put back the random states of torch, numpy and Python on leaving.

    Wherever operators of a graph are run: some of them draw numbers.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the one of models
    with torch.random.fork_rng(list(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def evaluating(model: nn.Module) -> Iterator[Snapshot]:
    """In eval mode without gradients, silent, as eager code, and everything as before afterwards.

    For tensors without values; `running` is for real ones.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")  # prints whatever does not fit
    silent = log.disabled
    with (
        untouched(model) as before,
        ordinary(),
        torch.no_grad(),
        warnings.catch_warnings(),
        _uncompiled(),
    ):
        warnings.simplefilter("ignore")
        for module in model.modules():
            module.training = False
        log.disabled = True
        try:
            yield before
        finally:
            log.disabled = silent


@contextmanager
def running(model: nn.Module) -> Iterator[Snapshot]:
    """Like `evaluating`, and parameters that the block writes in place are put back as well."""
    with evaluating(model) as before, unwritten(model):
        yield before


@contextmanager
def unwritten(model: nn.Module) -> Iterator[None]:
    """Put back the values of parameters and masks that the block writes in place."""
    writes = _Writes(model)
    with writes:
        try:
            yield
        finally:
            writes.put_back()


class _Writes(TorchDispatchMode):
    """Keeps the values of parameters and masks from before their first in-place write."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors: defaultdict[int, list[Tensor]] = defaultdict(list)
        for tensor in [*model.parameters(), *model.buffers()]:
            if is_ordinary(tensor):
                self._tensors[_storage(tensor)].append(tensor.detach())
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator, after a copy of what it is about to overwrite."""
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            given = dict(zip((argument.name for argument in schema.arguments), args, strict=False))
            for argument in schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in tensors_in((given | dict(kwargs)).get(argument.name)):
                        self._keep(tensor)
        return func(*args, **kwargs)

    def _keep(self, written: Tensor) -> None:
        if is_ordinary(written):
            tensors = self._tensors.pop(_storage(written), [])
            self._before += [(tensor, tensor.clone()) for tensor in tensors]

    def put_back(self) -> None:
        """Write the values from before."""
        for tensor, value in self._before:
            tensor.copy_(value)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Run what `torch.compile` has compiled as the code that it was, also in a trace."""
    nested = torch._dynamo.config.patch(error_on_nested_fx_trace=False)
    with torch.compiler.set_stance("force_eager"), nested:
        yield


@contextmanager
def on_cpu() -> Iterator[None]:
    """New tensors on the CPU, where our own numbers are, whatever the default device is."""
    if torch.empty(0).device.type == "cpu":
        yield  # a device context costs time at every call of torch
    else:
        with torch.device("cpu"):
            yield


@contextmanager
def paused_collection() -> Iterator[None]:
    """No garbage collection: it would look at all objects of torch, again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def copied(model: nn.Module, shared: Iterable[object] = ()) -> nn.Module:
    """A deep copy, `shared` aside; computed tensors, which deepcopy refuses, are detached in it.

    Every module is in the mode that it was in: graph modules do not take care of that.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    try:
        result: nn.Module = _deep(model, memo)
    except Exception as err:  # whatever an attribute raises
        attribute = _uncopied(model, memo)
        if attribute is None:
            raise
        raise ArgumentError(
            f"{type(model).__name__} cannot be copied, for its attribute {attribute} cannot: "
            f"{first_line(err)}. Delete it, or set it to None, before the call."
        ) from err
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in result.named_modules():
        module.training = modes.get(name, module.training)
    return result


class _Detached(TorchFunctionMode):
    """Deep copies of computed tensors are their values."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def _deep(value: Any, memo: Mapping[int, Any]) -> Any:
    with _Detached():
        return copy.deepcopy(value, dict(memo))


def _uncopied(model: nn.Module, memo: Mapping[int, Any]) -> str | None:
    """The attribute that keeps a model from being copied, if any does."""
    for path, module in reversed([*model.named_modules()]):
        for key, value in vars(module).items():
            try:
                _deep(value, memo)
            except Exception:
                return f"{path}.{key}".removeprefix(".")
    return None
