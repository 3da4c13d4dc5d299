"""Which slots to keep, where cutting a layer loose from its neighbours costs more than it saves.

A batch norm or depthwise convolution computes every channel from its own. Where what is before
it and what is behind it need different channels, it can select: fewer channels for its neighbours
to compute, but a copy of those selected. Or it can be tied: both sides keep the same channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .cut import cost, part_of
from .slots import Application, Slots
from .solve import Kept, components, is_ragged, solve

Layers = Mapping[str, Sequence[Application]]


def layers_of(slots: Slots) -> Layers:
    """The applications of every layer, by its name."""
    layers: dict[str, list[Application]] = {}
    for applied in slots.applications:
        layers.setdefault(applied.layer, []).append(applied)
    return layers


def choose_slots(slots: Slots, layers: Layers) -> Kept:
    """The slots to keep for the least estimated time.

    Whether to tie a layer is judged by what it saves the layer and those neighbours that would
    have more to compute; then it is tried all together.
    """
    loose = solve(slots)
    fill = is_ragged(slots, loose)
    if fill:
        loose = solve(slots, fill=True)
    selecting = [name for name, applications in layers.items() if _selects(applications, loose)]
    if not selecting:
        return loose
    tight = solve(slots, selecting, fill=fill)
    before, after = _costs(layers, loose), _costs(layers, tight)
    neighbours = _neighbours(slots, layers, loose, tight)
    tied = [
        name
        for name in selecting
        if sum(after[other] - before[other] for other in neighbours[name] | {name}) <= 0
    ]
    mixed, dense = solve(slots, tied, fill=fill), solve(slots, pinned=True)
    plans = {
        mixed: _costs(layers, mixed),
        loose: before,
        tight: after,
        dense: _costs(layers, dense),
    }
    return min(plans, key=lambda kept: sum(plans[kept].values()))


def _selects(applications: Sequence[Application], kept: Kept) -> bool:
    """Whether a layer that computes every channel from its own has to select."""
    source, result = applications[0].source.slots, applications[0].result.slots
    return applications[0].diagonal and not torch.equal(kept(source), kept(result))


def _costs(layers: Layers, kept: Kept) -> dict[str, float]:
    return {name: cost(part_of(applications, kept)) for name, applications in layers.items()}


def _neighbours(slots: Slots, layers: Layers, loose: Kept, tight: Kept) -> dict[str, set[str]]:
    """For each layer those that share slots with it which only ties would keep."""
    label = components(slots)
    touched: dict[str, set[int]] = {}
    owners: dict[int, set[str]] = {}
    for name, applications in layers.items():
        ends = torch.cat([applications[0].source.slots, applications[0].result.slots])
        touched[name] = set(label[ends[tight(ends) & ~loose(ends)]].tolist())
        for number in touched[name]:
            owners.setdefault(number, set()).add(name)
    return {
        name: set().union(*(owners[number] for number in numbers))
        for name, numbers in touched.items()
    }
