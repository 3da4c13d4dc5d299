"""Tests that the work of a call grows with the depth of a network, and no faster.

What is counted is calls of Python's functions, which are the same on every machine.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import fxlean

BLOCKS = 3


class Block(nn.Module):
    """A residual block with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Shape (n, 4, *size) of the same."""
        x = x + self.body(x)
        return x * self.gate(x)


def _network(blocks: int, *, normed: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), *[Block() for _ in range(blocks)], nn.Conv2d(4, 1, 1))
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and normed:
            weight_norm(module)
    return model.eval()


def _calls(function: Callable[[], Any]) -> int:
    """How many functions of Python are called."""
    count = 0

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def _steps(blocks: int, *, normed: bool) -> list[int]:
    """The calls of pruning, of pruning what is masked, and of compacting what is whole."""
    model, x = _network(blocks, normed=normed), torch.randn(1, 1, 8, 8)
    whole = copy.deepcopy(model).requires_grad_(False)
    counts = [_calls(partial(fxlean.prune, model, ratio, x)) for ratio in (0.5, 0.3)]
    return counts if normed else [*counts, _calls(partial(fxlean.compact, whole, x))]


@pytest.mark.parametrize("normed", [False, True])
def test_work_grows_with_depth_and_no_faster(normed: bool) -> None:
    _steps(1, normed=normed)  # torch loads modules in the first call
    counts = [_steps(BLOCKS * times, normed=normed) for times in (1, 2, 3)]
    for small, middle, large in zip(*counts, strict=True):
        assert large - middle <= 1.005 * (middle - small)
