"""A four-level U-Net, and its channel graph written by hand.

Source: Ronneberger, Fischer and Brox (2015), arXiv 1505.04597, with padded convolutions, batch
norms, and average pools in place of max pools.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxlean.channels.graph import Kind

from .draft import ByHand, Draft, alive, convolution_norm, effective

LEVELS = 4
AVERAGE_2_STRIDE_2 = 0.5  # along each axis two phases of one tap 1 / 2: norm 2 ** 0.5 / 2


class UNet4(nn.Module):
    """Input (n, in_channels, height, width) to output (n, out_channels, height, width).

    Args:
        in_channels: channels of the image.
        out_channels: channels of the result, such as classes.
        width: channels of the first level; every level down has twice as many.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int = 64) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(LEVELS + 1)]
        inputs = [in_channels, *widths]
        self.down = nn.ModuleList(DoubleConv(*inputs[k : k + 2]) for k in range(LEVELS + 1))
        self.pool = nn.AvgPool2d(2)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(2 * wide, wide, 2, stride=2) for wide in widths[:LEVELS]
        )
        self.merge = nn.ModuleList(DoubleConv(2 * wide, wide) for wide in widths[:LEVELS])
        self.final = nn.Conv2d(width, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if any(extent % 2**LEVELS for extent in x.shape[2:]):
            raise ValueError(
                f"the image is {tuple(x.shape[2:])}; height and width must be multiples of "
                f"{2**LEVELS}, because it is halved {LEVELS} times. Pad or crop it."
            )
        x = self.down[0](x)
        skips = []
        for level in range(LEVELS):
            skips.append(x)
            x = self.down[level + 1](self.pool(x))
        for level in reversed(range(LEVELS)):
            x = self.merge[level](torch.cat([skips[level], self.up[level](x)], dim=1))
        result: Tensor = self.final(x)
        return result


class DoubleConv(nn.Module):
    """Twice a 3x3 convolution, a batch norm and a ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(x)))


def unet4_graph(model: Any, order: str = "spectral", *, fold: bool = True) -> ByHand:
    """The channel graph of a `UNet4`, read off its `forward`."""
    draft = Draft(order, fold)
    channels = [draft.channel(Kind.LIVE) for _ in range(model.down[0].conv1.in_channels)]
    channels = _double_conv(draft, "down.0", model.down[0], channels)
    skips = []
    for level in range(LEVELS):
        skips.append(channels)
        name = f"down.{level + 1}"
        channels = _double_conv(draft, name, model.down[level + 1], channels, AVERAGE_2_STRIDE_2)
    for level in reversed(range(LEVELS)):
        above = _transposed(draft, f"up.{level}", model.up[level], channels)
        channels = [*skips[level], *above]
        channels = _double_conv(draft, f"merge.{level}", model.merge[level], channels)
    # The final layer makes the output, so its kernels are not pruned.
    lengths = draft.lengths(effective(model.final, "weight"))
    return draft.finish([draft.channel(Kind.LIVE, channels, row) for row in lengths])


def _double_conv(
    draft: Draft, name: str, block: Any, channels: Sequence[int], gain: float = 1.0
) -> list[int]:
    """Two convolutions with batch norms; `gain` scales what comes in."""
    names = (f"{name}.conv1", f"{name}.norm1")
    middle = convolution_norm(draft, names, block.conv1, block.norm1, channels, gain)
    names = (f"{name}.conv2", f"{name}.norm2")
    return convolution_norm(draft, names, block.conv2, block.norm2, middle)


def _transposed(draft: Draft, name: str, convolution: Any, channels: Sequence[int]) -> list[int]:
    """The output channels of a transposed convolution, whose weight is stored (in, out)."""
    lengths = draft.lengths(effective(convolution, "weight"), stride=convolution.stride)
    kernel = draft.layer(name, f"{name}.weight", alive(convolution, "weight").T)
    outputs = []
    for out in range(convolution.out_channels):
        outputs.append(draft.channel(Kind.SUM, channels, lengths[:, out], kernel))
        kernel += len(channels)
    draft.constants(f"{name}.bias", outputs)
    return outputs
