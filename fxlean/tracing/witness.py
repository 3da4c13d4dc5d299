"""What happens inside a trace: where Python looks at values, and which tensors outlive it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import TraceError
from .leaves import CODE

# Whatever turns a tensor into a value of Python, or reads its memory: a traced one has neither.
METHODS = "item tolist numpy __array__ __bool__ __int__ __float__ __complex__ __index__ equal"
LOOKS = {getattr(Tensor, name) for name in METHODS.split()} | {torch.equal, torch.is_nonzero}
DEPTH, MOST = 5, 1000  # how far and how wide the search for holders goes


class Witness:
    """Is there at one or more traces, and knows afterwards which of their tensors are left."""

    def __init__(self) -> None:
        self._trackers: list[Mapping[Tensor, Any]] = []

    @contextmanager
    def of(self, state: Sequence[Tensor]) -> Iterator[None]:
        """Watch a trace from inside; the first placeholders stand for the tensors of `state`."""
        mode = get_proxy_mode()
        assert mode is not None
        # Its keys are weak references, so that it tells what is still alive.
        self._trackers.append(mode.tracer.tensor_tracker)
        with _RealValues(mode.tracer, state):
            yield

    def survivors(self) -> list[Tensor]:
        """The tensors that something outside of the traces still holds."""
        if any(len(tracker) for tracker in self._trackers):
            gc.collect()  # what is left may only be waiting for it
        return [tensor for tracker in self._trackers for tensor in tracker]


class _RealValues(TorchFunctionMode):
    """Where Python looks at values, they are computed from real parameters and buffers."""

    def __init__(self, tracer: Any, state: Sequence[Tensor]) -> None:
        super().__init__()
        self._tracer = tracer
        self._state = state

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function, on real tensors if it looks at values."""
        if func in LOOKS:
            args = tuple(self._real(arg) if isinstance(arg, Tensor) else arg for arg in args)
            with _disable_current_modes(), torch._C._DisableFuncTorch():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _real(self, tensor: Tensor) -> Tensor:
        """The value of a tensor that the model sees, from running the graph up to it.

        Raises:
            TraceError: it depends on the inputs.
        """
        if not _is_traced(tensor):
            return tensor
        torch.ops.aten.alias(tensor)  # writes a node that says which node the tensor is
        *nodes, last = self._tracer.graph.nodes
        (node,) = last.all_input_nodes
        needed, stack = {node}, [node]
        while stack:
            new = set(stack.pop().all_input_nodes) - needed
            needed |= new
            stack += new
        state = dict(zip([n for n in nodes if n.op == "placeholder"], self._state, strict=False))
        if any(found.op == "placeholder" and found not in state for found in needed):
            raise TraceError(
                "Python looks at values that depend on the inputs (item, numpy, tolist, float or "
                "a condition)"
            )
        values: dict[fx.Node, Any] = {}
        with _disable_current_modes(), torch._C._DisableFuncTorch(), torch.no_grad():
            for found in nodes:
                if found in needed:
                    values[found] = self._run(found, values, state)
        result: Tensor = values[node]
        return result

    def _run(
        self, node: fx.Node, values: Mapping[fx.Node, Any], state: Mapping[fx.Node, Tensor]
    ) -> Any:
        if node.op == "placeholder":
            return state[node].detach()
        if node.op == "get_attr":
            return getattr(self._tracer.root, str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def is_symbolic(value: Any) -> bool:
    """Whether a value in a graph, or the size of a tensor, is known at run time only."""
    if isinstance(value, tuple | list):
        return any(is_symbolic(part) for part in value)
    if isinstance(value, FakeTensor):
        return value._has_symbolic_sizes_strides
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


def holders() -> list[str]:
    """Names of global variables, in modules of Python, that hold tensors of a trace."""
    others = {*sys.stdlib_module_names, "torch"} - {"__main__"}
    found = {
        id(value): f"{name}.{key}"
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] not in others
        for key, value in list(getattr(module, "__dict__", {}).items())
        if not isinstance(value, CODE) and _reaches_traced(value)
    }
    return list(found.values())


def _reaches_traced(value: Any) -> bool:
    """Whether a tensor of a trace is close to an object."""
    found: list[Any] = [value]
    for _ in range(DEPTH):
        if any(isinstance(thing, Tensor) and _is_traced(thing) for thing in found):
            return True
        data = [thing for thing in found if not isinstance(thing, CODE)]
        found = [part for thing in data for part in gc.get_referents(thing)][:MOST]
    return False


def _is_traced(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or torch._C._functorch.is_functionaltensor(tensor)
