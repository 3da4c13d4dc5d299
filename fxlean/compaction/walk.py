"""From the traced graphs of a model to its slots: one walk, one rule an operator."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from ..channels.rules.movements import moves
from ..channels.weights import Constants
from ..tracing.sandbox import on_cpu
from ..tracing.tracer import Trace
from .rules import Step, barrier, fresh, pin, rule_of
from .slots import Call, Slots

LAYERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear)


@torch.no_grad()
@on_cpu()
def walk(model: nn.Module, trace: Trace, *, reshape: bool) -> Slots:
    """The slots of a model.

    Args:
        model: without masks.
        trace: its graphs.
        reshape: whether `flatten` and its like are taken to follow the number of channels, as
            they do unless the code has sizes written into it.
    """
    slots = Slots()
    layers = owners_of(model, trace)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for piece in trace.pieces:
        names = piece.state_nodes
        constants = Constants(
            piece.graph, {node: (name, tensors[name]) for node, name in names.items()}, moves
        )
        env: dict[fx.Node, Any] = {
            node: fresh(slots, tuple(node.meta["val"].shape)) for node in piece.input_nodes
        }
        for node in piece.graph.graph.nodes:
            step = Step(node, env, slots, constants, layers, names, reshape)
            if node.op == "output":
                pin(step)
            elif node.op == "call_function" and any(arg in env for arg in node.all_input_nodes):
                env[node] = _result(step)
    _refuse(slots)
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


def _refuse(slots: Slots) -> None:
    """Pin what refused layers read and write, and drop their calls."""
    for call in slots.calls:
        if call.layer in slots.refused:
            slots.pin(call.source.slots)
            slots.pin(call.result.slots)
    slots.calls = [call for call in slots.calls if call.layer not in slots.refused]
    first: dict[str, Call] = {}
    for call in slots.calls:
        known = first.setdefault(call.layer, call)
        slots.link(known.source.slots, call.source.slots)
        slots.link(known.result.slots, call.result.slots)


def _result(step: Step) -> Any:
    """The value of a node, or a tuple of values."""
    if step.node.target is operator.getitem:
        source, number = step.node.args
        several: Any = step.env[source]
        return several[number] if isinstance(several, tuple) else several
    if not step.values():
        return barrier(step)
    result = rule_of(step)(step)
    return barrier(step) if result is None else result
