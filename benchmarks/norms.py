"""Time of the spectral norms of all kernels of a network, and of single weights.

Run as ``python benchmarks/norms.py [--device cuda] [--repeats 5]``. The last columns compare
with a loop over a sample of single kernels, and with the floor: reading the weights and writing
the norms at the speed of a copy. The loop takes the largest value of numpy's FFT on 64 points
per axis (32 in 3-D), which is less accurate: too small by up to a relative 1e-3 for 3x3.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torchvision
from torch import Tensor

from fxlean.norms.operator import operator_norms

GRID = 64
SHAPES = {  # name: shape, stride
    "1x1": ((2048, 2048, 1, 1), 1),
    "3": ((512, 512, 3), 1),
    "3x3": ((512, 512, 3, 3), 1),
    "3x3 stride 2": ((512, 512, 3, 3), 2),
    "5x5": ((256, 256, 5, 5), 1),
    "7x7": ((128, 128, 7, 7), 1),
    "7x7 stride 2": ((128, 128, 7, 7), 2),
    "3x3x3": ((64, 64, 3, 3, 3), 1),
    "5x5x5": ((16, 16, 5, 5, 5), 1),
    "31x31": ((128, 1, 31, 31), 1),
}


def best_seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Shortest time of a call, after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def copy_bytes_per_second(device: str, repeats: int) -> float:
    """Bytes read and written per second by a copy of 256 MB."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device, repeats)


def loop_seconds_per_kernel(weight: Tensor, stride: int, sample: int = 300) -> float:
    """Time per kernel of a loop with numpy, one transform per phase."""
    kernels = weight.flatten(0, 1)[:sample].cpu().numpy()
    axes = tuple(range(kernels[0].ndim))
    points = [GRID if len(axes) < 3 else GRID // 2] * len(axes)
    start = time.perf_counter()
    for kernel in kernels:
        total = np.zeros(1)
        for phase in np.ndindex(*[min(stride, k) for k in kernel.shape]):
            part = kernel[tuple(slice(p, None, stride) for p in phase)]
            total = total + np.abs(np.fft.rfftn(part, points, axes)) ** 2
        np.sqrt(total.max())
    return (time.perf_counter() - start) / len(kernels)


def measure(
    name: str, weights: list[tuple[Tensor, int]], device: str, repeats: int, speed: float
) -> str:
    """One row of the table, for weights with their strides."""

    def call() -> None:
        for weight, stride in weights:
            operator_norms(weight, stride)

    seconds = best_seconds(call, device, repeats)
    counts = [weight.shape[0] * weight.shape[1] for weight, _ in weights]
    loop = sum(
        count * loop_seconds_per_kernel(weight, stride, 300 if len(weights) == 1 else 20)
        for count, (weight, stride) in zip(counts, weights, strict=True)
    )
    floor = (sum(weight.nbytes for weight, _ in weights) + 4 * sum(counts)) / speed
    return (
        f"{name:16}{sum(counts):>11,}{seconds * 1e3:>10.1f}{seconds / sum(counts) * 1e9:>12.1f}"
        f"{loop / sum(counts) * 1e9:>12.0f}{loop / seconds:>9.1f}"
        f"{floor * 1e3:>11.2f}{seconds / floor:>9.1f}"
    )


def resnet50_weights(device: str) -> list[tuple[Tensor, int]]:
    """Weights and strides of all convolutions of an untrained ResNet50."""
    model = torchvision.models.resnet50(weights=None).to(device)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    return [(layer.weight.detach(), layer.stride[0]) for layer in layers]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=5, help="the best of so many")
    options = parser.parse_args()
    torch.manual_seed(0)
    speed = copy_bytes_per_second(options.device, options.repeats)
    print(
        f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, "
        f"copy {speed / 1e9:.1f} GB/s"
    )
    print(
        f"{'kernels':16}{'count':>11}{'ms':>10}{'ns/kernel':>12}"
        f"{'loop ns':>12}{'speedup':>9}{'floor ms':>11}{'x floor':>9}"
    )
    rows = {"resnet50": resnet50_weights(options.device)}
    for name, (shape, stride) in SHAPES.items():
        rows[name] = [(torch.randn(shape, device=options.device), stride)]
    for name, weights in rows.items():
        print(measure(name, weights, options.device, options.repeats, speed), flush=True)


if __name__ == "__main__":
    main()
