"""From traced graphs to the wiring of channels: one walk, one rule an operator."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..tracing.sandbox import on_cpu, untouched
from ..tracing.tracer import Piece, Trace
from .builder import Builder
from .flow import Flow, make_flow, scalar_gain
from .graph import Kind
from .rules.movements import moves
from .rules.table import rule_for
from .site import Site
from .weights import Constants
from .wiring import Wiring


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
        called: names of the modules that the forward pass calls.
        left_out: what could not be traced, and why.
        walks: what was found in each of the traced graphs, in their order.
    """

    wiring: Wiring
    outputs: Tensor
    results: Tensor
    used: frozenset[str]
    called: frozenset[str]
    left_out: Mapping[str, str]
    walks: tuple[Walked, ...] = ()


@torch.no_grad()
@on_cpu()
def wire(model: nn.Module, trace: Trace) -> Wired:
    """Walk the traced graphs of a model, in the order in which they ran."""
    wiring = Wiring()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    linked: dict[int, Flow] = {}
    leaving: list[Tensor] = []
    results: list[Tensor] = []
    used: set[str] = set()
    walks: list[Walked] = []
    returned = {id(tensor) for tensor in trace.results}
    numbers = itertools.count(1)
    for piece in trace.pieces:
        state = {node: (name, tensors[name]) for node, name in piece.state_nodes.items()}
        used |= {name for node, (name, _) in state.items() if node.users}
        sources = [
            (linked.get(id(piece.inputs[number])) if piece.inputs else None)
            or _named_source(wiring, tuple(node.meta["val"].shape), next(numbers))
            for number, node in enumerate(piece.input_nodes)
        ]
        with untouched(model):  # operators on constants may draw random numbers
            constants = Constants(piece.graph, state, moves)
            walks.append(_with_numbers(piece, wiring, constants, sources))
        env = walks[-1].flows
        for number, node in enumerate(piece.output_nodes):
            flow = env.get(node)
            if flow is None:
                continue
            leaving.append(flow.channels())
            result = piece.outputs[number] if piece.outputs else None
            if result is not None:
                linked[id(result)] = flow
            if result is None or id(result) in returned:
                results.append(flow.channels())
    nothing = torch.zeros(0, dtype=torch.int64)
    return Wired(
        wiring,
        torch.cat([nothing, *leaving]),
        torch.cat([nothing, *results]),
        frozenset(used),
        trace.called,
        trace.left_out,
        tuple(walks),
    )


def _with_numbers(
    piece: Piece, wiring: Wiring, constants: Constants, sources: Sequence[Flow]
) -> Walked:
    """A walk, and which channels each call makes."""
    made: dict[fx.Node, range] = {}
    prefix = f"{piece.module}." if piece.module else ""

    def apply(site: Site) -> Any:
        before = wiring.num_channels
        result = rule_for(site.node.target)(site)
        made[site.node] = wiring.made_by(prefix + site.node.name, before)
        return result

    return Walked(walk(piece, wiring, constants, sources, apply), made)


def _named_source(wiring: Wiring, shape: tuple[int, ...], number: int) -> Flow:
    """The source of an input, counted from 1, whose name is kept."""
    first = wiring.num_channels
    flow = source(wiring, shape)
    wiring.made_by("input" if number == 1 else f"input{number}", first)
    return flow


def walk(
    piece: Piece,
    wiring: Builder,
    constants: Constants,
    sources: Sequence[Flow],
    apply: Callable[[Site], Any],
) -> dict[fx.Node, Any]:
    """The flow, or tuple of flows, of every node of a piece that depends on its inputs.

    Args:
        piece: the graph.
        wiring: rules add to it.
        constants: of the piece.
        sources: the flows of its inputs.
        apply: gives the result of an operator.
    """
    env: dict[fx.Node, Any] = dict(zip(piece.input_nodes, sources, strict=True))
    for node in piece.graph.graph.nodes:
        if node.op == "call_function" and any(arg in env for arg in node.all_input_nodes):
            result = _result(Site(node, wiring, constants, env), apply)
            if result is not None:
                env[node] = result
    return env


def _result(site: Site, apply: Callable[[Site], Any]) -> Any:
    if site.node.target is operator.getitem:
        source, number = site.node.args
        return site.env[source][number]  # type: ignore[index]
    value = site.node.meta.get("val")
    return apply(site) if isinstance(value, Tensor | tuple | list) else None


def source(wiring: Builder, shape: tuple[int, ...]) -> Flow:
    """An input of the model: one live channel for each position of its channel dimension."""
    dim = min(1, len(shape) - 1)
    sizes = [size if number == dim else 1 for number, size in enumerate(shape)]
    count = shape[dim] if shape else 1
    ids = wiring.add_channels(Kind.LIVE, count).reshape(sizes)
    return make_flow(ids, scalar_gain(len(shape)), shape)
