"""Units that the code of a model can do without, which trials show.

The sizes in a graph are numbers. Whether the code computes them, or has them written into it, shows
when it runs on fewer channels, beside a copy that has zeros in their place; so does a layer that no
output depends on, or that runs in training only, and reads channels that the graph knows nothing
of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..masking import is_masked, without_masks
from ..selection.channels import alike
from ..tracing.inputs import Arguments
from ..tracing.tracer import Trace, trace_model
from .attempts import fitted
from .cut import blank, blank_tensor, count_groups, narrow, narrow_tensor, shell
from .rules import FOLLOW
from .slots import Slots
from .units import Units, units_among
from .verify import Check, trains
from .walk import slots_of

Kind = NDArray[np.int64]  # the numbers of units that the same layers write and read
Trial = Callable[[Sequence[Kind]], str]
TRIALS = 64  # to find out which kinds a model needs, after it has failed without some of all
SAME = "the model does not do the same without some of them"
TRAINS = "the model does not train without some of them"


@torch.no_grad()
def units_of(model: nn.Module, trace: Trace) -> Units:
    """The units of a model, with masks or without."""
    bare = model
    if is_masked(model):
        bare = without_masks(model)
        trace = trace_model(bare, trace.arguments)
    can_train = cache(lambda: trains(bare, trace.arguments))
    best, failure = None, ""
    for follow in FOLLOW:
        slots = slots_of(bare, trace, follow)
        units = units_among(bare, slots)
        hidden = _has_hidden(bare, slots)
        trial = _trial(bare, units, trace, training=hidden and can_train())
        units, failure = _tried(units, trial)
        if best is None or units.count > best.count:
            best = units
        if failure != SAME or not slots.assumed:
            break
    assert best is not None
    return best


def cut(bare: nn.Module, units: Units, gone: NDArray[np.bool_], arguments: Arguments) -> nn.Module:
    """A model without some units, True where they go.

    Args:
        bare: without masks; not changed, and what is not cut of it is shared.
        units: of the model.
        gone: shape (units,).
        arguments: to run it on.
    """
    result, stays = shell(bare), np.append(~gone, True)
    _leave(result, units, stays, narrow, narrow_tensor)
    for name, (groups, channels) in units.groups.items():
        count_groups(result.get_submodule(name), groups, torch.from_numpy(stays[channels]))
    return fitted(result, arguments)


def _has_hidden(bare: nn.Module, slots: Slots) -> bool:
    """Whether layers have weights that the graph does not, as those that run in training alone."""
    known = {applied.layer for applied in slots.applications}
    return any(
        name not in known and any(p.dim() > 1 for p in module.parameters(recurse=False))
        for name, module in bare.named_modules()
    )


def _trial(bare: nn.Module, units: Units, trace: Trace, *, training: bool) -> Trial:
    """What goes wrong without a third of the units of some kinds, or an empty string.

    Nothing does if the model computes the same as with zeros in their place, and with `training`
    trains.
    """

    def problem(kinds: Sequence[Kind]) -> str:
        gone = np.zeros(units.count, dtype=bool)
        for kind in kinds:
            gone[kind[min(1, len(kind) - 1) :: 3]] = True
        stays = np.append(~gone, True)
        for use in units.uses:  # no layer loses all of its channels
            for side in (use.rows, use.columns):
                gone[side[side >= 0]] &= stays[side].any()
        if not gone.any():
            return ""
        smaller = cut(bare, units, gone, trace.arguments)
        check = Check(_blanked(bare, units, gone), bare, trace.arguments, noise=False)
        if check.difference(smaller):
            return SAME
        return "" if not training or trains(smaller, trace.arguments) else TRAINS

    return problem


def _blanked(bare: nn.Module, units: Units, gone: NDArray[np.bool_]) -> nn.Module:
    """The model of full size with zeros in place of some units, True where they go."""
    result = shell(bare)
    _leave(result, units, np.append(~gone, True), blank, blank_tensor)
    return result


def _leave(
    model: nn.Module,
    units: Units,
    stays: NDArray[np.bool_],
    layer: Callable[..., None],
    tensor: Callable[..., None],
) -> None:
    """Leave some units only, by a function of layers and one of other tensors; in place."""
    for use in units.uses:
        if use.number == 0:
            rows, columns = (torch.from_numpy(stays[side]) for side in (use.rows, use.columns))
            layer(model.get_submodule(use.layer), rows, columns, use.groups)
    for name, (dim, _, channels) in units.tensors.items():
        tensor(model, name, dim, torch.from_numpy(stays[channels]))


def _tried(units: Units, problem: Trial) -> tuple[Units, str]:
    """The units that a model can do without, and what went wrong without some of all."""
    kinds = _kinds(units)
    failure = problem(kinds)
    if failure:
        kinds = _without_needed(problem, kinds)
        chosen = np.zeros(units.count, dtype=bool)
        for kind in [] if problem(kinds) else kinds:
            chosen[kind] = True
        units = units.only(chosen, failure)
    return units, failure


def _kinds(units: Units) -> list[Kind]:
    """Units that the same layers write and read, together; alike names of layers side by side."""
    rows, columns = [use.rows for use in units.uses], [use.columns for use in units.uses]
    found = alike(rows, columns, np.ones(units.count, dtype=bool))
    names = [re.sub(r"\d+", "", use.layer) for use in units.uses]
    return [kind for kind, _ in sorted(found, key=lambda pair: [names[at] for at in pair[1][0]])]


def _without_needed(problem: Trial, kinds: Sequence[Kind]) -> list[Kind]:
    """The kinds that a model can do without some of, if not of all at once; found by halving."""
    free: list[Kind] = []
    failing, trials = [list(kinds)], 0
    while failing and trials < TRIALS:
        group = failing.pop(0)
        half = len(group) // 2
        for part in (group[:half], group[half:]) if half else ():
            trials += 1
            if problem(part):
                failing.append(part)
            else:
                free += part
    return free
