"""`distill`: a short training towards the outputs of the unpruned network, without labels."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from ..errors import ArgumentError, PruneWarning, first_line, shown, warn
from ..masking import refresh_masks
from ..ranks import averaged, copy_first, summed
from ..tracing.arguments import check_count, check_model, check_unfrozen, unwrapped
from ..tracing.inputs import Arguments, call_on_copies, describe
from ..tracing.sandbox import ordinary, running, same_random_states
from ..tracing.snapshot import Snapshot
from .batches import form_of, read_batches
from .corrections import mean_of
from .elements import put_back, saved
from .reference import check_reference, floats_of, wanted_of
from .repair_model import DELAY
from .statistics import batch_norms_training, measure_statistics

RATE = 3e-3
ROUNDING = 1e-12  # variances that are smaller, relative to the squared mean, are of rounding errors


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
    floating-point tensor that the model returns, relative to its variance over all batches. Masks
    stay on, and parameters that do not require gradients stay, and so do the statistics of a batch
    norm whose scale and shift do not. Other batch norms run in training mode, and their statistics
    are measured anew at the end; everything else, dropout too, is in eval mode. In a process group
    every rank must distill, with batches of its own: each step takes one of every rank.

    Args:
        model: any module, best after rounds of pruning and repair. If training fails it is put
            back; if it is interrupted, what has been learned stays.
        batches: an iterable of batches such as a `DataLoader`, with tens of samples each; labels
            beside the only input are left out. They are kept in memory, with the outputs.
        reference: the unpruned network; not changed.
        steps: at least 1; some hundred are enough.
        rate: learning rate at the beginning; it falls linearly to 0.
        progress: show a bar; by default on a terminal, if it takes seconds.

    Raises:
        ArgumentError: arguments make no sense, the model does not take the batches, outputs
            differ in shape or do not vary, or the error is not a number any more. It is a
            ValueError.

    Warns:
        PruneWarning: the error on the batches is larger than it was, so the model was put back.
    """
    _check(model, reference, steps, rate)
    model, reference = unwrapped(model), unwrapped(reference)
    with ordinary(), same_random_states(model):
        goal = _Goal(reference, list(read_batches(model, batches)))
        check_training(model, goal.batches)
        before = goal.error(model)
        snapshot, values = Snapshot(model), saved(model)

        def undo() -> None:
            snapshot.put_back()
            put_back(values)

        try:
            with batch_norms_training(model):
                _train(model, goal, steps, rate, progress)
            measure_statistics(model, goal.batches)
            copy_first(model)
            after = goal.error(model)
            if not after <= before:
                undo()
                warn(
                    f"the relative error of the outputs of {type(model).__name__} became "
                    f"{after:.2g}, from {before:.2g}, so it was put back. Pass a smaller rate, "
                    "larger batches, or more steps.",
                    PruneWarning,
                )
        except Exception:  # whatever: the model is to be as it was
            undo()
            raise
        finally:
            refresh_masks(model)


def check_training(model: nn.Module, batches: Sequence[Arguments]) -> None:
    """Reject batches that batch norms cannot train on: of one sample, where no positions are."""
    forms = {form_of(batch): number for number, batch in reversed(list(enumerate(batches)))}
    for number in sorted(forms.values()):
        with running(model), batch_norms_training(model):
            try:
                call_on_copies(model, batches[number])
            except Exception as err:  # whatever the model raises
                raise ArgumentError(
                    f"{type(model).__name__} rejects batch {number}, {describe(batches[number])}, "
                    f"with its batch norms in training mode: {first_line(err)}. Pass larger "
                    "batches; a DataLoader leaves a small last one out with drop_last=True."
                ) from err


