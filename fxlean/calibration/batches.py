"""Unlabelled batches as arguments of the model, whatever form they come in."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, PruneWarning, warn
from ..tracing.inputs import (
    Arguments,
    as_arguments,
    call_on_copies,
    check_tensors,
    describe,
    guesses,
)
from ..tracing.leaves import replaced, tensors_in
from ..tracing.sandbox import running
from .noise import noise_batches

WIDTH, ELEMENTS = 64, 2**20  # of a batch of noise: samples and elements, at most
FORMS = "a tensor, a tuple of positional arguments, or a dict of keyword arguments"


def restartable(batches: Any) -> Any:
    """The same batches, in a list if they could be read only once."""
    return list(batches) if isinstance(batches, Iterator) else batches


def read_batches(model: nn.Module, batches: Any) -> Iterator[Arguments]:
    """Arguments of the model, one tuple or dict a batch, on the model's device.

    Args:
        model: for its device, and to see whether it takes what is in a batch.
        batches: one batch, or an iterable of batches such as a `DataLoader`. A batch is a tensor,
            a tuple or list of positional arguments, or a dict of keyword arguments. Where the
            model rejects a pair, but takes its first half alone, the other half are labels.

    Raises:
        ArgumentError: there are no batches, the model rejects one, or it holds NaN or infinity.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    single = isinstance(batches, Tensor | tuple | Mapping)
    if not single and not isinstance(batches, Iterable):
        raise ArgumentError(
            f"batches is a {type(batches).__name__}. Pass an iterable of batches, each {FORMS}."
        )
    if isinstance(batches, tuple) and _are_batches(model, batches):
        single = False
    labelled: dict[Any, bool] = {}  # by shapes, so that each form of batch is tried once
    for number, batch in enumerate([batches] if single else batches):
        arguments = _as_arguments(model, batch, number)
        arguments = replaced(arguments, lambda tensor: tensor.to(device))
        check_tensors(tensors_in(arguments), f"batch {number}")
        _check_finite(arguments, number)
        form = form_of(arguments)
        if form not in labelled:
            labelled[form] = _is_labelled(model, arguments, number)
        alone = labelled[form] and isinstance(arguments, tuple)
        yield arguments[:1] if alone else arguments
    if not labelled:
        raise ArgumentError("batches is empty. Pass at least one batch of inputs.")


def told_if_constant(batches: Iterable[Arguments]) -> Iterator[Arguments]:
    """The same batches, and a warning behind the last if all their values are equal."""
    values: list[Tensor] = []
    varying = False
    for batch in batches:
        tensors = [tensor for tensor in tensors_in(batch) if tensor.numel()]
        values = values or [tensor.reshape(-1)[0] for tensor in tensors]
        pairs = zip(tensors, values, strict=False)
        varying = varying or any(bool((tensor != value).any()) for tensor, value in pairs)
        yield batch
    if not varying:
        warn(
            "all values of the batches are equal, so what flows through the network is what its "
            "borders make. Pass real batches.",
            PruneWarning,
        )


def form_of(batch: Arguments) -> str:
    """What batches have in common that a model takes in the same way: shapes, types, all else."""
    return str(replaced(batch, lambda tensor: (tensor.shape, tensor.dtype)))


def _are_batches(model: nn.Module, given: tuple[Any, ...]) -> bool:
    """Whether a tuple is not the arguments of one batch, but several, as of `images.split(64)`.

    Two tensors of one shape could be that, or inputs and targets: an error, unless the model takes
    both.
    """
    tensors = [leaf for leaf in given if isinstance(leaf, Tensor)]
    kinds = {(tensor.dtype, tensor.shape[1:]) for tensor in tensors}
    if len(given) < 2 or len(tensors) < len(given) or len(kinds) > 1:
        return False
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    arguments = tuple(tensor.to(device) for tensor in tensors)
    if _rejects(model, arguments) is None or _rejects(model, arguments[:1]) is not None:
        return False
    if len(given) == 2 and tensors[0].shape == tensors[1].shape:
        raise ArgumentError(
            "batches is a tuple of two tensors of one shape: two batches, or inputs and targets? "
            "Pass a list of batches, [first, second], or the inputs alone."
        )
    return True


