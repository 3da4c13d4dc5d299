"""`Site`: one call of an operator in a traced graph, as a rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .builder import CONSTANT, ZERO, Bias, Builder
from .calls import argument, operator_of, run
from .flow import Flow, make_flow, scalar_gain
from .weights import Constants, Origin


@dataclass(frozen=True, eq=False)
class Site:
    """One call of an operator.

    Attributes:
        node: the call, in the traced graph.
        wiring: the channels so far; rules add to it.
        constants: values and origins of what depends on parameters only.
        env: the flows of the nodes before, or tuples of flows.
    """

    node: fx.Node
    wiring: Builder
    constants: Constants
    env: Mapping[fx.Node, Any]

    @property
    def packet(self) -> Any:
        """The operator, without its overload."""
        return operator_of(self.node)

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
        return argument(self.node, *names, default=default)

    def nodes(self) -> list[fx.Node]:
        """The nodes among the arguments that carry channels, in order, with repetitions."""
        return [arg for arg in _leaves((self.node.args, self.node.kwargs)) if arg in self.env]

    def constant_nodes(self) -> list[fx.Node]:
        """The nodes among the arguments that depend on parameters only."""
        return [node for node in self.node.all_input_nodes if node not in self.env]

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

    def run(
        self, stand_in: Callable[[fx.Node], Any], drawn: Callable[[Any], Any] = lambda value: value
    ) -> Any:
        """The operator's result with the flows replaced, and constants as they are, or drawn."""
        device = next((v.device for v in self._tensors()), torch.device("cpu"))

        def lookup(node: fx.Node) -> Any:
            if node not in self.env:
                return drawn(self.constants.value(node))
            given = stand_in(node)
            return given.to(device, node.meta["val"].dtype)

        return run(self.node, lookup)

    def _tensors(self) -> Iterator[Tensor]:
        for node in self.constant_nodes():
            value = self.constants.value(node)
            if isinstance(value, Tensor):
                yield value

    def opaque(self) -> Any:
        """The result of an operator without a rule: everything may depend on everything."""
        sources = torch.cat([flow.channels() for flow in self.flows()])
        hub = self.wiring.opaque(str(self.node.target), sources)
        results = [make_flow(hub, scalar_gain(1), shape) for shape in self.shapes()]
        several = isinstance(self.node.meta["val"], tuple | list)
        return tuple(results) if several else results[0]

    def bias(self, at_zero: Tensor, arguments: Sequence[Any], ids: Tensor) -> Bias:
        """What a function adds to channels, and how to mask these constant arguments to drop it.

        It cannot be dropped if one of them is not made of parameters with one element for each
        channel, or if there is none.
        """
        masks = []
        for node in arguments:
            origin = self.origin(node)
            if origin is None:
                return Bias(at_zero)
            index = origin.flat_index(tuple(node.meta["val"].shape))
            index = index.reshape((1,) * (ids.dim() - index.dim()) + tuple(index.shape))
            if index.dim() > ids.dim() or any(
                size not in (1, want) for size, want in zip(index.shape, ids.shape, strict=True)
            ):
                return Bias(at_zero)
            masks.append((origin.parameter, index))
        return Bias(at_zero, masks or None)


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
