"""Trains a small residual network on handwritten digits, prunes, repairs and compacts it.

    python examples/quickstart.py

First without a label, on 256 images, in seconds: a copy of the trained network is pruned by
relevance in four rounds, each of which is repaired, and another is shrunk by whole channels to a
quarter of its multiply-accumulates. Then with labels: copies are pruned to a fiftieth by
LEAN, by complete chains, and by the L1 norm, with a few epochs of fine-tuning after each step. What
is left is rebuilt without masks, and timed beside the unpruned network. The data ships with
scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fxlean

Data = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Two convolutions beside a shortcut, as in ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class DigitNet(nn.Sequential):
    """Three residual stages and a linear classifier, for 8x8 grey images."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            Block(16, 16, stride=1),
            Block(16, 32, stride=2),
            Block(32, 64, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


def load_data() -> tuple[Data, Data]:
    """Images, shape (n, 1, 8, 8) in [0, 1], and labels; a quarter of them held out for tests."""
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
    train, test = train_test_split(range(len(labels)), stratify=labels, random_state=0)
    targets = torch.from_numpy(labels)
    return (images[train], targets[train]), (images[test], targets[test])


def train(model: nn.Module, data: Data, epochs: int, peak_rate: float) -> None:
    """Trains in place with AdamW; the learning rate rises to its peak and falls to zero."""
    images, labels = data
    batches = -(-len(labels) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, epochs * batches)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).chunk(batches):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Fraction of the images that the model labels correctly."""
    images, labels = data
    model.eval()
    return float((model(images).argmax(dim=1) == labels).double().mean())


@torch.no_grad()
def speed_up(before: nn.Module, after: nn.Module, images: Tensor, runs: int = 30) -> float:
    """How many times as fast a network has become; both take turns, and medians are compared."""
    seconds: dict[nn.Module, list[float]] = {before: [], after: []}
    for _ in range(runs):
        for model, times in seconds.items():
            start = time.perf_counter()
            model(images)
            times.append(time.perf_counter() - start)
    return statistics.median(seconds[before]) / statistics.median(seconds[after])


def size(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=6, help="epochs of training, and per step")
    parser.add_argument("--ratio", type=float, default=0.02, help="kernels to keep, fine-tuned")
    parser.add_argument("--repaired", type=float, default=0.2, help="kernels to keep, repaired")
    parser.add_argument("--steps", type=int, default=5, help="pruning steps")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Trains once, prunes with and without labels, prints what was kept and the accuracies."""
    options = parse_arguments()
    start = time.perf_counter()
    torch.set_num_threads(1)  # the network is so small that threads only wait for each other
    torch.manual_seed(options.seed)
    training, test = load_data()
    trained = DigitNet()
    train(trained, training, options.epochs, peak_rate=0.01)
    rows = [("unpruned", 1.0, accuracy(trained, test), size(trained), 1.0)]

    def add_row(name: str, model: nn.Module, kept: float) -> None:
        small = fxlean.compact(model.eval(), training[0][:1])
        faster = speed_up(trained, small, test[0])
        rows.append((name, kept, accuracy(small, test), size(small), faster))

    model, began = copy.deepcopy(trained), time.perf_counter()
    images = list(training[0][:256].split(64))
    rounds: dict[str, Any] = {"method": "relevance", "calibration": images, "repair": True}
    for result in fxlean.iterate(model, options.repaired, 4, **rounds):
        print(f"repaired: {result.kept} of {result.total} kernels kept")
    print(result.repair, f"all rounds: {time.perf_counter() - began:.1f} s", sep="\n", end="\n\n")
    add_row("repaired", model, result.ratio)
    small = fxlean.shrink(trained, 0.25, images)
    left = fxlean.report(small, images[0]).kernels / fxlean.report(trained, images[0]).kernels
    add_row("shrunk", small, left)

    for method in ("lean", "path", "l1"):
        torch.manual_seed(options.seed)
        model = copy.deepcopy(trained)
        example = training[0][:1]
        for result in fxlean.iterate(model, options.ratio, options.steps, example, method=method):
            train(model, training, options.epochs, peak_rate=0.01)
            print(f"{method}: {result.kept} of {result.total} kernels kept")
        print(result, end="\n\n")
        add_row(method, model, result.ratio)

    print(f"{'method':<10}{'kernels kept':>14}{'test accuracy':>15}{'parameters':>12}{'speed':>8}")
    for name, kept, score, parameters, speed in rows:
        print(f"{name:<10}{kept:>14.1%}{score:>15.1%}{parameters:>12,}{speed:>7.2f}x")
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
