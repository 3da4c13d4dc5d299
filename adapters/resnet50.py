"""Channel graphs of torchvision's `resnet50` and `fcn_resnet50`, written by hand.

Source: He, Zhang, Ren and Sun (2016), arXiv 1512.03385; Long, Shelhamer and Darrell (2015),
arXiv 1411.4038; the layers and their names are those of torchvision's forward methods.
Any network of `Bottleneck` blocks will do, of whatever depth and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fxlean.channels.graph import Kind

from .draft import ByHand, Draft, convolution_norm, effective

# A 3x3 average with stride 2 has, along each axis, phases of two taps and of one, so the norm
# (2**2 + 1**2) ** 0.5 / 3; the square of it for two axes.
AVERAGE_3_STRIDE_2 = 5 / 9


def resnet_graph(model: Any, order: str = "spectral", *, fold: bool = True) -> ByHand:
    """The channel graph of torchvision's `resnet50`, with max or average pool after the stem."""
    draft = Draft(order, fold)
    channels = _backbone(draft, model, prefix="")
    # The average over all positions keeps every channel apart; `fc` is linear, and not pruned.
    lengths = effective(model.fc, "weight").abs().cpu().numpy()
    return draft.finish([draft.channel(Kind.LIVE, channels, row) for row in lengths])


def fcn_graph(model: Any, order: str = "spectral", *, fold: bool = True) -> ByHand:
    """The channel graph of torchvision's `fcn_resnet50`, without the auxiliary classifier."""
    draft = Draft(order, fold)
    channels = _backbone(draft, model.backbone, prefix="backbone.")
    convolution, norm, _, _, last = model.classifier
    channels = convolution_norm(
        draft, ("classifier.0", "classifier.1"), convolution, norm, channels
    )
    # The last layer makes the output, so its kernels are not pruned; resizing follows.
    lengths = draft.lengths(effective(last, "weight"))
    return draft.finish([draft.channel(Kind.LIVE, channels, row) for row in lengths])


def _backbone(draft: Draft, model: Any, prefix: str) -> list[int]:
    """The channels after the stem and the four stages."""
    channels = [draft.channel(Kind.LIVE) for _ in range(model.conv1.in_channels)]
    channels = convolution_norm(
        draft, (f"{prefix}conv1", f"{prefix}bn1"), model.conv1, model.bn1, channels
    )
    gain = AVERAGE_3_STRIDE_2 if isinstance(model.maxpool, nn.AvgPool2d) else 1.0
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for number, block in enumerate(getattr(model, stage)):
            name = f"{prefix}{stage}.{number}"
            channels = _bottleneck(draft, name, block, channels, gain)
            gain = 1.0
    return channels


def _bottleneck(
    draft: Draft, name: str, block: Any, channels: Sequence[int], gain: float
) -> list[int]:
    """Three convolutions beside a shortcut; `gain` scales what comes in."""
    branch, branch_gain = list(channels), gain
    for number in (1, 2, 3):
        names = (f"{name}.conv{number}", f"{name}.bn{number}")
        convolution, norm = getattr(block, f"conv{number}"), getattr(block, f"bn{number}")
        branch = convolution_norm(draft, names, convolution, norm, branch, branch_gain)
        branch_gain = 1.0
    shortcut, shortcut_gain = list(channels), gain
    if block.downsample is not None:
        convolution, norm = block.downsample
        names = (f"{name}.downsample.0", f"{name}.downsample.1")
        shortcut = convolution_norm(draft, names, convolution, norm, channels, gain)
        shortcut_gain = 1.0
    joined = []
    for number in range(len(branch)):
        meeting = [branch[number], shortcut[number]]
        joined.append(draft.channel(Kind.SUM, meeting, [1.0, shortcut_gain]))
    return joined
