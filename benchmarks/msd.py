"""Time to train MS-D: the dense layers of `adapters.msd` against convolutions and `torch.cat`.

python -m benchmarks.msd

In eval mode the module is made of ordinary convolutions, in training mode of `DenseLayers`; both
are timed forward and backward, in turns, the better of three runs. Run it on an idle machine.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from adapters.msd import MSD

CASES = {
    "depth 50, one 256x256 image": (50, (1, 1, 256, 256)),
    "depth 20, eight 64x64 images": (20, (8, 1, 64, 64)),
}


def seconds(model: MSD, x: Tensor) -> float:
    """Time of one forward and backward pass."""
    start = time.perf_counter()
    model(x).square().mean().backward()
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    print("| network | convolutions (s) | DenseLayers (s) | ratio |")
    print("|---|---|---|---|")
    for name, (depth, shape) in CASES.items():
        torch.manual_seed(0)
        model, x = MSD(1, 5, depth), torch.randn(shape)
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(3):
            for training, found in times.items():
                found.append(seconds(model.train(training), x))
        plain, fast = min(times[False]), min(times[True])
        print(f"| {name} | {plain:.2f} | {fast:.2f} | {plain / fast:.1f} |")


if __name__ == "__main__":
    main()
