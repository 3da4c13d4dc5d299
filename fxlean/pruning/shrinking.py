"""`shrink`: one call from a trained network and unlabelled batches to a smaller network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import isnan
from numbers import Real
from typing import Any

from torch import nn
from tqdm import tqdm

from ..calibration.batches import example_and_batches
from ..calibration.distillation import check_trainable, check_training
from ..calibration.distillation import distill as distill_model
from ..calibration.reference import outputs_of
from ..calibration.repair_model import NothingToRepairError, repair_towards
from ..calibration.running import Known
from ..calibration.samples import relative_output_error, sample_counts, spacing
from ..compaction.attempts import compact
from ..costs import report
from ..errors import ArgumentError, PruneWarning, counted, shown, warn
from ..tracing.arguments import check_count, check_traceable, unwrapped
from ..tracing.inputs import Arguments, some_samples
from ..tracing.sandbox import copied, ordinary
from .options import check, check_names
from .prune_model import prune
from .schedules import schedule

HELD = 8  # one in so many samples tells the error of the outputs
ROUNDS = 3
FACTOR, FINEST = 0.7, 0.95  # what a round leaves where a tolerance says when to stop, and the last
SMALLEST = 0.01


@ordinary()
def shrink(
    model: nn.Module,
    ratio: float | None = None,
    batches: Any = None,
    *,
    tolerance: float | None = None,
    rounds: int = ROUNDS,
    distill: int = 0,
    example_inputs: Any = None,
    progress: bool | None = None,
    **options: Any,
) -> nn.Module:
    """A smaller and faster network that computes nearly the same, without labels or training.

    A copy of the model loses whole channels in rounds, each repaired towards the model itself on
    the batches; then it is compacted. One in eight samples is held out, and tells the relative
    error of the outputs, which is printed with what is left of every layer.

    Args:
        model: trained; not changed.
        ratio: fraction that is left, of the multiply-accumulates if `of` says nothing else.
        batches: unlabelled: one, or an iterable such as a `DataLoader`, of tensors, tuples of
            arguments or dicts; labels beside the only input are left out. Without them, noise of
            the shape of the example inputs, which costs accuracy.
        tolerance: in place of a ratio, the relative error of the outputs (root mean squared error
            over standard deviation) on held-out samples up to which the network shrinks.
        rounds: of pruning and repair, on the way to the ratio.
        distill: steps of `fxlean.distill` at the end, whose result is kept if it is better on the
            samples held out.
        example_inputs: as for `prune`; if left out, the first batch.
        progress: show bars, and print what was done; by default bars on a terminal only. Nothing
            is shown or printed if False.
        **options: keyword arguments of `prune`, where `granularity` is "channel", `of` is "macs"
            and `method` is "relevance" unless given.

    Returns:
        A new, ordinary network in the same mode and on the same device.

    Raises:
        ArgumentError: arguments make no sense or the ratio cannot be reached; see also `prune`,
            `repair` and `compact`.

    Warns:
        PruneWarning: no layer can be repaired, as where all weights are used in several ways; see
            also `prune`.
    """
    given = {"granularity": "channel", "of": "macs", "method": "relevance", **options}
    _check(model, ratio, tolerance, rounds, distill, given)
    bare = unwrapped(model)
    check_traceable(bare)
    example, found = example_and_batches(bare, example_inputs, batches)
    data, held = _split(bare, list(found))
    wanted = outputs_of(bare, held)
    if tolerance is not None and isnan(relative_output_error(wanted, wanted)):
        raise ArgumentError(
            f"{type(bare).__name__} returns no floating-point tensor, so its outputs have no error "
            f"to hold against tolerance={tolerance:g}. Pass a ratio."
        )

    def error_of(candidate: nn.Module) -> float:
        return relative_output_error(outputs_of(candidate, held), wanted)

    if distill:
        check_training(bare, data)
    work = copied(bare)
    frozen = not any(parameter.requires_grad for parameter in work.parameters())
    if frozen:  # as the model is, but the copy may change
        work.requires_grad_(True)
    pruned = partial(prune, example_inputs=example, calibration=data, progress=progress, **given)
    repaired = partial(_repair, batches=data, reference=bare, known={}, progress=progress)
    if ratio is not None:
        _in_rounds(work, pruned, repaired, ratio, rounds)
    else:
        assert tolerance is not None
        work = _within(work, pruned, repaired, tolerance, given["of"], error_of)
    if distill:
        trained = copied(work)
        distill_model(trained, data, bare, distill, progress=progress)
        work = min(work, trained, key=error_of)
    if frozen:
        work.requires_grad_(False)
    small = compact(work, example)
    if progress is not False:
        tqdm.write(str(report(small, example, before=bare)))
        tqdm.write(f"relative error of the outputs on held-out samples: {error_of(small):.4f}")
    return small


def _split(
    model: nn.Module, batches: Sequence[Arguments]
) -> tuple[list[Arguments], list[Arguments]]:
    """Batches to calibrate on, and those held out: an eighth of each, or of single samples."""
    sizes = sample_counts(model, batches)
    samples = sum(sizes)
    if samples < 4:
        raise ArgumentError(
            f"batches hold {counted(samples, 'sample')}. Pass at least four, better some hundred, "
            "of which a part is held out. A batch that is taken only as a whole counts as one."
        )
    data, held = [], []
    # One sample alone has no variance that its error could be relative to.
    every = spacing(len(batches), HELD)
    for number, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
        if size > 1:
            first = size - max(min(2, size // 2), size // HELD)
            data.append(some_samples(batch, slice(0, first)))
            held.append(some_samples(batch, slice(first, size)))
        else:
            (held if number % every == every - 1 else data).append(batch)
    return data, held


def _repair(
    model: nn.Module,
    batches: Sequence[Arguments],
    reference: nn.Module,
    known: Known,
    progress: bool | None,
) -> None:
    """Repair what can be repaired, if anything can."""
    try:
        repair_towards(model, batches, reference, known, progress=progress)
    except NothingToRepairError as err:
        warn(f"shrunk without repair: {err}", PruneWarning)


def _in_rounds(
    work: nn.Module,
    pruned: Callable[[nn.Module, float], object],
    repaired: Callable[[nn.Module], None],
    ratio: float,
    rounds: int,
) -> None:
    """Prune the network to a ratio in rounds, in place."""
    for left in schedule(ratio, rounds):
        try:
            pruned(work, left)
        except ArgumentError as err:
            if left == ratio:
                raise
            raise ArgumentError(f"on the way to {ratio:g}: {err}") from err
        repaired(work)


def _within(
    work: nn.Module,
    pruned: Callable[[nn.Module, float], object],
    repaired: Callable[[nn.Module], None],
    tolerance: float,
    of: Any,
    error_of: Callable[[nn.Module], float],
) -> nn.Module:
    """The network pruned as far as the error of its outputs allows, in ever smaller steps."""
    ratio, factor, best = 1.0, FACTOR, work
    refused: ArgumentError | None = None
    while factor < FINEST and ratio > SMALLEST:
        trial = copied(best)
        try:
            pruned(trial, ratio * factor)
        except ArgumentError as err:  # so much cannot go; less may
            refused, factor = err, factor**0.5
            continue
        repaired(trial)
        if error_of(trial) <= tolerance:
            best, ratio = trial, ratio * factor
        else:
            factor = factor**0.5
    if best is work:
        if refused is not None:
            raise ArgumentError(f"whatever the tolerance: {refused}") from refused
        raise ArgumentError(
            f"tolerance is {tolerance:g}, but the outputs change by more when {1 - factor:.1%} of "
            f"the {of} go. Pass a larger one, or more batches."
        )
    return best


def _check(
    model: Any, ratio: Any, tolerance: Any, rounds: Any, distill: Any, options: dict[str, Any]
) -> None:
    """Reject arguments that make no sense, before anything is run."""
    check_names(options, prune)
    if "calibration" in options:
        raise ArgumentError("calibration is no option of shrink. Pass the batches as `batches`.")
    if (ratio is None) == (tolerance is None):
        raise ArgumentError(
            f"ratio is {shown(ratio)} and tolerance is {shown(tolerance)}. Pass one of them: the "
            "fraction of the cost that is left, or the relative error of the outputs that is "
            "allowed."
        )
    check(model, 1.0 if ratio is None else ratio, **options)
    if tolerance is not None and (
        not isinstance(tolerance, Real) or isinstance(tolerance, bool) or not float(tolerance) > 0
    ):
        raise ArgumentError(
            f"tolerance is {shown(tolerance)}. Pass a number above 0, such as 0.05."
        )
    check_count("rounds", rounds)
    check_count("distill", distill, least=0)
    if distill:
        check_trainable(model)
