"""Which elements of a model's parameters make up a weight or a bias, and how to change them."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..channels.weights import Origin
from ..tracing.arguments import public_name

COMPUTED = "its weight is a buffer, or computed from its parameters"
EMPTY = "none of its kernels is left"
FROZEN = "its weight does not require gradients"
SHARED = "its weight is used in several ways"


@dataclass(frozen=True)
class Elements:
    """The elements of one parameter that make up a value.

    Attributes:
        parameter: or a buffer, changed in place.
        index: flat index in the parameter of every element, in the shape of the value.
        kept: True for elements that no mask of `torch.nn.utils.prune` removes, likewise.
    """

    parameter: Tensor
    index: Tensor
    kept: Tensor

    def value(self) -> Tensor:
        """The value as it is now, zero where masked."""
        return self.parameter.detach().take(self.index) * self.kept

    def add(self, change: Tensor) -> None:
        """Add a change, of the shape of the value, to the elements that are kept."""
        with torch.no_grad():
            where = self.index[self.kept]
            wide = self.parameter.take(where).to(change.dtype) + change[self.kept]
            places = torch.unravel_index(where, self.parameter.shape)
            self.parameter.data[places] = wide.to(self.parameter.dtype)


def elements_of(
    model: nn.Module, origin: Origin | None, value: Tensor, shared: Container[str]
) -> Elements | str:
    """The elements behind a value of a traced graph, or why they cannot be changed.

    A value that is anything but its elements times their masks is not solved for, nor is what is
    of a parameter that several layers share.
    """
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    if origin is None or origin.parameter not in parameters:
        return COMPUTED
    if origin.parameter in shared:
        return SHARED
    parameter = parameters[origin.parameter]
    if not parameter.requires_grad:
        return FROZEN
    index = origin.flat_index(value.shape).to(parameter.device)
    name = origin.parameter
    mask = buffers.get(f"{public_name(name)}_mask") if name.endswith("_orig") else None
    kept = torch.ones_like(index, dtype=torch.bool) if mask is None else mask.take(index) != 0
    found = Elements(parameter, index, kept)
    return found if torch.equal(found.value().to(value.dtype), value.detach()) else COMPUTED


def saved(model: nn.Module) -> Mapping[Tensor, Tensor]:
    """All parameters and buffers, each with a copy of its values."""
    return {t: t.detach().clone() for t in (*model.parameters(), *model.buffers())}


def put_back(values: Mapping[Tensor, Tensor]) -> None:
    """Undo what has changed since `saved`."""
    for tensor, value in values.items():
        tensor.data.copy_(value)
