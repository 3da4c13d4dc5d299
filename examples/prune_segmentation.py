"""Trains, prunes and fine-tunes FCN-ResNet50 and the four-level U-Net, in short.

    python examples/prune_segmentation.py [--networks unet4] [--methods lean l1] [--scale paper]

At the small scale both are narrow and the blocks of the ResNet do not widen. Results are laid
out as by `prune_msd.py`, in `pruned_fcn_resnet50` and `pruned_unet4`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from circle_square import (
    CLASSES,
    SPLITS,
    arguments,
    begin,
    best_device,
    claim,
    load_data,
    write_data,
)
from torch import nn
from torchvision.models import ResNet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck
from torchvision.models.segmentation import fcn_resnet50
from torchvision.models.segmentation.fcn import FCN, FCNHead
from training import draw_plot, format_table, prune_and_tune, train

from adapters.unet4 import UNet4
from fxlean.selection.methods import METHODS


class NarrowBottleneck(Bottleneck):  # type: ignore[misc]
    """A bottleneck with as few channels outside as inside an ordinary one."""

    expansion = 1


def grey(model: nn.Module, backbone: nn.Module) -> nn.Module:
    """The network with grey images as input, and the paper's average pool after the stem."""
    backbone.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    backbone.maxpool = nn.AvgPool2d(3, stride=2, padding=1)
    return Output(model)


class Output(nn.Module):
    """The segmentation alone, of the dictionary that a network of torchvision returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.network(x)["out"]
        return result


def narrow_fcn() -> nn.Module:
    """FCN-ResNet50 with narrow blocks, and fewer of them."""
    stages, dilate = [2, 2, 2, 2], [False, True, True]
    resnet = ResNet(NarrowBottleneck, stages, replace_stride_with_dilation=dilate)
    backbone = IntermediateLayerGetter(resnet, {"layer4": "out"})
    return grey(FCN(backbone, FCNHead(512, CLASSES)), backbone)


def full_fcn() -> nn.Module:
    """FCN-ResNet50 without pretrained weights."""
    model = fcn_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES)
    return grey(model, model.backbone)


NETWORKS: Mapping[str, Mapping[str, Callable[[], nn.Module]]] = {
    "small": {"fcn_resnet50": narrow_fcn, "unet4": lambda: UNet4(1, CLASSES, width=8)},
    "paper": {"fcn_resnet50": full_fcn, "unet4": lambda: UNet4(1, CLASSES)},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Train and prune both networks, and show what is left of their accuracy."""
    parser = arguments(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS["small"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["lean", "path", "l1"])
    options = parser.parse_args(argv)
    scale, folder = begin(options)
    if options.scale == "small" and not (folder / "data").exists():
        write_data(folder / "data", scale, options.seed)
    splits = {split: load_data(folder / "data", split, scale) for split in SPLITS}
    scale = replace(scale, batch=8, rate=2e-3, epochs=scale.epochs // 3, steps=scale.steps // 2)
    for name in options.networks or NETWORKS[options.scale]:
        torch.manual_seed(options.seed)
        model = NETWORKS[options.scale][name]().to(best_device())
        network = f"{name} ({options.scale})"
        train(model, network, splits, scale, folder / f"{name}.pt", options.seed)
        results = folder / f"pruned_{name}"
        claim(results, scale, options.seed)
        rows = prune_and_tune(model, network, options.methods, splits, scale, results, options.seed)
        print(f"\n{network}\n{format_table(rows)}")
        draw_plot(rows, results / "accuracy.png", network)
    print(f"Networks, results.csv and accuracy.png are in {folder}/pruned_*.")


if __name__ == "__main__":
    main()
