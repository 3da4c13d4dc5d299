"""`Site`: one call of an operator in a traced graph, as a rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .flow import Flow, make_flow, reduce_to, scalar_gain
from .graph import Kind
from .weights import Constants, Origin
from .wiring import CONSTANT, ZERO, Block, Wiring

Masks = list[tuple[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Site:
    """One call of an operator.

    Attributes:
        node: the call, in the traced graph.
        wiring: the channels and edges so far; rules add to it.
        constants: values and origins of what depends on parameters only.
        env: the flows of the nodes before, or tuples of flows.
        blocks: the convolutions before, by their node.
    """

    node: fx.Node
    wiring: Wiring
    constants: Constants
    env: Mapping[fx.Node, Any]
    blocks: dict[fx.Node, Block] = field(default_factory=dict)

    @property
    def packet(self) -> Any:
        """The operator, without its overload."""
        return getattr(self.node.target, "overloadpacket", self.node.target)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result, or of the first of several results."""
        value = self.node.meta["val"]
        first = value[0] if isinstance(value, tuple | list) else value
        return tuple(first.shape)

    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of all results."""
        value = self.node.meta["val"]
        values = value if isinstance(value, tuple | list) else [value]
        return [tuple(getattr(item, "shape", ())) for item in values]

    def argument(self, *names: str, default: Any = None) -> Any:
        """An argument by any of its names in the operator's schema; else the schema's default.

        Where the schema has none of the names, `default`.
        """
        return argument_of(self.node, *names, default=default)

    def nodes(self) -> list[fx.Node]:
        """The nodes among the arguments that carry channels, in order, with repetitions."""
        return [arg for arg in _leaves((self.node.args, self.node.kwargs)) if arg in self.env]

    def flows(self) -> list[Flow]:
        """The flows among the arguments, in order."""
        return [self.env[node] for node in self.nodes()]

    def flow(self, argument: Any = None) -> Flow:
        """The flow of an argument (the first flow, by default); of a constant, by its value."""
        if argument is None:
            return self.flows()[0]
        if isinstance(argument, fx.Node) and argument in self.env:
            flow: Flow = self.env[argument]
            return flow
        return constant_flow(self.value(argument))

    def is_constant(self, argument: Any) -> bool:
        """Whether an argument depends on parameters only."""
        return not any(leaf in self.env for leaf in _leaves(argument))

    def value(self, argument: Any) -> Any:
        """The real value of an argument that depends on parameters only."""
        return fx.map_arg(argument, self.constants.value)

    def origin(self, argument: Any) -> Origin | None:
        """Where the elements of a constant argument can be zeroed."""
        return self.constants.origin(argument) if isinstance(argument, fx.Node) else None

    def run(self, stand_in: Callable[[fx.Node], Any]) -> Any:
        """The operator's result with the flows replaced, and constants as they are."""
        device = next((v.device for v in self._tensors()), torch.device("cpu"))

        def lookup(node: fx.Node) -> Any:
            if node not in self.env:
                return self.constants.value(node)
            given = stand_in(node)
            return given.to(device, node.meta["val"].dtype)

        args = fx.map_arg(self.node.args, lookup)
        kwargs = fx.map_arg(self.node.kwargs, lookup)
        with torch.no_grad():
            return self.node.target(*args, **kwargs)  # type: ignore[operator]

    def _tensors(self) -> Iterator[Tensor]:
        for leaf in _leaves((self.node.args, self.node.kwargs)):
            if isinstance(leaf, fx.Node) and leaf not in self.env:
                value = self.constants.value(leaf)
                if isinstance(value, Tensor):
                    yield value

    def opaque(self) -> Any:
        """The result of an operator without a rule: everything may depend on everything."""
        name = str(self.node.target)
        self.wiring.opaque_ops[name] = self.wiring.opaque_ops.get(name, 0) + 1
        sources = torch.cat([flow.channels() for flow in self.flows()])
        hub = self.wiring.hub(sources, opaque=True)
        results = [make_flow(hub, scalar_gain(1), shape) for shape in self.shapes()]
        several = isinstance(self.node.meta["val"], tuple | list)
        return tuple(results) if several else results[0]

    def shift(self, flow: Flow, at_zero: Tensor, masks: Masks | None) -> Flow:
        """The flow after a function that maps a zero channel to the constant `at_zero`.

        The constant is dropped with the channel where that can be done by masking: `masks`
        lists the parameters behind it and, for each channel, the flat index to mask, shape
        like the ids. Where it cannot, and is not zero, a new channel is made that is live.
        """
        nonzero = reduce_to((at_zero != 0).cpu(), flow.ids, torch.any)
        shape = torch.broadcast_shapes(flow.ids.shape, nonzero.shape)
        ids = flow.ids.expand(shape)
        live = nonzero.expand(shape) & ((ids == ZERO) | torch.tensor(masks is None))
        if live.any():
            gain = flow.gain.expand(torch.broadcast_shapes(flow.gain.shape, shape))
            flow = self.wiring.derive(Kind.LIVE, make_flow(ids, gain, flow.shape), live)
        for parameter, index in masks or []:
            index, channels = torch.broadcast_tensors(index, ids)
            usable = (channels != ZERO) & (channels != CONSTANT)
            self.wiring.attach(parameter, index[usable], channels[usable])
        return flow

    def masks(self, arguments: Sequence[Any], ids: Tensor) -> Masks | None:
        """How to zero these constant arguments channel by channel, for `shift`.

        None if one of them is not made of parameters with one element for each channel.
        """
        found = []
        for argument in arguments:
            origin = self.origin(argument)
            if origin is None:
                return None
            index = origin.flat_index(tuple(argument.meta["val"].shape))
            index = index.reshape((1,) * (ids.dim() - index.dim()) + tuple(index.shape))
            if index.dim() > ids.dim() or any(
                size not in (1, want) for size, want in zip(index.shape, ids.shape, strict=True)
            ):
                return None
            found.append((origin.parameter, index))
        return found


def constant_flow(value: Any) -> Flow:
    """A constant as a flow: the zero channel where it is zero, else the constant channel."""
    tensor = torch.as_tensor(value).detach().cpu()
    ids = torch.where(tensor == 0, ZERO, CONSTANT)
    return make_flow(ids, scalar_gain(tensor.dim()), tensor.shape)


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, tuple | list):
        return [leaf for item in tree for leaf in _leaves(item)]
    return [tree]


def argument_of(node: Any, *names: str, default: Any = None) -> Any:
    """See `Site.argument`."""
    for position, parameter in enumerate(node.target._schema.arguments):
        if parameter.name in names:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(parameter.name, parameter.default_value)
    return default
