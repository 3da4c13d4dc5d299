"""Time and memory of relevance and repair of a large network, on one thread.

    python benchmarks/calibration.py [--models resnet50] [--images 64] [--size 128]

Random weights, with batch norms that have seen the images, pruned to 0.3 by relevance. Seconds are
those of the processor, so that other work on the machine does not count. Memory is the peak of the
resident set during the call, less what the process held before it; the images are held before. On a
GPU (`--device cuda`) seconds are those of the clock and memory is the GPU's.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision

sys.path.append(str(Path(__file__).resolve().parent))

from prune import measured

import fxlean
from fxlean.calibration.statistics import measure_statistics


def cost(call: Callable[[], Any], device: str) -> str:
    """Seconds and additional megabytes of a call, as cells of a table."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held, start = torch.cuda.memory_allocated(), time.perf_counter()
        call()
        torch.cuda.synchronize()
        spent = time.perf_counter() - start
        return f"{spent:.1f} | {(torch.cuda.max_memory_allocated() - held) / 1e6:.0f}"
    before = time.process_time()
    numbers = measured(call)
    return f"{time.process_time() - before:.1f} | {numbers['megabytes']:.0f}"


def measure(name: str, images: Sequence[torch.Tensor], ratio: float) -> None:
    """Print the rows of the table for one network."""
    torch.manual_seed(0)
    device = images[0].device.type
    model = torchvision.models.get_model(name, weights=None).to(device)
    measure_statistics(model, [(batch,) for batch in images])
    reference = copy.deepcopy(model).eval()
    options: dict[str, Any] = {"method": "relevance", "calibration": images, "progress": False}
    spent = cost(lambda: fxlean.prune(model, ratio, images[0][:1], **options), device)
    print(f"| {name} | prune, relevance | {spent} |", flush=True)
    results: list[fxlean.RepairResult] = []
    options = {"reference": reference, "progress": False}
    spent = cost(lambda: results.append(fxlean.repair(model, images, **options)), device)
    print(f"| {name} | repair | {spent} |", flush=True)
    print(f"\noutputs: error {results[0].before:.3f} -> {results[0].after:.3f}", file=sys.stderr)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["resnet50"])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (options.images, 3, options.size, options.size)
    images = torch.randn(shape, device=options.device).split(options.batch)
    warm_up = torchvision.models.resnet18().to(options.device)
    fxlean.prune(warm_up, 0.1, images[0][:1], method="relevance")
    fxlean.repair(warm_up, images[0][:4], progress=False)
    print("| network | call | seconds | MB |\n|---|---|---|---|")
    for name in options.models:
        measure(name, images, options.ratio)


if __name__ == "__main__":
    main()
