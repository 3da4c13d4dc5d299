"""Which noise serves best in place of images: accuracy as pruned and repaired on it.

    python benchmarks/noise.py [--networks residual U-Net] [--ratio 0.3]

White noise, white noise averaged over 3x3, and noise whose amplitude falls as 1 over the frequency;
each of unit variance, and with the scale and mean that the first batch norm tells. Networks of
`trained.py`, pruned once by relevance and repaired once, beside their own training images.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from trained import Task, trained

import fxlean
from fxlean.calibration.noise import input_range, spectral_noise


def kinds(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Noise of unit variance, by name."""
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(shape, generator=generator)
    smooth = 3 * F.avg_pool2d(F.pad(white, [1] * 4, mode="circular"), 3, 1)
    return {"white": white, "smooth": smooth, "1/f": spectral_noise(shape, generator)}


def measure(task: Task, batches: Sequence[Tensor], ratio: float) -> str:
    """Accuracies as pruned and as repaired on these batches."""
    model = copy.deepcopy(task.model)
    fxlean.prune(model, ratio, method="relevance", calibration=batches, progress=False)
    pruned = task.accuracy(model)
    fxlean.repair(model, batches, task.model, progress=False)
    return f"{pruned:.3f} / {task.accuracy(model):.3f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=["residual", "U-Net"])
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"), help="for the networks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | batches | unit variance | scale and mean |\n|---|---|---|---|")
    for network in options.networks:
        task = trained(network, options.seed, options.folder)
        images, size = torch.cat(task.batches), len(task.batches[0])
        found = measure(task, task.batches, options.ratio)
        print(f"| {network} | images | | {found} |", flush=True)
        scale, mean = input_range(task.model, (images,))
        for name, noise in kinds((max(32, len(images)), *images.shape[1:])).items():
            cells = [
                measure(task, batches.split(size), options.ratio)
                for batches in (noise, scale * noise + mean)
            ]
            print(f"| {network} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
