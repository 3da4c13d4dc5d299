"""How fast networks are that lost whole channels, beside Torch-Pruning at the same MACs.

    python benchmarks/speed.py --models resnet50 mobilenet_v2 --ratios 0.5

All networks of a row take turns, so that they see the same load of the machine; times are medians.
Weights are random, and the method is that of `shrink`, relevance, on noise. Columns: the fraction
of the multiply-accumulates that is left; the fraction of the dense network's time, of fxlean's
network and of Torch-Pruning's (group magnitude, every layer by itself). A dash is a network that it
cannot prune.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from compaction import MODELS, medians
from peers import torch_pruned
from torch import Tensor, nn

import fxlean


def small(dense: nn.Module, x: Tensor, ratio: float, **options: Any) -> nn.Module:
    """A compacted copy with a fraction of the multiply-accumulates."""
    model = copy.deepcopy(dense)
    fxlean.prune(model, ratio, x, granularity="channel", of="macs", **options)
    return fxlean.compact(model, x)


def row(name: str, ratio: float, options: argparse.Namespace) -> str:
    """One line of the table."""
    build, (channels, size) = MODELS[name]
    torch.manual_seed(0)
    dense = build().eval().to(options.device, options.dtype)
    x = torch.randn(options.batch, channels, size, size).to(options.device, options.dtype)
    how = {name: getattr(options, name) for name in ("method", "at_least", "round_to")}
    networks = [dense, small(dense, x, ratio, **how)]
    try:
        peer = torch_pruned(dense, x, ratio, everywhere=False)
        networks += [peer.eval()] if peer else []
    except Exception as err:  # whatever Torch-Pruning raises for what it cannot prune
        warnings.warn(f"{name}: {type(err).__name__}: {err}", stacklevel=1)
    ready: Callable[[nn.Module], nn.Module] = torch.compile if options.compiled else lambda m: m
    first, *others = medians([ready(network) for network in networks], x, options.runs)
    cells = [f"{time / first:.2f}" for time in others] + ["-"] * (3 - len(networks))
    left = fxlean.report(networks[1], x).macs / fxlean.report(dense, x).macs
    return f"| {name} | {left:.3f} | {first * 1e3:.1f} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS)[1:])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.7, 0.5, 0.3])
    parser.add_argument("--method", default="relevance")
    parser.add_argument("--at-least", type=float, help="fraction of channels that layers keep")
    parser.add_argument("--round-to", type=int, help="numbers of channels are multiples of it")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--half", dest="dtype", action="store_const", const=torch.float16)
    parser.add_argument("--compiled", action="store_true", help="compare torch.compile'd networks")
    parser.set_defaults(dtype=torch.float32)
    options = parser.parse_args()
    warnings.simplefilter("ignore", fxlean.PruneWarning)
    torch._dynamo.config.recompile_limit = 100
    print("| network | MACs left | dense ms | time left | Torch-Pruning |")
    print("|---|---|---|---|---|")
    for name in options.models:
        for ratio in options.ratios:
            print(row(name, ratio, options), flush=True)


if __name__ == "__main__":
    main()
