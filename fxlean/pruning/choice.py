"""What to keep of a network: kernels one by one or whole channels, within a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import inf, nan

import numpy as np
from torch import nn

from ..compaction.attempts import compact
from ..compaction.trials import cut, units_of
from ..costs import layer_costs
from ..errors import ArgumentError, shown
from ..masking import without_masks
from ..selection.takeover import own_scores
from ..tracing.sandbox import copied
from ..tracing.tracer import Trace
from .channels import Channels, Flags, find_channels
from .masks import apply_masks, parameter_masks
from .targets import Problem, Target, kernels_within, unit_costs, units_within


@dataclass(frozen=True, eq=False)
class Choice:
    """What was chosen.

    Attributes:
        keep: shape (kernels,), True for kernels that survive.
        chains: how many chains were extracted.
        left, pinned: see `PruneResult`.
    """

    keep: Flags
    chains: int = 0
    left: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    pinned: Mapping[str, str] = field(default_factory=dict)


def choose_kernels(model: nn.Module, trace: Trace, problem: Problem) -> Choice:
    """Kernels one by one.

    Args:
        model: not changed.
        trace: of the model.
        problem: what to choose from.
    """
    from ..selection.liveness import zero_channels  # here, because numba takes long to import

    network, target = problem.network, problem.target

    def compacted(_: nn.Module, keep: Flags) -> nn.Module:
        pruned = copied(model)
        zero = zero_channels(network.graph, keep)
        masks = parameter_masks(pruned, network, keep, zero, zero)
        apply_masks(pruned, masks, trace.called)
        return compact(pruned, trace.arguments)

    costs = () if target.of == "kernels" else layer_costs(model, trace)
    measured = _measured(model, target, compacted)
    return Choice(*kernels_within(problem, costs, measured))


def choose_channels(model: nn.Module, trace: Trace, problem: Problem) -> Choice:
    """Whole channels; the arguments are those of `choose_kernels`."""
    channels, target = find_channels(problem.network, units_of(model, trace)), problem.target
    together = np.maximum if problem.method.chains else np.add
    kernels = problem.scores()
    scores = channels.scores(kernels, together)
    scores = own_scores(scores, channels.readings(kernels, scores, problem.overlaps))
    totals = {
        "kernels": problem.network.graph.num_kernels,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": sum(cost.macs for cost in layer_costs(model, trace)),
    }

    def without(bare: nn.Module, gone: Flags) -> nn.Module:
        return cut(bare, channels.units, gone, trace.arguments)

    measured = _measured(model, target, without)
    gone = units_within(channels, scores, target, totals, measured)
    left = {name: _left(channels, name, gone, totals[name]) for name in ("parameters", "macs")}
    return Choice(channels.kept_kernels(gone), 0, left, channels.units.pinned)


def _left(channels: Channels, of: str, gone: Flags, total: int) -> tuple[int, int]:
    """What the network costs without some units, and with all of them."""
    costs = unit_costs(channels, of, {})
    return round(total - costs.total(np.zeros_like(gone)) + costs.total(gone)), total


def _measured(
    model: nn.Module, target: Target, built: Callable[[nn.Module, Flags], nn.Module]
) -> Callable[[Flags], float]:
    """A function of what is kept or gone: which fraction is left of what the target measures.

    Candidates are built from the model without masks. That is measured just before or after, as
    machines do other things as well.
    """

    @cache
    def whole() -> nn.Module:
        return without_masks(model)

    def measure(candidate: nn.Module) -> float:
        assert callable(target.of)
        measured = target.of(copied(candidate))  # it may change what it is given
        try:
            number = float(measured)
        except (TypeError, ValueError):
            number = nan
        if not 0 < number < inf:
            raise ArgumentError(
                f"of gave {shown(measured)} for a {type(model).__name__}. Pass a function that "
                "returns a number above 0."
            )
        return number

    return lambda flags: measure(built(whole(), flags)) / measure(whole())
