"""Single calls of operators, as rules see them: on flows of random ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import getitem

import torch
from torch import Tensor, fx

from fxlean.channels.builder import Builder
from fxlean.channels.flow import Flow, make_flow
from fxlean.channels.graph import Kind
from fxlean.channels.rules.movements import moves
from fxlean.channels.site import Site
from fxlean.channels.weights import Constants
from fxlean.channels.wiring import Wiring

CHANNELS = 5


@dataclass(frozen=True)
class Data:
    """Stands for a value with channels in the arguments of an operator; `draw` fills a shape."""

    shape: tuple[int, ...]
    draw: Callable[..., Tensor] = torch.randn


def integers(high: int) -> Callable[..., Tensor]:
    """Draws indices below a bound."""
    return lambda shape, generator: torch.randint(high, shape, generator=generator)


def complexes(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draws complex numbers."""
    return torch.randn(shape, generator=generator, dtype=torch.complex64)


def place(operator, args, generator: torch.Generator, **kwargs) -> Site:
    """The operator called on flows of random ids, as a site of its own.

    The channels of the flows are the first that the wiring makes. Tensors among the arguments
    are parameters.
    """
    wiring = Wiring()
    first = wiring.add_channels(Kind.LIVE, CHANNELS)

    def flow_of(value: Tensor) -> Flow:
        return random_flow(first, tuple(value.shape), generator)

    return site_of(operator, args, generator, wiring, flow_of, **kwargs)


def site_of(
    operator,
    args,
    generator: torch.Generator,
    wiring: Builder,
    flow_of: Callable[[Tensor], Flow],
    owner: str | None = None,
    **kwargs,
) -> Site:
    """The operator called on flows that `flow_of` gives for values; an owner has all parameters."""
    graph, env, state = fx.Graph(), {}, {}

    def stand_in(leaf):
        if not isinstance(leaf, Data | Tensor):
            return leaf
        node = graph.placeholder(f"p{len(graph.nodes)}")
        if isinstance(leaf, Data):
            node.meta["val"] = leaf.draw(leaf.shape, generator=generator)
            env[node] = flow_of(node.meta["val"])
        else:
            node.meta["val"] = leaf
            state[node] = (node.name, leaf)
        return node

    node = graph.call_function(operator, fx.node.map_aggregate(args, stand_in), kwargs)
    node.meta["val"] = operator(
        *fx.map_arg(node.args, lambda arg: arg.meta["val"].clone()), **kwargs
    )
    for number in range(len(node.meta["val"]) if isinstance(node.meta["val"], tuple) else 0):
        graph.call_function(getitem, (node, number))
    owners = {} if owner is None else {name: owner for name, _ in state.values()}
    constants = Constants(fx.GraphModule({}, graph), state, moves, owners)
    return Site(node, wiring, constants, env)


def random_flow(channels: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Flow:
    """Ids and gains that vary along a random part of the dimensions."""

    def vary():
        size = [n if torch.rand((), generator=generator) < 0.6 else 1 for n in shape]
        return torch.randint(len(channels), size, generator=generator)

    return make_flow(channels[vary()], 1.0 + vary().double(), shape)
