"""`Builder`: what rules build with.

Pruning builds a graph of channels (`Wiring`), compaction the slots of a network (`Slots`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .calls import BatchNorm, Convolution, Linear
from .flow import Flow
from .graph import Kind
from .weights import Weight

ZERO = 0
CONSTANT = 1


@dataclass(frozen=True, eq=False)
class Bias:
    """What a function adds to channels: the value that it gives to a zero channel.

    Attributes:
        at_zero: that value, of a shape that broadcasts with the ids of the channels.
        masks: the parameters that it is made of, and for each channel the flat index of the
            element to mask; None where masking parameters cannot make it zero.
    """

    at_zero: Tensor
    masks: Sequence[tuple[str, Tensor]] | None = None


@dataclass(frozen=True, eq=False)
class Affine:
    """What a batch norm does to channels; tensors broadcast with the ids of the channels.

    Attributes:
        scale: what it multiplies them by.
        bias: what it adds.
        constant: True where its running variance shows that they are the same for all inputs.
        layer: that owns its parameters and statistics, see `Constants.layer`.
    """

    scale: Tensor
    bias: Bias
    constant: Tensor
    layer: str | None


class Builder(Protocol):
    """What rules build with. Channel 0 is always zero, channel 1 a constant."""

    def add_channels(self, kind: Kind, count: int) -> Tensor:
        """New channels without incoming edges."""

    def add_rows(
        self,
        kind: Kind,
        targets: NDArray[np.int64],
        sources: NDArray[np.int64],
        lengths: NDArray[np.float64],
        count: int,
    ) -> Tensor:
        """New channels with fixed edges `sources[i] -> targets[i]`; targets count from 0."""

    def add_block(
        self,
        call: Convolution | Linear,
        weight: Weight,
        bias: Bias | None,
        sources: Tensor,
        gain: Tensor,
    ) -> Tensor:
        """New channels fed by a weight, one a row.

        Sources and gain have shape (groups, columns), the bias one entry a row.
        """

    def affine(self, call: BatchNorm, flow: Flow, affine: Affine) -> Flow:
        """The flow after a batch norm."""

    def shift(self, flow: Flow, bias: Bias) -> Flow:
        """The flow after a function that adds a bias to it."""

    def derive(self, kind: Kind, flow: Flow, where: Tensor | None = None) -> Flow:
        """New channels of a kind, one for every channel of the flow, each fed by it alone.

        `where` says at which positions, broadcasting with `flow.ids`; elsewhere the channel stays.
        """

    def join(self, kind: Kind, flows: Sequence[Flow], shape: Sequence[int]) -> Flow:
        """One new channel for each distinct tuple of channels that meet at a position."""

    def merge(self, flow: Flow, dims: Sequence[int]) -> Flow:
        """The flow with channels that vary along `dims` only, merging those that differ."""

    def hub(self, channels: Tensor) -> Tensor:
        """A live channel that depends on all of these, shape (1,)."""

    def opaque(self, operator: str, channels: Tensor) -> Tensor:
        """A hub for an operator without a rule; what it depends on is never redundant."""