def example_and_batches(
    model: nn.Module, example_inputs: Any, batches: Any
) -> tuple[Any, Iterator[Arguments]]:
    """Inputs to trace a model with, and the batches to run it on.

    Args:
        model: for its device, and to see what it takes.
        example_inputs: as for `prune`; if None, the first batch, or what is guessed.
        batches: as for `read_batches`; if None, noise of the shape of the example inputs.
    """
    if batches is None:
        arguments = _accepted(model) if example_inputs is None else as_arguments(example_inputs)
        if not any(tensor.is_floating_point() for tensor in tensors_in(arguments)):
            raise ArgumentError(
                f"example_inputs, {describe(arguments)}, holds no floating-point tensor, so noise "
                "cannot take its place. Pass batches: those of repair, or calibration=."
            )
        return arguments, noise_batches(model, _widened(model, arguments))
    found = read_batches(model, batches)
    if example_inputs is not None:
        return example_inputs, found
    first = next(found)
    return first, itertools.chain([first], found)


def _widened(model: nn.Module, arguments: Arguments) -> Arguments:
    """The arguments as a batch of many, where the model takes that; few large runs are faster."""
    tensors = tensors_in(arguments)
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    elements = max(1, sum(tensor.numel() for tensor in tensors))
    times = min(WIDTH // max(1, *sizes), ELEMENTS // elements)
    if len(sizes) > 1 or 0 in sizes or times < 2:
        return arguments
    wide = replaced(arguments, lambda tensor: tensor.repeat([times] + [1] * (tensor.dim() - 1)))
    return arguments if _rejects(model, wide) else wide


def _accepted(model: nn.Module) -> Arguments:
    """The first guess of inputs that the model takes."""
    for arguments in guesses(model):
        if _rejects(model, arguments) is None:
            return arguments
    raise ArgumentError(
        f"{type(model).__name__} accepts none of the inputs tried. Pass example_inputs, or batches."
    )


def _as_arguments(model: nn.Module, batch: Any, number: int) -> Arguments:
    """One batch as arguments of the model."""
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, tuple | list):
        return tuple(batch)
    if not isinstance(batch, Mapping):
        raise ArgumentError(f"batch {number} is a {type(batch).__name__}. Pass {FORMS}.")
    try:
        inspect.signature(model.forward).bind(**batch)
    except TypeError as err:
        raise ArgumentError(
            f"batch {number} has the keys {', '.join(map(str, batch))}, which "
            f"{type(model).__name__}.forward does not take: {err}. Leave out labels and the like."
        ) from err
    return dict(batch)


def _check_finite(arguments: Arguments, number: int) -> None:
    for tensor in tensors_in(arguments):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ArgumentError(
                f"batch {number} holds NaN or infinity. Leave such samples out of batches."
            )


def _is_labelled(model: nn.Module, arguments: Arguments, number: int) -> bool:
    """Whether the second of two arguments are labels: the model takes the first one alone."""
    failure = _rejects(model, arguments)
    if failure is None:
        return False
    alone = arguments[:1] if isinstance(arguments, tuple) and len(arguments) == 2 else None
    if alone is not None and _rejects(model, alone) is None:
        return True
    raise ArgumentError(
        f"{type(model).__name__} rejects batch {number}, {describe(arguments)}: "
        f"{type(failure).__name__}: {str(failure)[:300]}. Pass batches of inputs alone; where a "
        "loader brings labels as well, drop them: (images for images, labels in loader)."
    ) from failure


def _rejects(model: nn.Module, arguments: Arguments) -> Exception | None:
    """What the model raises for these arguments, if anything."""
    with running(model):
        try:
            call_on_copies(model, arguments)
        except Exception as err:  # whatever the model raises for what it rejects
            return err
    return None
