"""`trace`, and from a model to what there is to prune in it, with the lengths of its edges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..calibration.batches import example_and_batches
from ..calibration.shares import shares_of
from ..channels.graph import ChannelGraph
from ..channels.walk import Wired, wire
from ..errors import ArgumentError, by_reason
from ..selection.methods import SHARE
from ..tracing.arguments import resolve_ignored, unwrapped
from ..tracing.inputs import Arguments
from ..tracing.sandbox import on_cpu, ordinary, paused_collection
from ..tracing.tracer import Trace, trace_model
from .lengths import with_norms
from .options import check
from .prunable import LINEAR, OUTPUT, Network, find_prunable

# What to pass where nothing else can be pruned, by the reason that leaves layers alone.
HELPS = {
    OUTPUT: "prune_outputs=True to prune the layers that make the output",
    LINEAR: "include_linear=True to prune linear layers",
}


def trace(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    ignore: Any = (),
    norm: str = "spectral",
    prune_outputs: bool = False,
    include_linear: bool = False,
    calibration: Any = None,
) -> ChannelGraph:
    """The channels of a model, the edges between them, and their lengths.

    Arguments and errors are those of `prune`; the model is not changed. With `norm="share"` the
    lengths are shares of variance, as for the method "relevance", and in a process group every rank
    must call it.
    """
    check(
        model,
        norm=norm,
        ignore=ignore,
        prune_outputs=prune_outputs,
        include_linear=include_linear,
    )
    model = unwrapped(model)
    with ordinary(), paused_collection():
        example_inputs, batches = example_and_data(model, example_inputs, norm, calibration)
        traced = trace_model(model, example_inputs)
        wired = wire(model, traced)
        network = network_of(model, wired, ignore, prune_outputs, include_linear)
        return with_lengths(model, traced, wired, network, batches, norm, gains=True)


def example_and_data(
    model: nn.Module, example_inputs: Any, order: str, calibration: Any
) -> tuple[Any, Iterator[Arguments]]:
    """Inputs to trace with, and the batches for an order of lengths that asks data."""
    if order != SHARE:
        return example_inputs, iter(())
    return example_and_batches(model, example_inputs, calibration)


def with_lengths(
    model: nn.Module,
    trace: Trace,
    wired: Wired,
    network: Network,
    batches: Iterator[Arguments],
    order: str,
    *,
    gains: bool,
    overlaps: dict[int, NDArray[np.float64]] | None = None,
) -> ChannelGraph:
    """The graph with lengths of an order: norms of kernels, or shares on batches."""
    if order != SHARE:
        return with_norms(network, order, gains=gains)
    shares = shares_of(model, network.graph, trace, wired, batches, overlaps)
    return network.graph.with_lengths(shares)


@on_cpu()
@torch.no_grad()
def network_of(
    model: nn.Module, wired: Wired, ignore: Any, prune_outputs: bool, include_linear: bool
) -> Network:
    """What there is to prune in a traced model."""
    network = find_prunable(
        model,
        wired,
        resolve_ignored(model, ignore),
        prune_outputs=prune_outputs,
        include_linear=include_linear,
    )
    if network.graph.num_kernels == 0:
        helps = [text for reason, text in HELPS.items() if reason in network.skipped.values()]
        if helps:
            advice = f"Pass {', or '.join(helps)}."
        elif network.skipped:
            advice = "Change what keeps these layers from being pruned first."
        else:
            advice = "Only weights of convolutions and linear layers are pruned."
        reasons = "; ".join(by_reason(network.skipped)) or "none was found"
        raise ArgumentError(
            f"{type(model).__name__} has no convolution to prune ({reasons}). {advice}"
        )
    return network
