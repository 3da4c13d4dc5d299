"""Which stops are one layer: a network may use a layer several times in a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Hashable, Iterator, Sequence

import torch
from torch import fx, nn

from ..channels.weights import Origin
from .side_by_side import Side, Stop
from .systems import operator_of

Uses = tuple[int, ...]  # numbers of the stops that are one layer, in order
Place = tuple[Origin, torch.Size]  # of a tensor of that shape


def uses_of(side: Side) -> list[Uses]:
    """The stops of each layer and norm, in the order of the first of each.

    Those of a layer have the same weight, bias and options; of a group or layer norm, the same
    scale and shift; of a batch norm, the same running mean.
    """
    found: defaultdict[Hashable, list[int]] = defaultdict(list)
    for number, stop in enumerate(side.stops):
        found[_identity(side, stop) or number].append(number)
    return [tuple(numbers) for numbers in found.values()]


def shared_parameters(side: Side, layers: Sequence[Uses]) -> set[str]:
    """Parameters of which several layers and norms read the same element, or that others read."""
    nodes = {stop.node for stop in side.stops}
    others = {name for name, readers in side.running.readers().items() if readers - nodes}
    read: defaultdict[str, list[Place]] = defaultdict(list)
    for uses in layers:
        for place in _places(side, side.stops[uses[0]]):
            read[place[0].parameter].append(place)
    found = {name for name, places in read.items() if len(places) > 1 and _overlap(places)}
    return found | others


def changeable(model: nn.Module, side: Side, shared: Container[str]) -> set[int]:
    """The numbers of the stops that are layers whose weight may change."""
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = set()
    for number, stop in enumerate(side.stops):
        origin = stop.block.weight.origin if stop.block is not None else None
        if origin is not None and origin.parameter in free and origin.parameter not in shared:
            found.add(number)
    return found


def mean_behind(side: Side, uses: Uses) -> str | None:
    """The name of the running mean of the batch norm that alone reads a layer, and reads no other.

    None where there is none.
    """
    names = {side.stops[number].statistics for number in uses}
    name = names.pop()
    norms = [stop for stop in side.stops if stop.block is None and stop.statistics == name]
    return name if not names and len(norms) == len(uses) else None


def _identity(side: Side, stop: Stop) -> Hashable:
    """What all stops of one layer have in common; None where that is unknown."""
    if stop.block is None and not stop.scaled:
        return stop.statistics
    places = tuple(
        (origin.parameter, shape, origin.index is not None and origin.index.cpu().numpy().tobytes())
        for origin, shape in _places(side, stop)
    )
    if stop.block is None:
        return places if len(places) == 2 else None
    options = operator_of(stop.block.weight, stop.node).options
    return (places, str(options)) if stop.block.weight.origin is not None else None


def _places(side: Side, stop: Stop) -> Iterator[Place]:
    """Where the weight and bias of a layer are, or the scale and shift of a group or layer norm."""
    nodes = stop.scale_and_shift if stop.scaled else []
    if stop.block is not None:
        nodes = [stop.bias]
        if stop.block.weight.origin is not None:
            yield stop.block.weight.origin, stop.block.weight.value.shape
    for node in nodes:
        if isinstance(node, fx.Node):
            origin = side.running.origin(node)
            if origin is not None:
                yield origin, side.running.value(node).shape


def _overlap(places: Sequence[Place]) -> bool:
    every = torch.cat([origin.flat_index(shape).reshape(-1).cpu() for origin, shape in places])
    return len(every.unique()) < len(every)
