"""What hangs on a model, to be put back: attributes, containers in them, and values of tensors."""

from __future__ import annotations

import operator
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from .leaves import CODE, is_ordinary

CONTAINERS = (dict, list, set, deque)
PLAIN = frozenset({str, int, float, bool, type(None), torch.device, torch.dtype, nn.Parameter})
LONGEST = 1000  # longer containers are put back, but what is in them is not looked into
MOST = 10_000  # objects of one module that are looked into; some hold on to a whole trainer


class Snapshot:
    """A model as it is now.

    Containers and plain objects that hang on a module are kept with what is in them, at any
    depth. Values are kept for buffers; of parameters and masks, which no forward pass should
    write, just which data are theirs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._contents: dict[int, tuple[Any, list[Any]]] = {}
        for module in model.modules():
            self._keep(vars(module))
        tensors = [*model.parameters(), *model.buffers()]
        self._data = [(tensor, tensor.data) for tensor in tensors if is_ordinary(tensor)]
        written = [buffer for module in model.modules() for buffer in _written(module)]
        self._values = [(buffer, buffer.clone()) for buffer in written]

    def has_changed(self) -> bool:
        """Whether anything else is in some container now."""
        return not all(_holds(*found) for found in self._contents.values())

    def replaced(self) -> list[Tensor]:
        """Tensors that were in some container, and are not in it now."""
        found = []
        for container, content in self._contents.values():
            now = {id(thing) for thing in _content(container)}
            found += [t for t in content if isinstance(t, Tensor) and id(t) not in now]
        return found

    def put_back(self) -> None:
        """Make the model what it was."""
        for container, content in self._contents.values():
            if not _holds(container, content):
                _fill(container, content)
        for tensor, data in self._data:
            if tensor.data_ptr() != data.data_ptr():
                tensor.data = data
        with torch.no_grad():
            for buffer, value in self._values:
                if buffer.grad_fn is not None:
                    buffer.detach_()  # written in place by what is to be trained
                if not torch.equal(buffer, value):
                    buffer.resize_(value.shape).copy_(value)

    def _keep(self, root: Any) -> None:
        """Keep what a dictionary of attributes holds, the closest first."""
        found = [root]
        for number, thing in enumerate(found):
            container = thing if isinstance(thing, tuple) else _container(thing)
            if container is None or id(container) in self._contents:
                continue
            content = _content(container)
            self._contents[id(container)] = (container, content)
            if content and len(content) <= LONGEST and number < MOST:
                found += [part for part in content if type(part) not in PLAIN]


def _content(container: Any) -> list[Any]:
    """What a container holds, in order; keys of a dictionary before its values."""
    if not container:
        return []  # as most of a module's dictionaries are
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _holds(container: Any, content: list[Any]) -> bool:
    """Whether the same objects are in a container as before."""
    now = _content(container)
    return len(now) == len(content) and all(map(operator.is_, now, content))


def _fill(container: Any, content: list[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        half = len(content) // 2
        container.update(zip(content[:half], content[half:], strict=True))
    elif isinstance(container, set):
        container.update(content)
    else:
        container.extend(content)


def _container(value: Any) -> Any:
    """The container itself, or the attributes of a plain object; None for anything else."""
    if isinstance(value, CONTAINERS):
        return value
    if isinstance(value, (Tensor, *CODE)) or type(value).__module__.split(".")[0] == "torch":
        return None
    attributes = getattr(value, "__dict__", None)
    return attributes if type(attributes) is dict else None


def _written(module: nn.Module) -> list[Tensor]:
    """The module's own buffers that a forward pass may write."""
    masked = [key.removesuffix("_orig") for key in module._parameters if key.endswith("_orig")]
    masks = {f"{name}_mask" for name in masked}
    named = module.named_buffers(recurse=False)
    return [buffer for name, buffer in named if not buffer.is_meta and name not in masks]
