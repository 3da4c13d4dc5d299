"""`distill`: a short training towards the outputs of the unpruned network, without labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from ..errors import ArgumentError, shown
from ..masking import refresh_masks
from ..ranks import averaged, copy_first
from ..tracing.arguments import check_count, check_model, unwrapped
from ..tracing.inputs import Arguments, call
from .batches import read_batches
from .elements import put_back, saved
from .reference import check_reference, floats_of, outputs_of
from .repair_model import DELAY
from .statistics import batch_norms_training, measure_statistics

RATE = 3e-3


def distill(
    model: nn.Module,
    batches: Any,
    reference: nn.Module,
    steps: int,
    *,
    rate: float = RATE,
    progress: bool | None = None,
) -> None:
    """Train a pruned or compacted model in place to give what the unpruned network gives.

    `steps` steps of Adam, one batch each, over and over, on the mean squared difference of every
    floating-point tensor that the model returns, relative to its variance. Masks stay on, and
    parameters that do not require gradients stay. Batch norms run in training mode, and their
    statistics are measured anew at the end; everything else, dropout too, is in eval mode. In a
    process group every rank must distill, with batches of its own: each step takes one of every
    rank.

    Args:
        model: any module, best after rounds of pruning and repair. If training fails it is put
            back; if it is interrupted, what has been learned stays.
        batches: an iterable of batches such as a `DataLoader`, with tens of samples each; labels
            beside the only input are left out. They are kept in memory.
        reference: the unpruned network; not changed.
        steps: at least 1; some hundred are enough.
        rate: learning rate at the beginning; it falls linearly to 0.
        progress: show a bar; by default on a terminal, if it takes seconds.

    Raises:
        ArgumentError: arguments make no sense, the model does not take the batches, outputs
            differ in shape, or the error is not a number any more. It is a ValueError.
    """
    _check(model, reference, steps, rate)
    model, reference = unwrapped(model), unwrapped(reference)
    data = list(read_batches(model, batches))
    targets = outputs_of(reference, data)
    values = saved(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [parameter.grad for parameter in parameters]
    disable = None if progress is None else not progress
    bar = tqdm(range(steps), "fxlean: distill", delay=DELAY, leave=False, disable=disable)
    try:
        optimizer = torch.optim.Adam(parameters, rate)
        falling = LambdaLR(optimizer, lambda step: 1 - step / steps)
        with batch_norms_training(model), bar:
            _train(model, data, targets, falling, bar)
        measure_statistics(model, data)
        copy_first(model)
    except Exception:  # whatever: the model is to be as it was
        put_back(values)
        raise
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        refresh_masks(model)


def _train(
    model: nn.Module,
    batches: Sequence[Arguments],
    targets: Sequence[Sequence[Tensor]],
    schedule: LambdaLR,
    numbers: Iterable[int],
) -> None:
    """One step of the optimizer and of its rate for each number, batch after batch."""
    optimizer = schedule.optimizer
    parameters = optimizer.param_groups[0]["params"]
    for number in numbers:
        which = number % len(batches)
        with torch.enable_grad():
            optimizer.zero_grad()
            loss = _loss(floats_of(call(model, batches[which])), targets[which])
            loss.backward()
        # What the model returns may not depend on some parameters.
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = averaged(parameter.grad)
        loss = averaged(loss.detach())
        if not loss.isfinite():
            raise ArgumentError(
                f"the error is {loss.item()} at step {number}. Pass a smaller rate, or batches in "
                "their usual range."
            )
        optimizer.step()
        schedule.step()


def _loss(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """The squared error of every output, relative to its variance, added up."""
    shapes, expected = ([tuple(t.shape) for t in tensors] for tensors in (found, wanted))
    if shapes != expected:
        raise ArgumentError(
            f"the model returns shapes {shapes}, the reference {expected}. Pass the network that "
            "was pruned as reference."
        )
    errors = [
        (ours - theirs).square().mean() / theirs.var(correction=0).clamp(min=1e-30)
        for ours, theirs in zip(found, wanted, strict=True)
    ]
    return torch.stack(errors).sum()


def _check(model: Any, reference: Any, steps: Any, rate: Any) -> None:
    check_model(model)
    check_reference(model, reference)
    check_count("steps", steps)
    if not isinstance(rate, Real) or not 0 < float(rate) < math.inf:
        raise ArgumentError(f"rate is {shown(rate)}. Pass a positive number, such as {RATE}.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ArgumentError(
            f"no parameter of {type(model).__name__} requires gradients, so there is nothing to "
            "train. Set requires_grad where weights may change."
        )
    check_trainable(model)


def check_trainable(model: nn.Module) -> None:
    """Reject weights in float16, whose gradients Adam squares to 0 or infinity."""
    named = model.named_parameters()
    halves = [name for name, p in named if p.requires_grad and p.dtype == torch.float16]
    if halves:
        raise ArgumentError(
            f"{halves[0]} is in float16, too narrow a range to train in. Distill in bfloat16 or "
            "float32, model.float(), and go back to float16 afterwards."
        )
