"""How much smaller and faster `fxlean.compact` makes networks: MACs left and speed-up.

    python benchmarks/compaction.py --models msd50 resnet50 --ratios 0.5 0.05 --methods lean path

Dense and compacted network take turns, so that both see the same load of the machine; the
speed-up is the quotient of the medians. Weights are random, with the batch norms of a network
that has never been trained, and so a method that cuts deep may leave nothing: such rows have no
speed-up.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))

import fxlean
from adapters.unet4 import UNet4
from fxlean import compact, report

RATIOS = (0.5, 0.2, 0.1, 0.05)


class MixedScaleDense(nn.Module):
    """Mixed-scale dense network of width 1: every layer reads all earlier ones from one buffer."""

    def __init__(self, inputs: int = 1, depth: int = 50, outputs: int = 2):
        super().__init__()
        self.inputs, self.depth = inputs, depth
        for i in range(depth):
            weight = torch.randn(1, inputs + i, 3, 3) / (3 * (inputs + i) ** 0.5)
            setattr(self, f"weight{i}", nn.Parameter(weight))
        self.bias = nn.Parameter(torch.zeros(depth))
        self.last = nn.Conv2d(inputs + depth, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        values = x.new_zeros(batch, self.inputs + self.depth, height, width)
        values[:, : self.inputs] = x
        for i in range(self.depth):
            dilation, end = i % 10 + 1, self.inputs + i
            padded = F.pad(values[:, :end], [dilation] * 4, mode="reflect")
            weight, bias = getattr(self, f"weight{i}"), self.bias[i : i + 1]
            values[:, end : end + 1] = F.conv2d(padded, weight, bias, dilation=dilation).relu()
        return self.last(values)


def classifier(name: str) -> Callable[[], nn.Module]:
    """How to build a classification network of torchvision."""
    return lambda: torchvision.models.get_model(name, weights=None)


def segmentation(name: str) -> Callable[[], nn.Module]:
    """How to build a segmentation network of torchvision."""
    return lambda: torchvision.models.get_model(name, weights=None, weights_backbone=None)


# How to build each network, and its input channels and size.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "msd50": (MixedScaleDense, (1, 256)),
    "resnet50": (classifier("resnet50"), (3, 224)),
    "fcn_resnet50": (segmentation("fcn_resnet50"), (3, 224)),
    "unet4": (lambda: UNet4(3, 5, width=32), (3, 256)),
    "densenet121": (classifier("densenet121"), (3, 224)),
    "mobilenet_v2": (classifier("mobilenet_v2"), (3, 224)),
    "efficientnet_b0": (classifier("efficientnet_b0"), (3, 224)),
    "resnet18": (classifier("resnet18"), (3, 224)),
    "regnet_y_400mf": (classifier("regnet_y_400mf"), (3, 224)),
    "convnext_tiny": (classifier("convnext_tiny"), (3, 224)),
    "shufflenet_v2_x1_0": (classifier("shufflenet_v2_x1_0"), (3, 224)),
}


@torch.no_grad()
def medians(networks: list[nn.Module], x: Tensor, runs: int) -> list[float]:
    """Median seconds of each network, which take turns."""
    for network in networks:
        for _ in range(2):
            network(x)
    seconds: list[list[float]] = [[] for _ in networks]
    for _ in range(runs):
        for network, times in zip(networks, seconds, strict=True):
            start = time.perf_counter()
            network(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def measure(name: str, options: argparse.Namespace) -> Iterator[str]:
    """The rows of the table for one network."""
    build, (channels, size) = MODELS[name]
    torch.manual_seed(0)
    dense = build().eval().to(options.device)
    x = torch.randn(options.batch, channels, size, size, device=options.device)
    before = report(dense, x)
    ready: Callable[[nn.Module], nn.Module] = torch.compile if options.compiled else lambda m: m
    first = ready(copy.deepcopy(dense))
    for method, ratio in itertools.product(options.methods, options.ratios):
        model = copy.deepcopy(dense)
        result = fxlean.prune(model, ratio, x, method=method)
        start = time.perf_counter()
        small = compact(model, x)
        seconds = time.perf_counter() - start
        after = report(small, x)
        slow, fast = medians([first, ready(small)], x, options.runs)
        gain = f"{slow / fast:.2f}" if result.kept else "nothing left"
        yield (
            f"| {name} | {method} | {ratio:g} | {result.ratio:.1%} "
            f"| {after.parameters / before.parameters:.1%} | {after.macs / before.macs:.1%} "
            f"| {slow * 1e3:.1f} | {fast * 1e3:.1f} | {gain} | {seconds:.1f} |"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS)[:7])
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--methods", nargs="+", default=["lean", "path"])
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compiled", action="store_true", help="compare torch.compile'd networks")
    options = parser.parse_args()
    warnings.simplefilter("ignore", fxlean.PruneWarning)
    # All compacted forms of a network share its code; beyond 8 of them, torch would not compile.
    torch._dynamo.config.recompile_limit = 100
    print(
        "| network | method | ratio | kernels | parameters | MACs | dense ms | compact ms ", end=""
    )
    print("| speed-up | compaction s |\n|" + "---|" * 10)
    for name in options.models:
        for row in measure(name, options):
            print(row, flush=True)


if __name__ == "__main__":
    main()
