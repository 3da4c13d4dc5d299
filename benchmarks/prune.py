"""Time and memory of the whole call of `fxlean.prune`, each measurement in a fresh process.

    python benchmarks/prune.py models      # large models, every method, beside Torch-Pruning
    python benchmarks/prune.py channels    # choosing whole channels, against choosing kernels
    python benchmarks/prune.py growth      # against the number of edges, with a log-log plot
    python benchmarks/prune.py start       # import, first and second call, cold and warm cache

The yardstick is torch-pruning (package `torch-pruning`): half of the channels by group magnitude.
Run on an otherwise idle machine. Memory is the peak of the resident set during the call, less
what the process held before it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LARGE = ("resnet50", "densenet201", "efficientnet_b7", "convnext_base", "vgg16_bn")
YARDSTICK = ("resnet50", "vgg16_bn", "densenet201")
GROWING = ("resnet18", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2")
METHODS = ("lean", "path", "spectral", "l1", "random")
BY_CHANNELS = ("resnet50", "mobilenet_v2", "regnet_y_400mf", "densenet121")


def measured(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds that a call takes, and the peak of additional resident memory in MB."""
    import psutil

    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {"seconds": seconds, "megabytes": (peak - before) / 1e6}


def run_fxlean(name: str, method: str) -> dict[str, Any]:
    """One call on a fresh model, after a first call that loads what is compiled."""
    import torch
    import torchvision

    import fxlean

    torch.manual_seed(0)
    fxlean.prune(torchvision.models.resnet18(), 0.1, method=method)
    model = torchvision.models.get_model(name, weights=None)
    results: list[fxlean.PruneResult] = []
    numbers: dict[str, Any] = measured(
        lambda: results.append(fxlean.prune(model, 0.1, method=method))
    )
    edges = fxlean.trace(torchvision.models.get_model(name, weights=None), norm="l1").num_edges
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return numbers | {
        "timings": dict(results[0].timings),
        "edges": edges,
        "parameters": parameters,
    }


def run_memory(megabytes: str, method: str) -> dict[str, Any]:
    """Writing to so much memory for the first time in a process."""
    import numpy as np

    return dict(measured(lambda: np.ones(int(float(megabytes) * 1e6), dtype=np.uint8)))


def run_yardstick(name: str, method: str) -> dict[str, Any]:
    """Half of the channels by group magnitude, with torch-pruning."""
    import torch
    import torch_pruning
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()

    def call() -> None:
        torch_pruning.pruner.MagnitudePruner(
            model,
            torch.randn(1, 3, 224, 224),
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=[m for m in model.modules() if getattr(m, "out_features", 0) == 1000],
        ).step()

    return dict(measured(call))


def run_start(name: str, method: str) -> dict[str, Any]:
    """Imports, then two calls on fresh models in one process."""
    import torch
    import torchvision

    start = time.perf_counter()
    import fxlean

    seconds = {"import": time.perf_counter() - start}
    for call in ("first", "second"):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None)
        seconds[call] = measured(lambda model=model: fxlean.prune(model, 0.1, method=method))[
            "seconds"
        ]
    return seconds


RUNNERS = {
    "fxlean": run_fxlean,
    "yardstick": run_yardstick,
    "start": run_start,
    "memory": run_memory,
}


def child(kind: str, name: str, method: str = "lean", **environment: str) -> dict[str, Any]:
    """The numbers of one runner, from a process of its own."""
    command = [sys.executable, __file__, "child", kind, name, method]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    numbers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def models() -> None:
    """A table of large models and methods, and of the yardstick."""
    print("| model | method | seconds | trace | norms | select | masks | MB |")
    print("|---|---|---|---|---|---|---|---|")
    lean: dict[str, float] = {}
    for name in LARGE:
        for method in METHODS if name == "resnet50" else ("lean", "path"):
            numbers = child("fxlean", name, method)
            stages = " | ".join(f"{seconds:.2f}" for seconds in numbers["timings"].values())
            row = f"{numbers['seconds']:.2f} | {stages} | {numbers['megabytes']:.0f}"
            print(f"| {name} | {method} | {row} |", flush=True)
            lean.setdefault(name, numbers["seconds"])
    print("\n| model | torch-pruning (s) | fxlean lean (s) | fxlean / torch-pruning |")
    print("|---|---|---|---|")
    for name in YARDSTICK:
        seconds = child("yardstick", name)["seconds"]
        print(f"| {name} | {seconds:.2f} | {lean[name]:.2f} | {lean[name] / seconds:.2f} |")


