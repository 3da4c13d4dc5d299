"""From the traced graphs of a model to its slots: the walk of pruning, on slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from ..channels.calls import samples_of
from ..channels.rules.movements import moves
from ..channels.walk import source, walk
from ..channels.weights import Constants
from ..checkpoint.layout import named_tensors
from ..tracing.sandbox import on_cpu, same_random_states
from ..tracing.tracer import Piece, Trace
from .rules import apply_rule
from .slots import Application, Slots

LAYERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.Linear, nn.GroupNorm)


@torch.no_grad()
@on_cpu()
def slots_of(model: nn.Module, trace: Trace, follow: Collection[Any]) -> Slots:
    """The slots of a model.

    Args:
        model: without masks.
        trace: its graphs.
        follow: operators whose sizes are taken to follow the number of channels, see `FOLLOW`.
    """
    slots, uses = Slots(batch=samples_of(trace)), Counter[str]()
    owners = owners_of(model, trace)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for piece in trace.pieces:
        slots.walked = "input"
        state = {node: (name, tensors[name]) for node, name in piece.state_nodes.items()}
        constants = Constants(piece.graph, state, moves, owners)
        sources = [source(slots, tuple(node.meta["val"].shape)) for node in piece.input_nodes]
        with same_random_states(model):
            env = walk(
                piece, slots, constants, sources, lambda site: apply_rule(site, slots, follow)
            )
        uses.update(_read(piece, constants, env))
        slots.walked = "output"
        for node in piece.output_nodes:
            if node in env:
                slots.pin(env[node].ids)
            elif isinstance(node, fx.Node):
                slots.refused |= constants.layers(node)
    _refuse(slots)
    _join_uses(slots, uses, {name for name, _ in named_tensors(model)})
    return slots


def owners_of(model: nn.Module, trace: Trace) -> dict[str, str]:
    """The layer that owns a parameter or buffer, where it is the only one and is called."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                owners.setdefault(id(tensor), []).append(path)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = {}
    for name, tensor in tensors.items():
        path = owners[id(tensor)][0]
        alone = len(owners[id(tensor)]) == 1 and path in trace.called
        if alone and isinstance(model.get_submodule(path), LAYERS):
            found[name] = path
    return found


def _read(piece: Piece, constants: Constants, env: Mapping[fx.Node, Any]) -> Iterator[str]:
    """Names of parameters and buffers, once for each argument that is computed from them.

    Of what depends on the inputs, and has a place in `env`; and of what is returned.
    """
    for node in piece.graph.graph.nodes:
        given = node.all_input_nodes
        if node.op == "output" or any(arg in env for arg in given):
            for arg in given:
                if arg not in env:
                    yield from constants.parameters(arg)


def _refuse(slots: Slots) -> None:
    """Pin what refused layers read and write, and drop their applications."""
    forms: dict[str, tuple[object, ...]] = {}
    for applied in slots.applications:
        if forms.setdefault(applied.layer, applied.form) != applied.form:
            slots.refused.add(applied.layer)
    slots.walked = "a layer whose parameters are used in another way as well"
    for applied in slots.applications:
        if applied.layer in slots.refused:
            slots.pin(applied.source.slots)
            slots.pin(applied.result.slots)
    slots.applications = [a for a in slots.applications if a.layer not in slots.refused]
    first: dict[str, Application] = {}
    for applied in slots.applications:
        known = first.setdefault(applied.layer, applied)
        slots.link(known.source.slots, applied.source.slots)
        slots.link(known.result.slots, applied.result.slots)


def _join_uses(slots: Slots, uses: Mapping[str, int], saved: Collection[str]) -> None:
    """Link what the same tensor is used for; pin it all if it is used in other ways as well.

    So it is if a model does not save it, for where that is loaded the tensor is whole again.
    """
    for name, found in list(slots.tensors.items()):
        (dim, first), *others = found
        alike = all(other == dim and len(ids) == len(first) for other, ids in others)
        if alike and len(found) == uses[name] and name in saved:
            for _, ids in others:
                slots.link(first, ids)
        else:
            for _, ids in found:
                slots.pin(ids)
            del slots.tensors[name]
