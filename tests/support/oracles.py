"""Slow, obvious answers to compare the graph with: run the model and look."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxlean.channels.graph import ChannelGraph
from fxlean.channels.walk import Wired, wire
from fxlean.pruning.prunable import Network, find_prunable
from fxlean.tracing.tracer import trace_model

LEAKY = {
    torch.ops.aten.relu.default: torch.ops.aten.leaky_relu.default,
    torch.ops.aten.relu_.default: torch.ops.aten.leaky_relu_.default,
}


class RecordConvolutions(TorchDispatchMode):
    """Collects the input of every convolution, in the order in which they run.

    With `leaky=True` a ReLU lets negative values pass in part, so that it hides no dependence.
    """

    def __init__(self, leaky: bool) -> None:
        super().__init__()
        self.leaky = leaky
        self.inputs: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.inputs.append(args[0].detach().clone())
        if self.leaky and func in LEAKY:
            return LEAKY[func](args[0], 0.3)
        return func(*args, **(kwargs or {}))


def observe(model: nn.Module, inputs: tuple[Tensor, ...], *, leaky: bool = False) -> list[Tensor]:
    """The inputs of all convolutions, then the outputs of the model."""
    with torch.no_grad(), RecordConvolutions(leaky) as record:
        outputs = [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]
    return [*record.inputs, *outputs]


@dataclass(frozen=True, eq=False)
class Reading:
    """The graph of a model, and the channel at every position that `observe` shows."""

    graph: ChannelGraph
    wired: Wired
    network: Network
    channels: list[Tensor]


def read(model: nn.Module, inputs: tuple[Tensor, ...], **options) -> Reading:
    """The automatic graph, with the channels of every convolution's input and of the outputs."""
    options = {"prune_outputs": True, "include_linear": False, **options}
    wired = wire(model, trace_model(model, inputs))
    network = find_prunable(model, wired, frozenset(), **options)
    graph = network.graph
    channels = []
    for block in wired.wiring.blocks:
        if block.weight.columns is None:
            rows = np.arange(block.first, block.first + block.rows)
            starts = np.unique(graph.source_start[rows])
            sources = [graph.sources[start : start + block.columns] for start in starts]
            channels.append(torch.from_numpy(np.concatenate(sources).astype(np.int64)))
    return Reading(graph, wired, network, channels)


def reach(graph: ChannelGraph) -> Tensor:
    """Which channel (row) each kernel (column) reaches along living edges, by a plain walk."""
    reached = np.zeros((graph.num_channels, graph.num_kernels), dtype=bool)
    for channel in range(graph.num_channels):
        first = graph.kernel_start[channel]
        for j in range(graph.sizes[channel]):
            if first < 0 or graph.alive[first + j]:
                reached[channel] |= reached[graph.sources[graph.source_start[channel] + j]]
                if first >= 0:
                    reached[channel, first + j] = True
    return torch.from_numpy(reached)


@contextmanager
def changed_kernel(reading: Reading, model: nn.Module, kernel: int) -> Iterator[None]:
    """The model with one kernel doubled (or made, where it is zero)."""
    number = int(np.searchsorted([layer.start for layer in reading.graph.layers], kernel, "right"))
    layer, weight = reading.graph.layers[number - 1], reading.network.weights[number - 1]
    row, column = divmod(kernel - layer.start, layer.columns)
    assert weight.origin is not None
    parameter = dict(model.named_parameters())[weight.origin.parameter]
    index = weight.kernels(weight.origin.flat_index(weight.value.shape))[row, column].flatten()
    saved = parameter.data.clone()
    try:
        flat = parameter.data.view(-1)
        flat[index] = flat[index] * 2 + 0.5
        yield
    finally:
        parameter.data.copy_(saved)


def differing(before: Tensor, after: Tensor) -> Tensor:
    """Which channels (dimension 1) of two equal-shaped tensors differ anywhere."""
    return (before != after).transpose(0, 1).flatten(1).any(1)
