"""Torch-Pruning, brought to a target: `torch_pruned(model, x, 0.5)` has half of the MACs."""

from __future__ import annotations

import copy
import warnings

import torch
import torch_pruning as tp
from torch import Tensor, nn

from fxlean import report

TRIALS = 12


def torch_pruned(
    model: nn.Module, x: Tensor, ratio: float, *, everywhere: bool
) -> nn.Module | None:
    """A copy pruned by group magnitude to at most this fraction of the MACs, as near as it gets.

    None where it does not get so far.

    Args:
        model: not changed.
        x: example inputs.
        ratio: fraction of the multiply-accumulates that is left.
        everywhere: whether all layers are ranked together ("global"), or each by itself.

    Torch-Pruning asks for a fraction of the channels, so the one that fits is found by bisection.
    """
    total = report(model, x).macs
    low, high = 0.0, 1.0
    best: nn.Module | None = None
    for _ in range(TRIALS):
        middle = (low + high) / 2
        candidate = _pruned(model, x, middle, everywhere)
        if report(candidate, x).macs <= ratio * total:
            high, best = middle, candidate
        else:
            low = middle
    return best


def _pruned(model: nn.Module, x: Tensor, channels: float, everywhere: bool) -> nn.Module:
    """A copy without this fraction of the channels; the layer that makes the output stays."""
    result = copy.deepcopy(model)
    layers = [m for m in result.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            result,
            x,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=everywhere,
            pruning_ratio=channels,
            max_pruning_ratio=0.98 if everywhere else 1.0,
            ignored_layers=layers[-1:],
        )
        pruner.step()
    return result
