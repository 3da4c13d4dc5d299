"""`iterate`: pruning step by step, with fine-tuning by the user or repair in between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..calibration.batches import example_and_batches, restartable
from ..calibration.repair_model import repair_towards
from ..calibration.running import Known
from ..tracing.arguments import check_traceable, check_unfrozen, unwrapped
from ..tracing.rehearsal import rehearsed
from ..tracing.sandbox import copied, untouched
from .options import check, check_names
from .prune_model import prune
from .result import PruneResult
from .schedules import check_start, schedule, to_be_looped_over


@to_be_looped_over
def iterate(
    model: nn.Module,
    ratio: float,
    steps: int,
    example_inputs: Any = None,
    *,
    start: int = 0,
    repair: bool = False,
    **options: Any,
) -> Iterator[PruneResult]:
    """Prune step by step: yields the result of each step, after which you fine-tune.

    Step t of n keeps `ratio ** (t / n)` of the kernels, as in the paper. With `repair`, every step
    is repaired towards the network as it was at the call, and the next one scores it anew.

    Args:
        model: pruned in place, further with every step.
        ratio: fraction of the prunable kernels that is kept in the end.
        steps: number of steps, at least 1; four are enough for repair, without training.
        example_inputs: as for `prune`.
        start: how many of the steps are done already, to go on with a model that was loaded.
        repair: whether to repair after every step on the batches of `calibration`, or on noise;
            then no training is needed between the steps. Meant for the method "relevance", which
            scores what was repaired; see `fxlean.repair`.
        **options: any keyword argument of `prune`.

    Raises:
        ArgumentError: at the call for bad arguments, not at the first step.

    Warns:
        PruneWarning: nobody has looped over the steps, so nothing was pruned.
    """
    check_names(options, prune)
    check(model, ratio, **options)
    ratios = schedule(ratio, steps)
    check_start(start, steps, repair=repair)
    ratios = ratios[start:]
    check_traceable(unwrapped(model))
    if example_inputs is not None or options.get("calibration") is None:
        rehearsed(unwrapped(model), example_inputs)
    options["calibration"] = restartable(options.get("calibration"))
    if repair:
        check_unfrozen(model)
        return _repaired(model, copied(unwrapped(model)), ratios, example_inputs, options)
    return (prune(model, ratio, example_inputs, **options) for ratio in ratios)


def _repaired(
    model: nn.Module,
    reference: nn.Module,
    ratios: Sequence[float],
    example_inputs: Any,
    options: Mapping[str, Any],
) -> Iterator[PruneResult]:
    """Prune to each of these ratios, and repair towards the reference."""
    known: Known = {}
    network, progress = unwrapped(model), options.get("progress")
    for ratio in ratios:
        with untouched(network, always=False):  # a step whose repair fails is none
            result = prune(model, ratio, example_inputs, **options)
            _, batches = example_and_batches(network, example_inputs, options["calibration"])
            found = repair_towards(network, batches, reference, known, progress=progress)
        yield replace(result, repair=found)
