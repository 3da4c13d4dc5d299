"""What stays in users' models and their pickles; the names and paths here never change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune


class Selected(nn.Module):
    """A layer that reads a selection of channels, or whose results are placed among zeros.

    Attributes:
        layer: computes on the selection.
        reads: the channels that it reads, or None for all.
        places: where its results go, or None where they are all there is.
        channels: number of channels of the result; the others are zero.
        dim: along which the layer has its channels.
    """

    if TYPE_CHECKING:  # TorchScript does not understand annotations as strings
        reads: Tensor | None
        places: Tensor | None

    def __init__(
        self, layer: nn.Module, reads: Tensor | None, places: Tensor | None, channels: int
    ) -> None:
        super().__init__()
        self.layer, self.channels = layer, channels
        self.dim = -1 if isinstance(layer, nn.Linear) else 1
        self.register_buffer("reads", reads)
        self.register_buffer("places", places)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result, between the selection and the placement."""
        if self.reads is not None:
            x = x.index_select(self.dim, self.reads)
        result: Tensor = self.layer(x)
        if self.places is not None:
            shape = list(result.shape)
            shape[self.dim] = self.channels
            result = result.new_zeros(shape).index_copy_(self.dim, self.places, result)
        return result

    def extra_repr(self) -> str:
        """How many channels are read and written."""
        reads = "all" if self.reads is None else str(len(self.reads))
        return f"reads={reads}, channels={self.channels}"


class PaddedCat(nn.Module):
    """Values side by side along the channels, padded."""

    def forward(self, parts: list[Tensor], *options: Any) -> Tensor:
        """Shape (n, channels of all, *padded) of parts (n, channels, *size).

        Options are those of `torch.nn.functional.pad`.
        """
        if torch.compiler.is_dynamo_compiling():
            # A compiler writes each padded part to its place, in one pass instead of two.
            return torch.cat([F.pad(part, *options) for part in parts], 1)
        return F.pad(torch.cat(parts, 1), *options)


class RefreshMasks:
    """A hook that applies the masks of a submodule which holds parameters but is never called."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Run the pruning hooks of the submodule."""
        holder = module.get_submodule(self.path)
        for hook in holder._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                hook(holder, inputs)
