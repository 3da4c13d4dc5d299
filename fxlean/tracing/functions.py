"""Every `torch.autograd.Function` as the code of its forward pass, which is all that is traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.autograd import Function, function
from torch.autograd.function import FunctionCtx

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
