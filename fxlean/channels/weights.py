"""Weights: kernels that depend on parameters only, and the elements that they are made of.

Masks, weight norm, weight standardisation and parametrizations all compute a weight from
parameters inside the forward pass. The value of such a node is found by running its ancestors
on the real tensors; where its elements come from, by moving indices the way the data moves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .calls import as_kernels, operator_of, run

VIEWS = frozenset({torch.ops.aten.view, torch.ops.aten._unsafe_view})
MULTIPLICATIVE = frozenset({torch.ops.aten.mul, torch.ops.aten._to_copy, torch.ops.aten.clone})


@dataclass(frozen=True, eq=False)
class Origin:
    """Where the elements of an effective weight live: which parameter, and at which flat index.

    `index` has the weight's shape; None means that the weight is the parameter itself.
    """

    parameter: str
    index: Tensor | None = None

    def flat_index(self, shape: Sequence[int]) -> Tensor:
        """The flat index in the parameter of every element of a weight of this shape."""
        if self.index is not None:
            return self.index
        return torch.arange(int(np.prod(shape))).reshape(tuple(shape))


@dataclass(frozen=True, eq=False)
class Weight:
    """The weight of a convolution or linear layer, as kernels of shape (out, in, *size).

    Attributes:
        name: of the layer, for messages.
        value: effective weight in its own layout, on its own device.
        transposed: whether the layout is (in, out, *size).
        origin: where zeroing a kernel takes effect; None if it cannot be zeroed.
        scale: what to zero instead of all elements with the same scale, under a weight norm.
        normed: whether there is no such scale, though it is no number where all elements are zero.
        columns: for a linear layer, the source number of every feature; several features of
            one channel are one kernel.
        stride, dilation: of the convolution.
        groups: of the convolution.
        layer: see `Constants.layer`.
    """

    name: str
    value: Tensor
    transposed: bool = False
    origin: Origin | None = None
    scale: Origin | None = None
    normed: bool = False
    columns: Tensor | None = None
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    layer: str | None = None

    def kernels(self, tensor: Tensor) -> Tensor:
        """A tensor in the layout of the weight as (out, in of the group, *size)."""
        return as_kernels(tensor, self.transposed, self.groups)

    @property
    def layer_name(self) -> str:
        """See the function."""
        return layer_name(self.origin.parameter if self.origin else self.name)


def layer_name(parameter: str) -> str:
    """The layer behind a weight: its module, or the parameter where a module has several."""
    parts = parameter.removesuffix("_orig").split(".")
    if "parametrizations" in parts:
        parts = [*parts[: parts.index("parametrizations")], "weight"]
    return ".".join(parts[:-1] if parts[-1] in ("weight", "weight_v") and parts[1:] else parts)


class Constants:
    """Values and origins of the nodes that depend on parameters and buffers only."""

    def __init__(
        self,
        module: fx.GraphModule,
        state: Mapping[fx.Node, tuple[str, Tensor]],
        moves: Callable[[Any], bool],
        owners: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Remember where values come from; nothing is computed yet.

        Args:
            module: the graph, for its attributes.
            state: from placeholders to the names and tensors of parameters and buffers.
            moves: whether an operator only moves data.
            owners: from parameters and buffers to the layers that own them.
        """
        self._module = module
        self._state = state
        self._moves = moves
        self._owners = owners
        self._named = {name: (key, tensor) for key, (name, tensor) in state.items()}
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
        for ancestor in ancestors(node):
            origins[ancestor] = self._step(ancestor, origins)
        origin = origins[node]
        return origin if origin is not None and self._zeroes(node, origin) else None

    def stored(self, node: fx.Node) -> str | None:
        """The name of the parameter or buffer that a node is; None for what is computed."""
        return self._state[node][0] if node in self._state else None

    def parameters(self, node: fx.Node) -> list[str]:
        """Names of the parameters and buffers that a node is computed from."""
        return [self._state[key][0] for key in ancestors(node) if key in self._state]

    def holds(self, node: fx.Node) -> bool:
        """Whether a node depends on parameters, buffers and attributes only."""
        inputs = [key for key in ancestors(node) if key.op == "placeholder"]
        return all(key in self._state for key in inputs)

    def is_trained(self, node: fx.Node) -> bool:
        """Whether any of the parameters that a node is computed from requires gradients."""
        leaves = [key for key in ancestors(node) if key in self._state or key.op == "get_attr"]
        return any(self._tensor(leaf).requires_grad for leaf in leaves)

    def layer(self, *nodes: fx.Node | None) -> str | None:
        """The one layer that owns all of these, which are parameters or buffers as they are."""
        names = [self._state.get(node, ("", None))[0] for node in nodes if node is not None]
        found = {self._owners.get(name) for name in names}
        return found.pop() if len(found) == 1 else None

    def layers(self, node: fx.Node) -> set[str]:
        """The layers that own what a node is computed from."""
        return {self._owners[name] for name in self.parameters(node) if name in self._owners}

    def name(self, node: fx.Node) -> str:
        """The parameter behind a weight, for messages: the first if it is computed from many."""
        return next(iter(self.parameters(node)), str(node))

    def _leaf(self, node: fx.Node) -> Tensor:
        return self._tensor(node).detach()

    def _tensor(self, node: fx.Node) -> Tensor:
        if node in self._state:
            return self._state[node][1]
        assert node.op == "get_attr"
        found: Tensor = attribute(self._module, str(node.target))
        return found

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
            if before is None and self._moves(arg.target):
                return self._part(node, arg, origins)
            if before == tuple(value.shape) and operator_of(node.target) in MULTIPLICATIVE:
                return origin
            if before is not None and self._moves(node.target):
                index = self.move(node, arg, origin.flat_index(before))
                # Data of another origin, concatenated with the indices, makes them floats.
                return None if index.is_floating_point() else Origin(origin.parameter, index)
            if before is None or before == tuple(value.shape):
                return origin
        return None

    def _part(
        self, node: fx.Node, whole: fx.Node, origins: Mapping[fx.Node, Origin | None]
    ) -> Origin | None:
        """The origin of one of the results of a movement that has several, such as a split."""
        (moved, origin), *_ = [(arg, origins[arg]) for arg in whole.all_input_nodes if origins[arg]]
        assert origin is not None
        parts = self.move(whole, moved, origin.flat_index(tuple(moved.meta["val"].shape)))
        return Origin(origin.parameter, parts[node.args[1]])  # type: ignore[index]

    def move(self, node: fx.Node, moved: fx.Node, index: Tensor) -> Tensor:
        """The flat indices of one argument after a data movement, by running it on them."""
        if operator_of(node.target) in VIEWS:  # which need the strides of the data
            return index.reshape(node.meta["val"].shape)
        moved_index: Tensor = run(node, lambda arg: index if arg is moved else self.value(arg))
        return moved_index

    def _zeroes(self, node: fx.Node, origin: Origin) -> bool:
        """Whether zeroing elements of the parameter zeroes just these elements of the node.

        A product does; for anything else, run it: zero a random half of the elements, then the
        other half. A weight norm divides by zero where a half holds all that it sums over. All
        parameters are drawn, for a gain that is zero, as training often begins, proves nothing.
        """
        steps = [ancestor for ancestor in ancestors(node) if ancestor.op == "call_function"]
        if all(
            self._moves(step.target)
            or step.target is operator.getitem
            or operator_of(step.target) in MULTIPLICATIVE
            for step in steps
        ):
            return True
        source, parameter = self._named[origin.parameter]
        index = origin.flat_index(parameter.shape).to(parameter.device)
        generator = torch.Generator().manual_seed(0)
        drawn = {
            leaf: (0.5 + torch.rand(tensor.shape, generator=generator)).to(tensor)
            for leaf in ancestors(node)
            if isinstance(tensor := self._state.get(leaf, ("", None))[1], torch.nn.Parameter)
        }
        half = torch.rand(parameter.numel(), generator=generator) < 0.5
        for zeroed in (half.to(parameter.device), ~half.to(parameter.device)):
            half_of_it = drawn[source].flatten().masked_fill(zeroed, 0)
            result = self._with(node, drawn | {source: half_of_it})
            if bool(result[zeroed[index]].nan_to_num(0.0).any()):
                return False
        return True

    def scale(self, node: fx.Node, origin: Origin) -> Origin | None:
        """What must be zeroed instead of all elements that a weight norm sums over.

        A normalised weight is not a number where all of its elements are zero, but is zero
        where its scale is. The origin of the scales has the weight's shape.

        Raises:
            LookupError: the weight is not a number there, and has no such scale.
        """
        if node in self._state:
            return None
        source, parameter = self._named[origin.parameter]
        if not self._with(node, {source: torch.zeros_like(parameter)}).isnan().any():
            return None
        shape = node.meta["val"].shape
        for ancestor in ancestors(node):
            name, tensor = self._state.get(ancestor, ("", torch.zeros(0)))
            if ancestor is source or not isinstance(tensor, torch.nn.Parameter):
                continue
            if not self._with(node, {ancestor: torch.zeros_like(tensor)}).any():
                index = torch.arange(tensor.numel()).reshape(tensor.shape)
                return Origin(name, index.broadcast_to(shape))
        raise LookupError(name)

    def _with(self, node: fx.Node, others: Mapping[fx.Node, Tensor]) -> Tensor:
        """The value of a node if some parameters had other ones."""
        values: dict[fx.Node, Any] = {
            leaf: value.detach().reshape(leaf.meta["val"].shape) for leaf, value in others.items()
        }
        result: Tensor = _evaluate(node, values, self._leaf)
        return result


def attribute(module: torch.nn.Module, path: str) -> Any:
    """An attribute of a module or of one inside it, by its path."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def ancestors(node: fx.Node) -> list[fx.Node]:
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
        for ancestor in ancestors(node):
            if ancestor in values:
                continue
            if ancestor.op == "call_function":
                values[ancestor] = run(ancestor, values.__getitem__)
            else:
                values[ancestor] = leaf(ancestor)
    return values[node]
