"""From traced graphs to the wiring of channels: one walk, one rule an operator."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..tracing.sandbox import untouched
from ..tracing.tracer import Piece, Trace
from .flow import Flow, make_flow, scalar_gain
from .graph import Kind
from .rules.movements import moves
from .rules.table import rule_for
from .site import Site
from .weights import Constants
from .wiring import Block, Wiring


@dataclass(frozen=True, eq=False)
class Walked:
    """What the walk found in one traced graph.

    Attributes:
        flows: the flow of each value that depends on the inputs, or a tuple of flows.
        made: the numbers of the channels that were made for each call of an operator.
    """

    flows: Mapping[fx.Node, Any]
    made: Mapping[fx.Node, range]


@dataclass(frozen=True, eq=False)
class Wired:
    """The wiring of a model.

    Attributes:
        wiring: channels, edges and the weights behind them.
        outputs: channels that leave what was traced.
        results: channels that the model returns as they are; what leaves a submodule to be
            processed further is not among them.
        used: parameters that the traced graphs read.
        walks: what was found in each of the traced graphs, in their order.
    """

    wiring: Wiring
    outputs: Tensor
    results: Tensor
    used: frozenset[str]
    walks: tuple[Walked, ...] = ()


def wire(model: nn.Module, trace: Trace) -> Wired:
    """Walk the traced graphs of a model, in the order in which they ran."""
    wiring = Wiring(skipped=dict(trace.left_out))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    linked: dict[int, Flow] = {}
    leaving: list[Tensor] = []
    results: list[Tensor] = []
    used: set[str] = set()
    walks: list[Walked] = []
    returned = {id(tensor) for tensor in trace.results}
    for piece in trace.pieces:
        with untouched(model):  # operators on constants may draw random numbers
            flows, walked = _walk(wiring, piece, tensors, linked, used)
        walks.append(walked)
        for number, flow in enumerate(flows):
            if flow is None:
                continue
            leaving.append(flow.channels())
            source = piece.outputs[number] if piece.outputs else None
            if source is not None:
                linked[id(source)] = flow
            if source is None or id(source) in returned:
                results.append(flow.channels())
    nothing = torch.zeros(0, dtype=torch.int64)
    return Wired(
        wiring,
        torch.cat([nothing, *leaving]),
        torch.cat([nothing, *results]),
        frozenset(used),
        tuple(walks),
    )


def _walk(
    wiring: Wiring,
    piece: Piece,
    tensors: Mapping[str, Tensor],
    linked: Mapping[int, Flow],
    used: set[str],
) -> tuple[list[Flow | None], Walked]:
    """The flows that a piece returns, None for what does not depend on its inputs; and all."""
    nodes = list(piece.graph.graph.nodes)
    state = {node: (name, tensors[name]) for node, name in piece.state_nodes.items()}
    used |= {name for node, (name, _) in state.items() if node.users}
    constants = Constants(piece.graph, state, moves)
    env: dict[fx.Node, Any] = {}
    for number, node in enumerate(piece.input_nodes):
        known = linked.get(id(piece.inputs[number])) if piece.inputs else None
        env[node] = known or _source(wiring, tuple(node.meta["val"].shape))
    blocks: dict[fx.Node, Block] = {}
    made: dict[fx.Node, range] = {}
    returned: list[Flow | None] = []
    for node in nodes:
        if node.op == "output":
            returned = [env.get(arg) for arg in node.args[0]]
        elif node.op == "call_function" and any(arg in env for arg in node.all_input_nodes):
            before = wiring.num_channels
            result = _result(Site(node, wiring, constants, env, blocks))
            made[node] = range(before, wiring.num_channels)
            if result is not None:
                env[node] = result
    return returned, Walked(env, made)


def _result(site: Site) -> Any:
    if site.node.target is operator.getitem:
        source, number = site.node.args
        return site.env[source][number]  # type: ignore[index]
    value = site.node.meta.get("val")
    if not isinstance(value, Tensor | tuple | list):
        return None
    return rule_for(site.node.target)(site)


def _source(wiring: Wiring, shape: tuple[int, ...]) -> Flow:
    """An input of the model: one live channel for each position of its channel dimension."""
    dim = min(1, len(shape) - 1)
    sizes = [size if number == dim else 1 for number, size in enumerate(shape)]
    count = shape[dim] if shape else 1
    ids = wiring.add_channels(Kind.LIVE, count).reshape(sizes)
    return make_flow(ids, scalar_gain(len(shape)), shape)
