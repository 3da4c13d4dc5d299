"""The part of a traced graph that depends on parameters only: effective weights, and their origin.

Masks, weight norm, weight standardisation and parametrizations all compute a weight from
parameters inside the forward pass. The value of such a node is found by running its ancestors
on the real tensors; where its elements come from, by moving indices the way the data moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .wiring import Origin

MULTIPLICATIVE = frozenset({torch.ops.aten.mul, torch.ops.aten._to_copy, torch.ops.aten.clone})


class Constants:
    """Values and origins of the nodes that depend on parameters and buffers only."""

    def __init__(
        self,
        module: fx.GraphModule,
        state: Mapping[fx.Node, tuple[str, Tensor]],
        moves: Callable[[Any], bool],
    ) -> None:
        """`state` maps placeholders to their names and tensors; `moves` knows data movements."""
        self._module = module
        self._state = state
        self._moves = moves
        self._values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """The real value of a node, computed on first use."""
        return _evaluate(node, self._values, self._leaf)

    def origin(self, node: fx.Node) -> Origin | None:
        """The parameter elements that zero the elements of a node; None if there are none."""
        if node in self._state:
            name, tensor = self._state[node]
            return Origin(name) if isinstance(tensor, torch.nn.Parameter) else None
        origins: dict[fx.Node, Origin | None] = {}
        for ancestor in _ancestors(node):
            origins[ancestor] = self._step(ancestor, origins)
        origin = origins[node]
        if origin is None or not self._zeroes(node, origin):
            return None
        return origin

    def name(self, node: fx.Node) -> str:
        """The parameter behind a weight, for messages: the first if it is computed from many."""
        names = [self._state[key][0] for key in _ancestors(node) if key in self._state]
        return names[0] if names else str(node)

    def _leaf(self, node: fx.Node) -> Any:
        if node in self._state:
            return self._state[node][1].detach()
        assert node.op == "get_attr"
        return getattr(self._module, str(node.target))

    def _step(self, node: fx.Node, origins: Mapping[fx.Node, Origin | None]) -> Origin | None:
        """The origin of one node from those of its inputs; a guess that `_zeroes` verifies."""
        if node in self._state:
            name, tensor = self._state[node]
            return Origin(name) if isinstance(tensor, torch.nn.Parameter) else None
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return next((origins[arg] for arg in node.all_input_nodes if origins[arg]), None)
        for arg in node.all_input_nodes:
            origin = origins[arg]
            if origin is None:
                continue
            before = tuple(arg.meta["val"].shape) if isinstance(arg.meta["val"], Tensor) else None
            if before is not None and self._moves(node.target):
                return Origin(origin.parameter, self._move(node, arg, origin.flat_index(before)))
            if before is None or before == tuple(value.shape):
                return origin
        return None

    def _move(self, node: fx.Node, moved: fx.Node, index: Tensor) -> Tensor:
        """The flat indices after a data movement, by running it on them."""
        return _run(node, lambda arg: index if arg is moved else self.value(arg))

    def _zeroes(self, node: fx.Node, origin: Origin) -> bool:
        """Whether zeroing elements of the parameter zeroes just these elements of the node.

        A product does; for anything else, run it: zero a random half of the elements, then the
        other half.
        """
        ancestors = [ancestor for ancestor in _ancestors(node) if ancestor.op == "call_function"]
        if all(
            self._moves(ancestor.target) or _packet(ancestor.target) in MULTIPLICATIVE
            for ancestor in ancestors
        ):
            return True
        source, parameter = next(
            (key, tensor) for key, (name, tensor) in self._state.items() if name == origin.parameter
        )
        index = origin.flat_index(parameter.shape).to(parameter.device)
        generator = torch.Generator().manual_seed(0)
        half = torch.rand(parameter.numel(), generator=generator) < 0.5
        for zeroed in (half, ~half):
            zeroed = zeroed.to(parameter.device)
            changed = parameter.detach().flatten().masked_fill(zeroed, 0).view_as(parameter)
            values = {source: changed}
            result = _evaluate(node, values, self._leaf)
            if bool(result[zeroed[index]].any()):
                return False
        return True


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """The node and all that it depends on, in the order of the graph."""
    found, stack = {node}, [node]
    while stack:
        for arg in stack.pop().all_input_nodes:
            if arg not in found:
                found.add(arg)
                stack.append(arg)
    return sorted(found)


def _evaluate(node: fx.Node, values: dict[fx.Node, Any], leaf: Callable[[fx.Node], Any]) -> Any:
    if node not in values:
        for ancestor in _ancestors(node):
            if ancestor in values:
                continue
            if ancestor.op == "call_function":
                values[ancestor] = _run(ancestor, values.__getitem__)
            else:
                values[ancestor] = leaf(ancestor)
    return values[node]


def _run(node: fx.Node, lookup: Callable[[fx.Node], Any]) -> Any:
    args = fx.map_arg(node.args, lookup)
    kwargs = fx.map_arg(node.kwargs, lookup)
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _packet(target: Any) -> Any:
    return getattr(target, "overloadpacket", target)
