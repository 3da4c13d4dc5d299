"""Inputs to run a model on: those that the user gives, or guesses of common sizes."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, shown, some
from .leaves import replaced, strangers_in, tensors_in

# Positional or keyword arguments of a model.
Arguments: TypeAlias = tuple[Any, ...] | dict[str, Any]
SIZES = {
    1: ((1024,), (128,), (4096,), (16,), (16384,)),
    2: tuple((n, n) for n in (64, 224, 28, 32, 128, 256, 299, 96, 16, 8, 160, 192, 240, 384, 512)),
    3: (*((n, n, n) for n in (32, 64, 16, 96, 128)), (16, 112, 112), (16, 224, 224)),
}


def as_arguments(example_inputs: Any) -> Arguments:
    """Example inputs as a tuple of positional arguments or a dictionary of keyword arguments.

    Raises:
        ArgumentError: they hold no tensor, an empty one, or tensors where no trace sees them.
    """
    arguments: Arguments
    if isinstance(example_inputs, Mapping):
        arguments = dict(example_inputs)
    else:
        arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    strangers = strangers_in(arguments)
    if strangers:
        raise ArgumentError(
            f"example_inputs holds tensors in {some(strangers)}, which is no container that can be "
            "traced. Pass tensors in tuples, lists, mappings, named tuples or dataclasses."
        )
    tensors = tensors_in(arguments)
    if not tensors:
        raise ArgumentError(
            f"example_inputs is {shown(example_inputs)}, which holds no tensor. Pass a tensor, "
            "such as torch.zeros(1, 3, 64, 64), a tuple of the positional arguments of the model, "
            "or a dict of its keyword arguments."
        )
    if not all(isinstance(key, str) for key in arguments) and isinstance(arguments, dict):
        raise ArgumentError(
            f"example_inputs is a dict with keys {reprlib.repr([*arguments])}, which are no names "
            "of arguments. Pass (inputs,) for a model that takes a dictionary."
        )
    check_tensors(tensors, "example_inputs")
    return arguments


def check_tensors(tensors: Sequence[Tensor], what: str) -> None:
    """Reject inputs, called `what` in the message, that are empty or compute in their own way."""
    for tensor in tensors:
        if not tensor.numel() and (tensor.dim() > 2 or len(tensors) == 1):
            raise ArgumentError(
                f"{what} holds an empty tensor of shape {tuple(tensor.shape)}, on which no "
                "layer can be seen at work. Pass at least one sample."
            )
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise ArgumentError(
                f"{what} holds a {type(tensor).__name__}, a tensor that computes in its "
                "own way and cannot be traced. Pass a torch.Tensor."
            )


def call(model: nn.Module, arguments: Arguments) -> Any:
    """What a model returns for positional or for keyword arguments."""
    return model(**arguments) if isinstance(arguments, dict) else model(*arguments)


def call_on_copies(model: nn.Module, arguments: Arguments) -> Any:
    """What a model returns for copies of some arguments, in which it may write."""
    return call(model, copies_of(arguments))


def copies_of(arguments: Arguments) -> Arguments:
    """The arguments with copies of their tensors."""
    copies: Arguments = replaced(arguments, lambda tensor: tensor.detach().clone())
    return copies


def batch_size(batch: Arguments) -> int:
    """Number of samples of a batch: the first size of its tensors of most dimensions, of images.

    Of several the largest, since others may be for all samples; tables beside images do not count.
    """
    tensors = [tensor for tensor in tensors_in(batch) if tensor.dim()]
    most = max((tensor.dim() for tensor in tensors), default=0)
    return max([1, *(tensor.shape[0] for tensor in tensors if tensor.dim() == most)])


def some_samples(batch: Arguments, which: slice | Tensor) -> Arguments:
    """Some of the samples of a batch; what does not have one entry a sample stays."""
    size = batch_size(batch)

    def part(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != size:
            return tensor
        return tensor[which if isinstance(which, slice) else which.to(tensor.device)]

    result: Arguments = replaced(batch, part)
    return result


def in_parts(batch: Arguments, size: int) -> Iterator[Arguments]:
    """A batch in parts of so many samples; the first of them fill the last part up."""
    count = batch_size(batch)
    for start in range(0, count, size):
        yield some_samples(batch, torch.arange(start, start + size, device="cpu") % count)


def guesses(model: nn.Module) -> Iterator[Arguments]:
    """Inputs of common sizes for a model whose first convolution says channels and dimensions."""
    firsts = _first_convolutions(model)
    signature = inspect.signature(model.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in signature if p.kind in positional and p.default is p.empty]
    named = names_only(model)
    for sizes in zip(*(SIZES[weight.dim() - 2] for weight, _ in firsts), strict=False):
        for size, (weight, channels) in zip(sizes, firsts, strict=True):
            image = torch.zeros((1, channels, *size), dtype=weight.dtype, device=weight.device)
            if named:
                yield dict.fromkeys([p.name for p in needed] + named, image)
            else:
                yield (image,) * max(1, len(needed))


def names_only(model: nn.Module) -> list[str]:
    """Arguments that a model needs, and takes by name only."""
    signature = inspect.signature(model.forward).parameters.values()
    return [p.name for p in signature if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


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


def describe(arguments: Arguments) -> str:
    """The arguments, long ones cut short, with shapes in place of tensors; for messages."""
    shapes = replaced(arguments, lambda tensor: tuple(tensor.shape))
    if isinstance(shapes, dict):
        return ", ".join(f"{name}={reprlib.repr(shape)}" for name, shape in shapes.items())
    return " + ".join(map(reprlib.repr, shapes))
