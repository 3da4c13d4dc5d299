"""Small trained networks of different kinds, for what is measured without training.

Two classify handwritten digits with added noise: a residual network and one of inverted residuals.
Three label the pixels of Circle-Square images of the small scale: a mixed-scale dense network, and
U-Nets with batch norm and with group norm.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "benchmarks")]

import quickstart  # noqa: E402
from circle_square import CLASSES, SCALES, Data  # noqa: E402
from quickstart import Block, accuracy, load_data  # noqa: E402
from results import make_data  # noqa: E402
from training import pixel_accuracy, train_epoch  # noqa: E402

from adapters.msd import MSD  # noqa: E402
from fxlean.calibration.repair_model import repair_towards  # noqa: E402
from fxlean.calibration.running import Known  # noqa: E402
from fxlean.calibration.statistics import measure_statistics  # noqa: E402
from fxlean.masking import is_masked  # noqa: E402

NOISE = 0.22  # standard deviation on digits; the images are in [0, 1]
SCALE = replace(SCALES["small"], batch=8)
Norm = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Task:
    """A trained network and what it was trained for.

    Attributes:
        model: the network.
        batches: unlabelled training images.
        accuracy: of a network on the test images.
        tune: trains a network for some epochs, at a fraction of the rate of its training.
        known: graphs of the network, which repairs of its copies need not trace anew.
    """

    model: nn.Module
    batches: list[Tensor]
    accuracy: Callable[[nn.Module], float]
    tune: Callable[[nn.Module, int, float], None]
    known: Known = field(default_factory=dict)


def remeasured(model: nn.Module, task: Task) -> nn.Module:
    """A copy with the statistics of its batch norms measured anew; without any, its biases.

    Those of a network that was cut have no counterparts in the unpruned one, and stay.
    """
    result = copy.deepcopy(model)
    batches = [(batch,) for batch in task.batches]
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        measure_statistics(result, [(torch.cat(task.batches),)])
    elif is_masked(model):
        repair_towards(result, batches, task.model, task.known, steps=0, progress=False)
    return result


def resnet20() -> nn.Module:
    """A residual network with three stages of three blocks, 16 to 64 channels wide."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)]
    layers.append(nn.ReLU())
    inputs = 16
    for outputs in (16, 32, 64):
        for _ in range(3):
            layers.append(Block(inputs, outputs, stride=2 if inputs < outputs else 1))
            inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*layers)


class Inverted(nn.Module):
    """An inverted residual: wide, depthwise, narrow; beside a shortcut where sizes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        wide = 4 * inputs
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False),
            *(nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.shortcut = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.shortcut else y


def mobile() -> nn.Module:
    """Six inverted residuals, 16 to 48 channels wide."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)]
    layers.append(nn.ReLU6())
    inputs = 16
    for outputs, stride in ((16, 1), (32, 2), (32, 1), (48, 2), (48, 1), (48, 1)):
        layers.append(Inverted(inputs, outputs, stride))
        inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A U-Net of three levels, 8 to 32 channels wide, for grey images."""

    def __init__(self, norm: Norm):
        super().__init__()

        def double(inputs: int, outputs: int) -> nn.Sequential:
            first = (nn.Conv2d(inputs, outputs, 3, padding=1), norm(outputs), nn.ReLU())
            second = (nn.Conv2d(outputs, outputs, 3, padding=1), norm(outputs), nn.ReLU())
            return nn.Sequential(*first, *second)

        self.down = nn.ModuleList([double(1, 8), double(8, 16), double(16, 32)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(2 * n, n, 2, stride=2) for n in (16, 8)])
        self.merge = nn.ModuleList([double(32, 16), double(16, 8)])
        self.last = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        top = self.down[0](x)
        middle = self.down[1](F.max_pool2d(top, 2))
        y = self.down[2](F.max_pool2d(middle, 2))
        for skip, up, merge in zip((middle, top), self.up, self.merge, strict=True):
            y = merge(torch.cat([skip, up(y)], 1))
        result: Tensor = self.last(y)
        return result


class Dense(MSD):
    """A mixed-scale dense network that runs fast wherever gradients are asked for.

    `distill` does in eval mode.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.fast(x) if torch.is_grad_enabled() else super().forward(x)


def noisy(data: Data, seed: int) -> Data:
    """The images with noise added."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    return images + NOISE * torch.randn(images.shape, generator=generator), labels


def digits(build: Callable[[], nn.Module], seed: int, device: str) -> Task:
    """A classifier of digits, which are so small that they stay on the CPU."""
    del device
    training, test = (noisy(data, 2 * seed + i) for i, data in enumerate(load_data()))
    torch.manual_seed(seed)
    tune = partial(_tune_digits, training)
    model = build()
    batches = list(training[0][:256].split(64))
    return Task(model, batches, lambda network: accuracy(network, test), tune)


def _tune_digits(data: Data, model: nn.Module, epochs: int, part: float) -> None:
    quickstart.train(model, data, epochs, peak_rate=0.01 * part)


def circle_square(build: Callable[[], nn.Module], seed: int, device: str) -> Task:
    """A network that labels pixels."""
    splits = {name: (x.to(device), y.to(device)) for name, (x, y) in make_data(SCALE, seed).items()}
    torch.manual_seed(seed)
    tune = partial(_tune_pixels, splits["train"])
    batches = list(splits["train"][0][:16].split(8))
    model = build().to(device)
    return Task(model, batches, lambda network: pixel_accuracy(network, splits["test"]), tune)


def _tune_pixels(data: Data, model: nn.Module, epochs: int, part: float) -> None:
    """Adam, at half of the rate of the experiment for the second half of the epochs."""
    rate = SCALE.rate * part
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1.0 if epoch < epochs / 2 else 0.2)
        train_epoch(model, data, optimizer, SCALE.batch, epoch)


# Task, network and epochs of training.
NETWORKS: Mapping[str, tuple[Callable[..., Task], Callable[[], nn.Module], int]] = {
    "residual": (digits, resnet20, 15),
    "inverted": (digits, mobile, 20),
    "MS-D": (circle_square, lambda: Dense(1, CLASSES, SCALE.depth), 30),
    "U-Net": (circle_square, lambda: UNet(nn.BatchNorm2d), 12),
    "U-Net, group norm": (circle_square, lambda: UNet(partial(nn.GroupNorm, 4)), 12),
}


def trained(name: str, seed: int, folder: Path, device: str = "cpu") -> Task:
    """A task with its network trained, or read from a folder where it was trained before."""
    make, build, epochs = NETWORKS[name]
    task = make(build, seed, device)
    path = folder / f"{name}_{seed}.pt"
    if path.exists():
        task.model.load_state_dict(torch.load(path, map_location=device))
    else:
        task.tune(task.model, epochs, 1.0)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(task.model.state_dict(), path)
    task.model.eval()
    return task
