"""Constants of element-wise operators, and the parameters and buffers that they are computed from.

A batch norm that is frozen, or written by hand, computes a scale and a shift from four vectors.
Where such a constant is to have fewer channels, all that it is computed from must lose the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from ..channels.calls import operator_of
from ..channels.rules.movements import moves
from ..channels.rules.table import pointwise, rule_for
from ..channels.weights import MULTIPLICATIVE, Constants, ancestors

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
            indices = _indices(ancestor, value.shape, found, constants)
            if indices is None:
                return None
            found[ancestor] = indices
        else:
            shapes[name] = value.shape
            found[ancestor] = {name: torch.arange(value.numel()).reshape(value.shape)}
    return {name: torch.unravel_index(at, shapes[name]) for name, at in found[node].items()}


def _indices(
    node: fx.Node, shape: torch.Size, found: Mapping[fx.Node, Indices], constants: Constants
) -> Indices | None:
    """What the elements of one node are computed from, by what those of its arguments are."""
    arguments = node.all_input_nodes
    if not arguments:
        return {} if shape.numel() == 1 else None
    if operator_of(node) in MULTIPLICATIVE or rule_for(node.target) is pointwise:
        result: dict[str, Tensor] = {}
        for name, index in (item for arg in arguments for item in found[arg].items()):
            if not torch.equal(result.setdefault(name, index.expand(shape)), index.expand(shape)):
                return None
        return result
    if not moves(node.target) or len(arguments) > 1:
        return None
    (moved,) = arguments
    return {name: constants.move(node, moved, index) for name, index in found[moved].items()}
