"""`repair`: what pruning has left takes over, by least squares, what its neighbours did."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import ArgumentError
from ..masking import is_masked, refresh_masks, without_masks
from ..ranks import alone, copy_first, summed
from ..tracing.arguments import check_count, check_model, unwrapped
from ..tracing.inputs import Arguments, batch_size
from ..tracing.sandbox import on_cpu, same_random_states
from .batches import example_and_batches
from .corrections import (
    OTHER_DATA,
    LayerError,
    OtherDataError,
    Pair,
    correct_layer,
    relative,
    spread_of,
)
from .elements import SHARED, elements_of, put_back, saved, shared_parameters
from .least_squares import STEPS
from .norm_corrections import correct_norm, correct_scale, shared_scales
from .reference import check_reference, is_unpruned, outputs_of
from .repair_result import RepairResult
from .running import Known
from .side_by_side import opened

HELD = 4  # one in so many samples is held out
DELAY = 1.0  # seconds before progress is shown
Batches = Sequence[Arguments]


def repair(
    model: nn.Module,
    batches: Any = None,
    reference: nn.Module | None = None,
    *,
    steps: int = STEPS,
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
    are. A model that fails to be repaired is left as it was. In a process group every rank must
    repair, each on batches of its own: all begin with the model and the reference of the first,
    whose statistics may differ, and their sums and errors are over the batches of all.

    Args:
        model: pruned by `prune`, or by any masks or zeros of your own. Compact it afterwards.
        batches: one batch, or an iterable of batches such as a `DataLoader`; a batch is a tensor,
            a tuple of arguments or a dict; labels beside the only input are left out. Without
            them, noise of a shape that the model accepts.
        reference: the unpruned network; by default the model with its masks off, which is the
            unpruned one only if nothing but masks has changed since `prune`.
        steps: conjugate gradient steps for each of the ridges that are tried at a layer; with 0 no
            kernels change, but constants and the scales and shifts of norms.
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
    return repair_towards(model, batches, unwrapped(reference), {}, steps, progress)


def repair_towards(
    model: nn.Module,
    batches: Any,
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
        data = list(example_and_batches(model, None, batches)[1])
        held = held_out([batch_size(batch) for batch in data])
        wanted = outputs_of(reference, data)
        before = output_error(outputs_of(model, data), wanted, held)
        with same_random_states(model):
            layers, skipped = _repair_all(model, reference, data, held, known, steps, progress)
        after = output_error(outputs_of(model, data), wanted, held)
        if after > before:
            put_back(values)
            after = before
        copy_first(model)
    except BaseException:
        put_back(values)
        raise
    finally:
        put_back(theirs)
        refresh_masks(model)
    sizes = [batch_size(batch) for batch in data]
    chosen = sum(round(size * part) for size, part in zip(sizes, held, strict=True))
    samples, count = summed(torch.tensor([sum(sizes), chosen])).tolist()
    seconds = time.perf_counter() - began
    return RepairResult(tuple(layers), before, after, samples - count, count, skipped, seconds)


def held_out(sizes: Sequence[int]) -> list[float]:
    """The fraction of every batch that is held out: a quarter, or each fourth of single samples.

    Two samples at least, of four or more: one alone has no variance that errors could be relative
    to.

    >>> held_out([8, 3])
    [0.25, 0.3333333333333333]
    >>> held_out([4])
    [0.5]
    >>> held_out([1, 1, 1, 1])
    [0.0, 1.0, 0.0, 1.0]
    """
    divisible = sum(size > 1 for size in sizes)
    if divisible:
        least = 2 if divisible == 1 else 1
        return [max(min(least, size // 2), size // HELD) / size for size in sizes]
    if len(sizes) < 2:
        raise ArgumentError(
            "batches hold one sample. Pass at least two: one in four is held out to choose by."
        )
    every = spacing(len(sizes), HELD)
    return [float(number % every == every - 1) for number in range(len(sizes))]


def spacing(samples: int, most: int) -> int:
    """In how many single samples one is held out: `most`, or fewer where two would not be."""
    return min(most, max(2, samples // 2))


def _masks_off(model: nn.Module) -> nn.Module:
    if not is_masked(model):
        raise ArgumentError(
            f"{type(model).__name__} has no masks, so what it was before it was pruned cannot be "
            "told. Pass that as reference; and where it is compacted, repair before fxlean.compact."
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
        pairs = [Pair(*both) for both in zip(mine, theirs, held, strict=True)]
        _check_alike(pairs, model, reference)
        for found in _repair_piece(model, reference, pairs, steps, progress):
            if isinstance(found, LayerError):
                layers.append(found)
            else:
                skipped |= found
        number += 1
    if not layers:
        reasons = "; ".join(dict.fromkeys(skipped.values()))
        raise ArgumentError(
            f"{type(model).__name__} has no layer that can be repaired ({reasons or 'none found'})."
            " Set requires_grad where weights may change."
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
    stops = pairs[0].mine.stops
    shared = shared_parameters(stop.block.weight for stop in stops if stop.block is not None)
    shared |= shared_scales(pairs[0].mine)
    means, wanted = dict(model.named_buffers()), dict(reference.named_buffers())
    disable = None if progress is None else not progress
    bar = tqdm(stops, "fxlean: repair", delay=DELAY, leave=False, disable=disable)
    for number, stop in enumerate(bar):
        try:
            if stop.scaled:
                correct_scale(model, pairs, number, shared)
            elif stop.block is None:
                name = pairs[0].theirs.stops[number].statistics
                correct_norm(pairs, number, means[stop.statistics or ""], wanted[name or ""])
            else:
                yield _repair_layer(model, pairs, number, shared, steps)
        except OtherDataError:
            if stop.block is not None:
                yield {stop.block.weight.layer_name: OTHER_DATA}
        for pair in pairs:
            pair.mine.running.refresh()


def _repair_layer(
    model: nn.Module, pairs: Sequence[Pair], number: int, shared: set[str], steps: int
) -> LayerError | dict[str, str]:
    """Correct one layer; returns its error, or why it was left alone."""
    block = pairs[0].mine.stops[number].block
    assert block is not None
    weight = block.weight
    found = elements_of(model, weight.origin, weight.value)
    if weight.origin is not None and weight.origin.parameter in shared:
        found = SHARED
    if isinstance(found, str):
        return {weight.layer_name: found}
    return correct_layer(model, pairs, number, found, steps)


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


def output_error(
    found: Sequence[Sequence[Tensor]], wanted: Sequence[Sequence[Tensor]], held: Sequence[float]
) -> float:
    """Relative error of the outputs on held-out samples of all ranks; of those of equal shape."""
    error, targets = 0.0, defaultdict[int, list[Tensor]](list)
    for ours, theirs, part in zip(found, wanted, held, strict=True):
        for number, (mine, target) in enumerate(zip(ours, theirs, strict=False)):
            first = round(len(target) * (1 - part)) if target.dim() > 1 else 0
            if mine.shape == target.shape and target.dim() > 1 and first < len(target):
                error += float((mine[first:] - target[first:]).double().square().sum())
                targets[number].append(target[first:])
    total = float(summed(torch.tensor(error, dtype=torch.float64)))
    return relative(total, sum(spread_of(found) for found in targets.values()))
