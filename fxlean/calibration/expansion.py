"""A compacted network as the dense one that it was made of, with zeros where channels are gone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checkpoint.layout import (
    dense_modules,
    innermost,
    is_cut,
    is_rewritten,
    kept_places,
    own_tensors,
)
from ..errors import ArgumentError
from ..masking import put_mask, refresh_masks
from ..tracing.inputs import Arguments
from ..tracing.sandbox import copied
from .reference import outputs_of
from .samples import relative_output_error

CLOSE, COARSE = 1e-3, 0.1  # relative errors up to which both compute the same, also in half


def is_compacted(model: nn.Module) -> bool:
    """Whether `compact` has made a model, or `load` has given it such a form."""
    return is_rewritten(model) or any(map(is_cut, model.modules()))


def expanded(small: nn.Module, reference: nn.Module, batches: Sequence[Arguments]) -> nn.Module:
    """A copy of the unpruned network with the values of a compacted one, and zeros elsewhere.

    Args:
        small: compacted.
        reference: the unpruned network.
        batches: on which both must compute the same.

    Raises:
        ArgumentError: the reference is another network, or what is left of it is not known.
    """
    dense = copied(reference)
    held = _own(dense)
    for left in _left(small):
        module, target = held.get(left.name, (nn.Module(), None))
        if target is None or not left.fits(target):
            raise ArgumentError(
                f"which channels of the reference {type(reference).__name__} are left in "
                f"{left.name} is not known. Pass the network that was pruned, and a model that "
                "fxlean.compact has returned; repair others before they are saved, or before a "
                "batch norm is folded."
            )
        if left.places:
            target.data.fill_(float(left.name.endswith("running_var")))
        target.data[left.index] = left.tensor.detach()
        target.requires_grad_(left.tensor.requires_grad)
        if left.mask is not None:
            mask = torch.zeros_like(target)
            mask[left.index] = left.mask.to(mask.dtype)
            put_mask(module, left.name.rpartition(".")[2], mask)
    error = relative_output_error(outputs_of(dense, batches), outputs_of(small, batches))
    wide = all(parameter.element_size() > 2 for parameter in small.parameters())
    if not error <= (CLOSE if wide else COARSE):
        raise ArgumentError(
            f"{type(small).__name__} does not compute what is left of the reference "
            f"{type(reference).__name__} (relative error {error:.2g}). Pass the network that was "
            "pruned; repair before fxlean.compact where the two cannot be compared."
        )
    return dense


def taken_back(small: nn.Module, dense: nn.Module) -> None:
    """Give a compacted network the values that its dense form has now, in place."""
    held = _own(dense)
    for left in _left(small):
        left.tensor.data.copy_(held[left.name][1].data[left.index])
    refresh_masks(small)


@dataclass(frozen=True, eq=False)
class _Left:
    """What is left of a tensor.

    Attributes:
        name: that it had in the dense network.
        tensor: in the compacted one.
        mask: that it has there, if any.
        places: which are left, by the dimensions along which it was cut.
    """

    name: str
    tensor: Tensor
    mask: Tensor | None
    places: Mapping[int, Tensor]

    @property
    def index(self) -> tuple[Tensor | slice, ...]:
        """Of what is left, in the dense tensor."""
        if len(self.places) < 2:
            return tuple(self.places.get(dim, slice(None)) for dim in range(self.tensor.dim()))
        return self.places[0][:, None], self.places[1]  # the two of a layer's channels

    def fits(self, dense: Tensor) -> bool:
        """Whether it can be what is left of this tensor."""
        if dense.dim() != self.tensor.dim():
            return False
        return all(
            int(self.places[dim].max()) < size if dim in self.places else own == size
            for dim, (own, size) in enumerate(zip(self.tensor.shape, dense.shape, strict=True))
        )


def _left(small: nn.Module) -> Iterator[_Left]:
    """What is left of all tensors of a compacted network."""
    for prefix, module in dense_modules(small):
        layer = innermost(module)
        for name, key, tensor in own_tensors(layer):
            mask = None if key == name else layer._buffers[f"{name}_mask"]
            yield _Left(f"{prefix}{name}", tensor, mask, kept_places(layer, name))


def _own(model: nn.Module) -> dict[str, tuple[nn.Module, Tensor]]:
    """All tensors of a network by their names, and the modules that hold them."""
    return {
        f"{prefix}{name}": (module, tensor)
        for prefix, module in dense_modules(model)
        for name, _, tensor in own_tensors(module)
    }
