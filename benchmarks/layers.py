"""What single layers cost: the constants of the cost model of compaction, and blocks compared.

    python benchmarks/layers.py costs
    python benchmarks/layers.py compare --model mobilenet_v2 --ratio 0.5 --method path

`costs` measures the constants of `fxlean/compact_layers.py`. `compare` times every layer of a dense
network and of its compacted form, which take turns, and adds up the layers of each block (module
that holds layers), because a layer may select channels for the others of its block to gain by. It
prints the blocks that have changed: medians in microseconds, the slowest relative to before first.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from compaction import MODELS
from torch import Tensor, nn

import fxlean
from fxlean.nn import Selected

LAYERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear, Selected)
EVICTED = 2**24  # floats, more than the caches hold


def nanoseconds(call: Callable[[Tensor], Tensor], x: Tensor, runs: int = 30) -> float:
    """Median time of a call on data that is in no cache, with a result in new memory."""
    other = torch.zeros(EVICTED)
    times = []
    for _ in range(runs):
        source = x.clone()
        other.add_(1)
        start = time.perf_counter()
        call(source)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e9


@torch.no_grad()
def costs() -> None:
    """Nanoseconds for each unit of work, of values of several sizes."""
    print("| value | 3x3 a MAC | 1x1 a MAC | batch norm an element | select | place | empty call |")
    print("|" + "---|" * 7)
    for channels, size in ((64, 56), (256, 56), (256, 28), (512, 14)):
        x = torch.randn(1, channels, size, size)
        half = torch.randperm(channels)[: channels // 2].sort().values
        elements, macs = x.numel(), x.numel() * channels
        convs = [nn.Conv2d(channels, channels, k, padding=k // 2, bias=False) for k in (3, 1)]
        place = Selected(nn.Identity(), half, half, channels)
        norm = nn.BatchNorm2d(channels).eval()
        numbers = (
            nanoseconds(convs[0], x) / (9 * macs),
            nanoseconds(convs[1], x) / macs,
            nanoseconds(norm, x) / elements,
            nanoseconds(lambda x, half=half: x.index_select(1, half), x) / (elements / 2),
            nanoseconds(place, x) / elements,
            nanoseconds(lambda x: x.narrow(1, 0, 1).neg(), x[:, :, :1, :1]),
        )
        cells = " | ".join(f"{number:.3f}" for number in numbers)
        print(f"| {channels} x {size} x {size} | {cells} |")


def timed_layers(model: nn.Module) -> dict[str, list[float]]:
    """Where the seconds of every layer will be found, run by run."""
    times: dict[str, list[float]] = {}
    inside: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, LAYERS) or name in inside:
            continue
        inside |= {f"{name}.{below}" for below, _ in module.named_modules() if below}
        found = times[name] = []

        def begin(module: nn.Module, inputs: object, found: list[float] = found) -> None:
            found.append(-time.perf_counter())

        def end(
            module: nn.Module, inputs: object, result: object, found: list[float] = found
        ) -> None:
            found[-1] += time.perf_counter()

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)
    return times


@torch.no_grad()
def compare(name: str, ratio: float, method: str, runs: int) -> None:
    """The blocks that compaction has changed, before and after."""
    build, (channels, size) = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    x = torch.randn(1, channels, size, size)
    dense = copy.deepcopy(model)
    fxlean.prune(model, ratio, x, method=method)
    small = fxlean.compact(model, x)
    networks = (dense, small)
    times = [timed_layers(network) for network in networks]
    for _ in range(runs):
        for network in networks:
            network(x)
    blocks: dict[str, list[float]] = {}
    changed: dict[str, list[str]] = {}
    for layer in sorted(times[0].keys() & times[1].keys()):
        block, _, short = layer.rpartition(".")
        micros = [statistics.median(found[layer][3:]) * 1e6 for found in times]
        blocks[block] = [sum(pair) for pair in zip(blocks.get(block, (0, 0)), micros, strict=True)]
        forms = [str(network.get_submodule(layer)) for network in networks]
        if forms[0] != forms[1]:
            changed.setdefault(block, []).append(f"{short}: {micros[0]:.0f} to {micros[1]:.0f}")
    rows = sorted(
        ((blocks[block], block) for block in changed), key=lambda row: row[0][0] / row[0][1]
    )
    rows.append(([sum(row[0][side] for row in rows) for side in (0, 1)], "all that changed"))
    print("| block | before | after | before / after | layers |\n|---|---|---|---|---|")
    for (before, after), block in rows:
        layers = ", ".join(changed.get(block, []))
        print(f"| {block} | {before:.0f} | {after:.0f} | {before / after:.2f} | {layers} |")


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("table", choices=["costs", "compare"])
    parser.add_argument("--model", choices=MODELS, default="mobilenet_v2")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--method", default="path")
    parser.add_argument("--runs", type=int, default=40)
    options = parser.parse_args()
    warnings.simplefilter("ignore", fxlean.PruneWarning)
    if options.table == "costs":
        costs()
    else:
        compare(options.model, options.ratio, options.method, options.runs)


if __name__ == "__main__":
    main()
