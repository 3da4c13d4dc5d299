"""Python functions in the one form that traces well: custom autograd functions, and products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, function
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__}
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


class ProductsByMatrices(TorchFunctionMode):
    """A product by a matrix is one of matrices, whatever dimensions its other factor has.

    Otherwise torch expands the matrix, and nobody knows the weight any more, where it does not
    require gradients (frozen, or masked) and the values are permuted.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function, a product on what is flattened to a matrix."""
        if func not in PRODUCTS or len(args) < 2 or args[0].dim() < 3 or args[1].dim() != 2:
            return func(*args, **(kwargs or {}))
        left, *others = args
        return func(left.flatten(0, -2), *others, **(kwargs or {})).unflatten(0, left.shape[:-1])