def growth(picture: Path) -> None:
    """Time and memory against the number of edges, medians of three processes, with a plot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = []
    print("| model | edges | parameters | seconds | MB | ", end="")
    print("us an edge | bytes an edge | us a parameter | bytes a parameter | first write (s) |")
    print("|" + "---|" * 10)
    for name in GROWING:
        runs = [child("fxlean", name) for _ in range(3)]
        edges, count, seconds, megabytes = (
            statistics.median(run[key] for run in runs)
            for key in ("edges", "parameters", "seconds", "megabytes")
        )
        rates = " | ".join(
            f"{seconds / units * 1e6:.3f} | {megabytes * 1e6 / units:.1f}"
            for units in (edges, count)
        )
        writing = child("memory", str(megabytes))["seconds"]
        print(
            f"| {name} | {edges:,} | {count:,} | {seconds:.2f} | {megabytes:.0f} | {rates} "
            f"| {writing:.2f} |",
            flush=True,
        )
        points.append((edges, seconds, megabytes))
    points.sort()
    edges, seconds, megabytes = zip(*points, strict=True)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, values, label in zip(axes, (seconds, megabytes), ("seconds", "MB"), strict=True):
        axis.loglog(edges, values, "o-", label="fxlean.prune(model, 0.1)")
        axis.loglog(edges, [values[0] * e / edges[0] for e in edges], "--", label="proportional")
        axis.set(xlabel="edges", ylabel=label)
        ticks = (2e6, 5e6, 10e6, 20e6, 50e6)
        axis.set_xticks(ticks, labels=[f"{tick / 1e6:g} M" for tick in ticks])
        axis.xaxis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def start() -> None:
    """Import, first and second call of a process, with a warm and a cold compilation cache."""
    print("| cache | import fxlean (s) | first call (s) | second call (s) |")
    print("|---|---|---|---|")
    child("start", "resnet18")
    rows = [("warm", child("start", "resnet18"))]
    with tempfile.TemporaryDirectory() as folder:
        rows.append(("cold", child("start", "resnet18", NUMBA_CACHE_DIR=folder)))
    for cache, seconds in rows:
        print(f"| {cache} | " + " | ".join(f"{value:.2f}" for value in seconds.values()) + " |")


def channels() -> None:
    """Processor time of choosing whole channels, in times that of choosing kernels."""
    import torch
    import torchvision

    import fxlean

    torch.set_num_threads(1)
    x = torch.zeros(1, 3, 64, 64)

    def spent(model: torch.nn.Module, method: str, granularity: str) -> float:
        model = copy.deepcopy(model)
        before = time.process_time()
        fxlean.prune(model, 0.5, x, method=method, granularity=granularity)
        return time.process_time() - before

    print("| model | l1 | lean | relevance |\n|---|---|---|---|")
    for name in ("resnet18", *BY_CHANNELS):  # what is compiled is, with the first
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        cells = []
        for method in ("l1", "lean", "relevance"):
            kernel, channel = (
                min(spent(model, method, granularity) for _ in range(4))
                for granularity in ("kernel", "channel")
            )
            cells.append(f"{channel / kernel:.2f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Run one of the tables."""
    if sys.argv[1:2] == ["child"]:
        print(json.dumps(RUNNERS[sys.argv[2]](*sys.argv[3:])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=["models", "channels", "growth", "start"])
    parser.add_argument("--picture", type=Path, default=Path("docs/images/growth.png"))
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    tables: dict[str, Callable[[], None]] = {
        "models": models,
        "channels": channels,
        "growth": lambda: growth(options.picture),
        "start": start,
    }
    tables[options.table]()


if __name__ == "__main__":
    main()
