"""How long a model takes, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from ..tracing.inputs import Arguments, call, copies_of
from ..tracing.sandbox import evaluating

SECONDS, RUNS = 0.3, 5  # a measurement takes at least so long, and so many runs


def latency_on(arguments: Arguments) -> Callable[[nn.Module], float]:
    """A function that measures how many seconds a model takes for these arguments, at the least.

    The fastest run says most of the model and least of what else the machine does.
    """

    def latency(model: nn.Module) -> float:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        times: list[float] = []
        with evaluating(model):
            _seconds(model, arguments, device)
            began = time.perf_counter()
            while len(times) < RUNS or time.perf_counter() - began < SECONDS:
                times.append(_seconds(model, arguments, device))
        return min(times)

    return latency


def _seconds(model: nn.Module, arguments: Arguments, device: torch.device) -> float:
    """The time of one run, on copies: a model may write into its inputs."""
    given = copies_of(arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    since = time.perf_counter()
    call(model, given)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - since
