"""`repair`: what pruning has left takes over, by least squares, what its neighbours did."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..errors import ArgumentError
from ..masking import is_masked, refresh_masks, without_masks
from ..ranks import alone, copy_first, summed
from ..tracing.arguments import check_count, check_model, unwrapped
from ..tracing.inputs import Arguments
from ..tracing.sandbox import on_cpu, ordinary, same_random_states
from .batches import example_and_batches
from .corrections import OTHER_DATA, LayerError, OtherDataError, Pair, correct_layer, relative
from .elements import EMPTY, elements_of, put_back, saved
from .expansion import expanded, is_compacted, taken_back
from .least_squares import STEPS
from .norm_corrections import correct_norm, correct_scale
from .reference import check_reference, is_unpruned, outputs_of, wanted_of
from .repair_result import RepairResult
from .running import Known
from .samples import held_out, output_error, sample_counts
from .side_by_side import opened
from .statistics import is_frozen_mean
from .uses import Uses, changeable, shared_parameters, uses_of

DELAY = 1.0  # seconds before progress is shown
Batches = Sequence[Arguments]


class NothingToRepairError(ArgumentError):
    """None of the layers of a model can be repaired."""


@ordinary()
def repair(
    model: nn.Module,
    batches: Any = None,
    reference: nn.Module | None = None,
    *,
    steps: int = STEPS,
    example_inputs: Any = None,
    progress: bool | None = None,
) -> RepairResult:
    """Repair a pruned model in place, by least squares on unlabelled batches.

    Both networks run side by side. At each convolution and linear layer, in order, the kept kernels
    and the bias are solved for so that, from what the repaired layers before it feed it, the layer
    gives what it gives in the reference. Without a bias, the running mean of the batch norm
    behind it takes the constant up. Group and layer norms get a scale and a shift anew. A quarter
    of the samples is held out, and every output channel takes what is best there, or stays as it
    is.

    Masks, masked elements, types, devices and parameters that do not require gradients stay as they
    are, and so does the running mean of a batch norm whose scale and shift do not. A model that
    fails to be repaired is left as it was. In a process group every rank must repair, each on
    batches of its own: all begin with the model and the reference of the first, whose statistics
    may differ, and their sums and errors are over the batches of all.

    Args:
        model: pruned by `prune`, or by any masks or zeros of your own; or what `compact` has
            returned for it, with the same result.
        batches: one batch, or an iterable of batches such as a `DataLoader`; a batch is a tensor,
            a tuple of arguments or a dict; labels beside the only input are left out. Without
            them, noise of the shape of the example inputs.
        reference: the unpruned network; by default the model with its masks off, which is the
            unpruned one only if nothing but masks has changed since `prune`.
        steps: conjugate gradient steps for each of the ridges that are tried at a layer; with 0 no
            kernels change, but constants and the scales and shifts of norms.
        example_inputs: as for `prune`, for noise; batches need none.
        progress: show a bar; by default on a terminal, if it takes seconds.

    Returns:
        Every layer's error before and after, and that of the outputs.

    Raises:
        ArgumentError: batches or reference do not fit the model, batches hold NaN, or the unpruned
            network cannot be told and no reference is given. It is a ValueError.
    """
    check_model(model)
    model = unwrapped(model)
    reference = _masks_off(model) if reference is None else reference
    check_reference(model, reference)
    check_count("steps", steps, least=0)
    reference = unwrapped(reference)
    data = example_and_batches(model, example_inputs, batches)[1]
    if not is_compacted(model) or is_compacted(reference):
        return repair_towards(model, data, reference, {}, steps, progress)
    given = list(data)
    dense = expanded(model, reference, given)
    result = repair_towards(dense, given, reference, {}, steps, progress)
    taken_back(model, dense)
    return result


@ordinary()
def repair_towards(
    model: nn.Module,
    batches: Iterable[Arguments],
    reference: nn.Module,
    known: Known,
    steps: int = STEPS,
    progress: bool | None = None,
) -> RepairResult:
    """Repair a model; `known` holds graphs of the reference, which rounds need not trace anew."""
    began = time.perf_counter()
    values = saved(model)
    theirs = {} if alone() else saved(reference)  # which `copy_first` may change
    try:
        copy_first(model)
        copy_first(reference)
        data = list(batches)
        wanted = wanted_of(reference, data)
        sizes = sample_counts(reference, data)
        held = held_out(sizes)
        before, spread = output_error(outputs_of(model, data), wanted, sizes, held)
        with same_random_states(model):
            layers, skipped = _repair_all(model, reference, data, held, known, steps, progress)
        after, _ = output_error(outputs_of(model, data), wanted, sizes, held)
        if after > before:
            put_back(values)
            after, layers = before, [replace(layer, after=layer.before) for layer in layers]
        copy_first(model)
    except BaseException:
        put_back(values)
        raise
    finally:
        put_back(theirs)
        refresh_masks(model)
    chosen = sum(round(size * part) for size, part in zip(sizes, held, strict=True))
    samples, count = summed(torch.tensor([sum(sizes), chosen])).tolist()
    seconds = time.perf_counter() - began
    before, after = relative(before, spread), relative(after, spread)
    return RepairResult(tuple(layers), before, after, samples - count, count, skipped, seconds)


def _masks_off(model: nn.Module) -> nn.Module:
    if not is_masked(model):
        raise ArgumentError(
            f"{type(model).__name__} has no masks, so what it was before it was pruned cannot be "
            "told. Pass that as reference."
        )
    if not is_unpruned(model):
        raise ArgumentError(
            f"{type(model).__name__} has changed since its masks were put on, or they are not from "
            "fxlean, so with its masks off it need not be the unpruned network. Pass that as "
            "reference: reference = copy.deepcopy(model) before pruning."
        )
    return without_masks(model, permanent=False)


@on_cpu()
def _repair_all(
    model: nn.Module,
    reference: nn.Module,
    batches: Batches,
    held: Sequence[float],
    known: Known,
    steps: int,
    progress: bool | None,
) -> tuple[list[LayerError], dict[str, str]]:
    """Correct every layer of every piece; returns their errors, and what was left alone."""
    layers: list[LayerError] = []
    skipped: dict[str, str] = {}
    own: Known = {}
    number, pieces = 0, 1
    while number < pieces:
        mine, pieces = opened(model, batches, number, own)
        theirs, _ = opened(reference, batches, number, known)
        pending: set[int] = set()
        pairs = [Pair(*both, pending) for both in zip(mine, theirs, held, strict=True)]
        _check_alike(pairs, model, reference)
        for found in _repair_piece(model, reference, pairs, steps, progress):
            if isinstance(found, LayerError):
                layers.append(found)
            else:
                skipped |= found
        number += 1
    if not layers:
        reasons = "; ".join(dict.fromkeys(skipped.values()))
        raise NothingToRepairError(
            f"{type(model).__name__} has no layer that can be repaired ({reasons or 'none found'}):"
            " a convolution or linear layer whose weight is a parameter that requires gradients and"
            " that no other layer uses. Prune it without repair, and train it or call"
            " fxlean.distill."
        )
    return layers, skipped


def _repair_piece(
    model: nn.Module,
    reference: nn.Module,
    pairs: Sequence[Pair],
    steps: int,
    progress: bool | None,
) -> Iterator[LayerError | dict[str, str]]:
    """Correct the layers of one piece; yields their errors, or why they were left alone."""
    mine, theirs = pairs[0].mine, pairs[0].theirs
    layers = uses_of(mine)
    shared = shared_parameters(mine, layers)
    pending = pairs[0].pending
    pending.update(changeable(model, mine, shared))
    means, wanted = dict(model.named_buffers()), dict(reference.named_buffers())
    disable = None if progress is None else not progress
    for uses in tqdm(layers, "fxlean: repair", delay=DELAY, leave=False, disable=disable):
        stop = mine.stops[uses[0]]
        pending.difference_update(uses)
        try:
            if stop.scaled:
                correct_scale(model, pairs, uses, shared)
            elif stop.block is None:
                name, twin = stop.statistics, theirs.stops[uses[0]].statistics
                if name and twin and not is_frozen_mean(model, name):
                    correct_norm(pairs, uses, means[name], wanted[twin])
            else:
                yield _repair_layer(model, pairs, uses, shared, steps)
        except OtherDataError:
            if stop.block is not None:
                yield {stop.block.weight.layer_name: OTHER_DATA}
        for pair in pairs:
            pair.mine.running.refresh()


def _repair_layer(
    model: nn.Module, pairs: Sequence[Pair], uses: Uses, shared: set[str], steps: int
) -> LayerError | dict[str, str]:
    """Correct one layer; returns its error, or why it was left alone."""
    block = pairs[0].mine.stops[uses[0]].block
    assert block is not None
    weight = block.weight
    found = elements_of(model, weight.origin, weight.value, shared)
    if not weight.value.any():
        found = EMPTY
    if isinstance(found, str):
        return {weight.layer_name: found}
    return correct_layer(model, pairs, uses, found, shared, steps)


def _check_alike(pairs: Sequence[Pair], model: nn.Module, reference: nn.Module) -> None:
    """The reference must have the same layers, in the same order, on every batch."""
    for pair in pairs:
        mine, theirs = pair.mine.stops, pair.theirs.stops
        if len(mine) != len(theirs) or len(mine) != len(pairs[0].mine.stops):
            problem = f"{len(theirs)} layers where the model has {len(mine)}"
        else:
            both = zip(mine, theirs, strict=True)
            other = next((stop for stop, twin in both if not stop.alike(twin)), None)
            if other is None:
                continue
            name = "a batch norm" if other.block is None else other.block.weight.layer_name
            problem = f"another layer in the place of {name}"
        raise ArgumentError(
            f"the reference {type(reference).__name__} has {problem}, so {type(model).__name__} "
            "cannot be compared with it. Pass the network that was pruned, and repair before "
            "fxlean.compact."
        )