class _Goal:
    """What the outputs are to become: what the reference gives.

    Attributes:
        batches: all batches.
    """

    def __init__(self, reference: nn.Module, batches: Sequence[Arguments]) -> None:
        self.batches = batches
        self._wanted = wanted_of(reference, batches)
        self._finite = [[tensor.isfinite() for tensor in tensors] for tensors in self._wanted]
        self._variances = _variances(self._wanted, self._finite)
        if not any(self._wanted):
            raise ArgumentError(
                f"the reference {type(reference).__name__} returns no floating-point tensor, so "
                "there is nothing to come nearer to. Pass networks that return one, such as logits."
            )
        if not self._variances:
            raise ArgumentError(
                f"what the reference {type(reference).__name__} returns does not vary over the "
                "batches, so there is nothing to come nearer to. Pass more batches."
            )

    def loss(self, model: nn.Module, number: int) -> Tensor:
        """The squared error of every output on a batch, relative to its variance, added up.

        Over what is finite in the reference.
        """
        found, wanted = floats_of(call_on_copies(model, self.batches[number])), self._wanted[number]
        shapes, expected = ([tuple(t.shape) for t in tensors] for tensors in (found, wanted))
        if shapes != expected:
            raise ArgumentError(
                f"the model returns shapes {shapes}, the reference {expected}. Pass the network "
                "that was pruned as reference, and batches on which the number of outputs does not "
                "depend on their values."
            )
        total = torch.zeros((), device="cpu")  # to which what is on any device can be added
        for place, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
            if place in self._variances and theirs.numel():
                kept = self._finite[number][place]
                # Not infinity less infinity, whose gradient is NaN wherever it is left out.
                difference = ours.where(kept, 0) - theirs.where(kept, 0)
                part = kept.numel() / kept.sum().clamp(min=1)  # of all, over which a mean is
                total = total + part * difference.square().mean() / self._variances[place]
        return total

    def error(self, model: nn.Module) -> float:
        """The root of the mean loss over the batches of all ranks, in eval mode."""
        with running(model):
            losses = [self.loss(model, number).cpu() for number in range(len(self.batches))]
        return float(averaged(torch.stack(losses).double().mean()).sqrt())


def _variances(
    outputs: Sequence[Sequence[Tensor]], finite: Sequence[Sequence[Tensor]]
) -> dict[int, float]:
    """The variance of what is finite in each output, over all batches of all ranks, by its place.

    Not of those that are constant but for rounding.
    """
    places: defaultdict[int, list[Tensor]] = defaultdict(list)
    for tensors, kept in zip(outputs, finite, strict=True):
        for place, (tensor, index) in enumerate(zip(tensors, kept, strict=True)):
            places[place].append(tensor[index].reshape(1, -1).double())
    found = {}
    for place, parts in places.items():
        mean = mean_of(parts)
        deviations = torch.stack([(part - mean).square().sum() for part in parts]).sum()
        count = int(summed(torch.tensor(sum(part.numel() for part in parts))))
        variance = float(summed(deviations)) / max(1, count)
        if variance > ROUNDING * float(mean) ** 2:
            found[place] = variance
    return found


def _train(model: nn.Module, goal: _Goal, steps: int, rate: float, progress: bool | None) -> None:
    """Steps of Adam, batch after batch, at a falling rate; gradients are put back."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [parameter.grad for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, rate)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
    disable = None if progress is None else not progress
    bar = tqdm(range(steps), "fxlean: distill", delay=DELAY, leave=False, disable=disable)
    try:
        with bar:
            for number in bar:
                optimizer.zero_grad()
                loss = _backward(model, goal, number % len(goal.batches))
                # What the model returns may not depend on some parameters.
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.grad = averaged(parameter.grad)
                loss = averaged(loss)
                if not loss.isfinite():
                    raise ArgumentError(
                        f"the error is {loss.item()} at step {number}. Pass a smaller rate, or "
                        "batches in their usual range."
                    )
                optimizer.step()
                schedule.step()
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


@torch.enable_grad()
def _backward(model: nn.Module, goal: _Goal, number: int) -> Tensor:
    """The loss on a batch, whose gradients the parameters have then."""
    loss = goal.loss(model, number)
    if not loss.requires_grad:
        raise ArgumentError(
            f"what {type(model).__name__} returns does not depend on a parameter that requires "
            "gradients. Set requires_grad where weights may change."
        )
    loss.backward()
    return loss.detach()


def _check(model: Any, reference: Any, steps: Any, rate: Any) -> None:
    check_model(model)
    check_reference(model, reference)
    check_count("steps", steps)
    if not isinstance(rate, Real) or not 0 < float(rate) < math.inf:
        raise ArgumentError(f"rate is {shown(rate)}. Pass a positive number, such as {RATE}.")
    check_unfrozen(model)
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
