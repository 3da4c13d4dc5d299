"""Constants of element-wise operators, and the parameters and buffers that they are computed from.

A batch norm that is frozen, or written by hand, computes a scale and a shift from four vectors.
Where such a constant is to have fewer channels, all that it is computed from must lose the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, fx

from ..channels.calls import operator_of, run
from ..channels.rules.movements import RESHAPED, moves
from ..channels.rules.table import pointwise, rule_for
from ..channels.weights import Constants, ancestors

AS_THEY_ARE = RESHAPED | {torch.ops.aten._to_copy}  # some need the strides of the data, or a type
Indices = Mapping[str, Tensor]  # flat, by the name of a parameter or buffer


def elements_behind(node: fx.Node, constants: Constants) -> dict[str, tuple[Tensor, ...]] | None:
    """Which element of each parameter and buffer every element of a constant is computed from.

    Returns:
        By name, the place along each of its dimensions, of the shape of the constant. None if an
        element is computed from several of one tensor, or from a tensor that the code makes.
    """
    shapes: dict[str, torch.Size] = {}
    found: dict[fx.Node, Indices] = {}
    for ancestor in ancestors(node):
        value, name = ancestor.meta.get("val"), constants.stored(ancestor)
        if not isinstance(value, Tensor):
            return None
        if name is None:
            given = [found[arg] for arg in ancestor.all_input_nodes]
            indices = _indices(ancestor, value.shape, given)
            if indices is None:
                return None
            found[ancestor] = indices
        else:
            shapes[name] = value.shape
            found[ancestor] = {name: torch.arange(value.numel()).reshape(value.shape)}
    return {name: torch.unravel_index(at, shapes[name]) for name, at in found[node].items()}


def _indices(node: fx.Node, shape: torch.Size, given: Sequence[Indices]) -> Indices | None:
    """What the elements of one node are computed from, by what those of its arguments are."""
    if not given:
        return {} if shape.numel() == 1 else None
    if moves(node.target):
        return _moved(node, shape, given[0]) if len(given) == 1 else None
    if rule_for(node.target) is not pointwise:
        return None
    result: dict[str, Tensor] = {}
    for indices in given:
        for name, index in indices.items():
            if not torch.equal(result.setdefault(name, index.expand(shape)), index.expand(shape)):
                return None
    return result


def _moved(node: fx.Node, shape: torch.Size, indices: Indices) -> Indices:
    """The indices after a data movement, by running it on them."""
    found: dict[str, Tensor] = {}
    for name, index in indices.items():
        if operator_of(node) in AS_THEY_ARE:
            found[name] = index.reshape(shape)
        else:
            found[name] = run(node, dict.fromkeys(node.all_input_nodes, index).__getitem__)
    return found


def readers(
    graph: fx.Graph, names: Mapping[fx.Node, str], inputs: Collection[fx.Node]
) -> Counter[str]:
    """How many arguments of what depends on the inputs are computed from each tensor.

    Args:
        graph: traced.
        names: of the parameters and buffers, by their nodes.
        inputs: of the model.
    """
    sources = {node: {name} for node, name in names.items()}
    varying, count = set(inputs), Counter[str]()
    for node in graph.nodes:
        if node.op == "output" or varying & set(node.all_input_nodes):
            varying.add(node)
            for arg in node.all_input_nodes:
                count.update(sources.get(arg, ()))
        elif node not in sources:
            sources[node] = set().union(*(sources[arg] for arg in node.all_input_nodes))
    return count
