"""`Draft`: a `ChannelGraph` written down channel by channel, for graphs made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fxlean import operator_norms
from fxlean.channels.graph import ChannelGraph, Kind, Layer

Lengths = NDArray[np.float32]
LOW_VARIANCE = 1e-10  # below it the input of a batch norm is constant, and its channel dead


@dataclass(frozen=True, eq=False)
class ByHand:
    """A channel graph, and the channel of every element of its biases and batch norms."""

    graph: ChannelGraph
    constants: Mapping[str, list[int]]


@dataclass
class Draft:
    """Channels and kernels so far.

    Attributes:
        order: operator norm that makes the length of a kernel.
        fold: whether batch norms and gains multiply the lengths of kernels.
    """

    order: str = "spectral"
    fold: bool = True
    _kinds: list[Kind] = field(default_factory=list)
    _rows: list[Sequence[int]] = field(default_factory=list)
    _lengths: list[Lengths] = field(default_factory=list)
    _kernel_start: list[int] = field(default_factory=list)
    _layers: list[Layer] = field(default_factory=list)
    _alive: list[NDArray[np.bool_]] = field(default_factory=list)
    _constants: dict[str, list[int]] = field(default_factory=dict)

    def channel(
        self,
        kind: Kind,
        sources: Sequence[int] = (),
        lengths: Sequence[float] | Lengths = (),
        first_kernel: int = -1,
    ) -> int:
        """A new channel with one edge from each source, fixed unless it gets kernels."""
        self._kinds.append(kind)
        self._rows.append(sources)
        self._lengths.append(np.asarray(lengths, dtype=np.float32))
        self._kernel_start.append(first_kernel)
        return len(self._kinds) - 1

    def layer(self, name: str, parameter: str, alive: NDArray[np.bool_]) -> int:
        """A new prunable layer with kernels alive[output, input]; its first kernel's number."""
        start = sum(mask.size for mask in self._alive)
        self._layers.append(Layer(name, parameter, start, *alive.shape))
        self._alive.append(alive.reshape(-1))
        return start

    def lengths(
        self,
        weight: Tensor,
        gain_out: Tensor | None = None,
        gain_in: float = 1.0,
        *,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Lengths:
        """Norm of every kernel times the gains around it, shape (out, in)."""
        norms = operator_norms(weight.detach(), stride, dilation=dilation, order=self.order)
        norms = norms.float()
        if self.fold and gain_out is not None:
            norms = norms * gain_out.float()[:, None]
        if self.fold:
            norms = norms * gain_in
        lengths: Lengths = norms.cpu().numpy()
        return lengths

    def constants(self, parameter: str, channels: Sequence[int]) -> None:
        """Note whose constants the elements of a bias or batch norm are, one for one."""
        self._constants[parameter] = list(channels)

    def finish(self, outputs: Sequence[int]) -> ByHand:
        """What was drafted; `outputs` are the channels that the model returns."""
        sizes = np.array([len(row) for row in self._rows], dtype=np.int64)
        starts = np.cumsum(sizes) - sizes
        returned = np.zeros(len(sizes), dtype=bool)
        returned[list(outputs)] = True
        graph = ChannelGraph(
            kinds=np.array(self._kinds, dtype=np.uint8),
            sizes=sizes,
            source_start=starts,
            length_start=starts,
            kernel_start=np.array(self._kernel_start, dtype=np.int64),
            sources=np.concatenate([np.asarray(row, dtype=np.int32) for row in self._rows]),
            lengths=np.concatenate(self._lengths),
            outputs=returned,
            opaque=np.zeros(len(sizes), dtype=bool),
            ties=np.arange(len(sizes), dtype=np.int32),
            alive=np.concatenate(self._alive),
            layers=tuple(self._layers),
        )
        return ByHand(graph, self._constants)


def convolution_norm(
    draft: Draft,
    names: tuple[str, str],
    convolution: Any,
    norm: Any,
    channels: Sequence[int],
    gain: float = 1.0,
) -> list[int]:
    """The output channels of a convolution without bias and the batch norm behind it.

    Args:
        draft: what is drafted so far.
        names: of convolution and batch norm.
        convolution: the module.
        norm: the batch norm; its scale belongs to the kernels.
        channels: what the convolution reads.
        gain: what the channels are scaled by on the way.
    """
    scale = effective(norm, "weight").double() / (norm.running_var.double() + norm.eps).sqrt()
    lengths = draft.lengths(
        effective(convolution, "weight"),
        scale.abs(),
        gain,
        stride=convolution.stride,
        dilation=convolution.dilation,
    )
    kernel = draft.layer(names[0], f"{names[0]}.weight", alive(convolution, "weight"))
    outputs = []
    for out in range(convolution.out_channels):
        outputs.append(draft.channel(Kind.SUM, channels, lengths[out], kernel))
        kernel += len(channels)
    for out in range(convolution.out_channels):
        if norm.running_var[out] < LOW_VARIANCE:
            outputs[out] = draft.channel(Kind.DEAD, [outputs[out]], [1.0])
    draft.constants(f"{names[1]}.weight", outputs)
    draft.constants(f"{names[1]}.bias", outputs)
    return outputs


def effective(module: nn.Module, name: str) -> Tensor:
    """A parameter as the forward pass uses it: times its mask, if it has one."""
    mask = getattr(module, f"{name}_mask", None)
    if mask is None:
        value: Tensor = getattr(module, name)
    else:
        value = getattr(module, f"{name}_orig") * mask
    return value.detach()


def alive(module: nn.Module, name: str) -> NDArray[np.bool_]:
    """True for kernels that no mask has removed, as (first, second) dimension of the weight."""
    mask = getattr(module, f"{name}_mask", None)
    if mask is None:
        return np.ones(effective(module, name).shape[:2], dtype=bool)
    kernels: NDArray[np.bool_] = (mask != 0).flatten(2).any(2).cpu().numpy()
    return kernels
