"""Python functions in the one form that traces well: custom autograd functions, and products."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import Function, function
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
EXPANDS = {aten.expand.default, aten.view.default, aten._unsafe_view.default}
LINEAR = F.linear
PRODUCTS = {LINEAR, torch.matmul, Tensor.matmul, Tensor.__matmul__}
PLACE = "custom_function_call"  # what `apply` ends in under a function transform


@contextmanager
def functions_as_code() -> Iterator[None]:
    """Let `apply` run the forward pass as ordinary code, within function transforms.

    These refuse a function without a `setup_context`, and functionalisation any function at all.
    `apply` itself may be known to the model under another name, and so cannot be replaced.
    """
    originals: list[tuple[Any, str, Any]] = [(function, PLACE, getattr(function, PLACE))]
    contexts = [cls for cls in _descendants(Function) if _takes_context(cls)]
    for cls in contexts:
        originals += [(cls, name, vars(cls).get(name)) for name in ("forward", "setup_context")]
    try:
        setattr(function, PLACE, lambda cls, *args, **kwargs: cls.forward(*args, **kwargs))
        for cls in contexts:
            cls.setup_context = staticmethod(lambda *_: None)
            if "forward" in vars(cls):
                cls.forward = staticmethod(_without_context(cls.forward))
        yield
    finally:
        for owner, name, value in originals:
            if value is not None:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)


def _descendants(cls: type) -> Iterator[Any]:
    children: list[Any] = cls.__subclasses__()
    for child in children:
        yield child
        yield from _descendants(child)


def _takes_context(cls: Any) -> bool:
    """Whether `forward` itself is given the context, so that there is no `setup_context`."""
    return cls.setup_context is Function.setup_context


def _without_context(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        context: Any = FunctionCtx()
        context.needs_input_grad = (False,) * len(args)
        return forward(context, *args, **kwargs)

    return run


@contextmanager
def products_by_matrices() -> Iterator[None]:
    """Let a product by a matrix be one of matrices, whatever dimensions its other factor has.

    Otherwise torch expands the matrix, and nobody knows the weight any more, where it does not
    require gradients (frozen, or masked) and the values are permuted. Functions of torch that are
    written in Python, such as that of multi-head attention, hide what they call from a mode, so
    the function that they call is replaced.
    """
    F.linear = lambda *args, **kwargs: _multiplied(LINEAR, args, kwargs)
    try:
        with _Products():
            yield
    finally:
        F.linear = LINEAR


class _Products(TorchFunctionMode):
    """Runs products on what is flattened to a matrix."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function."""
        kwargs = kwargs or {}
        return _multiplied(func, args, kwargs) if func in PRODUCTS else func(*args, **kwargs)


def _multiplied(product: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if len(args) < 2 or args[0].dim() < 3 or args[1].dim() != 2:
        return product(*args, **kwargs)
    left, *others = args
    return product(left.flatten(0, -2), *others, **kwargs).unflatten(0, left.shape[:-1])


def multiply_by_matrices(module: fx.GraphModule, inputs: Collection[fx.Node]) -> None:
    """Let products by a weight that torch has expanded be products of two matrices, in place.

    For what no mode sees: the products of recurrent layers, which are not written in Python.
    """
    graph, dependent, found = module.graph, set(inputs), False
    for node in list(graph.nodes):
        if dependent.isdisjoint(node.all_input_nodes):
            continue
        dependent.add(node)
        weight = _expanded(node.args[1]) if node.target is aten.bmm.default else None
        if weight is None or weight in dependent:
            continue
        data, shape = node.args[0], node.meta["val"].shape
        with graph.inserting_before(node):
            for operator, *args in (
                (aten.reshape.default, (-1, data.meta["val"].shape[-1])),
                (aten.mm.default, weight),
                (aten.view.default, tuple(shape)),
            ):
                values = fx.map_arg(tuple(args), lambda arg: arg.meta["val"])
                result = operator(data.meta["val"], *values)
                data = graph.call_function(operator, (data, *args))
                data.meta["val"] = result
        dependent.add(data)
        node.replace_all_uses_with(data)
        found = True
    if found:
        graph.eliminate_dead_code()
        module.recompile()


def _expanded(node: fx.Node) -> fx.Node | None:
    """The matrix that a batch of matrices repeats; None if it does not."""
    while node.meta["val"].dim() > 2:
        if node.target not in EXPANDS:
            return None
        (source, *_) = node.all_input_nodes
        if source.meta["val"].shape[-2:] != node.meta["val"].shape[-2:]:
            return None
        node = source
    return node
