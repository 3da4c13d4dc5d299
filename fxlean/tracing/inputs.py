"""Inputs to run a model on: those that the user gives, or guesses of common sizes."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ArgumentError

SIZES = {
    1: ((1024,), (128,), (4096,), (16,), (16384,)),
    2: tuple((n, n) for n in (64, 224, 28, 32, 128, 256, 299, 96, 16, 8, 160, 192, 240, 384, 512)),
    3: (*((n, n, n) for n in (32, 64, 16, 96, 128)), (16, 112, 112), (16, 224, 224)),
}


def as_arguments(example_inputs: Any) -> tuple[Any, ...]:
    """Example inputs as a tuple of positional arguments."""
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(arguments)):
        raise ArgumentError(
            f"example_inputs holds no tensor but {type(example_inputs).__name__}. Pass a tensor, "
            "or a tuple of the positional arguments of the model."
        )
    return arguments


def guesses(model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Inputs of common sizes for a model whose first convolution says channels and dimensions."""
    firsts = _first_convolutions(model)
    signature = inspect.signature(model.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in signature if p.kind in positional and p.default is p.empty]
    for sizes in zip(*(SIZES[weight.dim() - 2] for weight, _ in firsts), strict=False):
        for size, (weight, channels) in zip(sizes, firsts, strict=True):
            image = torch.zeros((1, channels, *size), dtype=weight.dtype, device=weight.device)
            yield (image,) * max(1, len(needed))


def _first_convolutions(model: nn.Module) -> list[tuple[Tensor, int]]:
    """Weight and number of input channels of what may be the first convolution.

    The first convolution module, in order of registration, and the first parameter outside of
    such modules that could be a kernel: a functional convolution, or just a position embedding.
    """
    modules, parameters = [], []
    for module in model.modules():
        weight, channels = getattr(module, "weight", None), getattr(module, "in_channels", None)
        if isinstance(weight, Tensor) and 3 <= weight.dim() <= 5 and isinstance(channels, int):
            modules.append((weight, channels))
            continue
        own = [p for p in module.parameters(recurse=False) if 3 <= p.dim() <= 5]
        parameters += [(parameter, parameter.shape[1]) for parameter in own]
    if not modules and not parameters:
        raise ArgumentError(
            f"{type(model).__name__} has no parameter that could be a convolution kernel (3 to 5 "
            "dimensions), so there is nothing to prune and no input shape to infer. If its "
            "convolutions are elsewhere, pass example_inputs=."
        )
    return modules[:1] + parameters[:1]


def describe(arguments: tuple[Any, ...]) -> str:
    """The arguments, long ones cut short, with shapes in place of tensors; for messages."""
    shapes = pytree.tree_map_only(Tensor, lambda tensor: tuple(tensor.shape), arguments)
    return " + ".join(map(reprlib.repr, shapes))
