"""The wiring against what running the model shows."""

import pytest
import torch
from hypothesis import given, settings

from fxlean.selection.liveness import zero_channels
from tests.support.oracles import changed_kernel, differing, observe, reach, read
from tests.support.strategies import networks
from tests.support.zoo import ZOO, make

# Where something stands between a kernel and a value that can hide a dependence, as a product with
# zeros.
INEXACT = {"gated_cell", "opaque"}


def dependences(model, inputs):
    """For every kernel: what it changes when run, and what it reaches in the graph."""
    reading = read(model, inputs)
    before = observe(model, inputs, leaky=True)
    reached = reach(reading.graph)
    for kernel in reading.graph.alive.nonzero()[0]:
        with changed_kernel(reading, model, kernel):
            after = observe(model, inputs, leaky=True)
        for number, channels in enumerate(reading.channels):
            yield (
                kernel,
                number,
                differing(before[number], after[number]),
                reached[channels, kernel],
            )


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_layer_depends_on_just_the_kernels_that_the_graph_says(name):
    torch.manual_seed(0)
    model, inputs = make(name, torch.float64)
    inputs = tuple(torch.randn(4, *x.shape[1:], dtype=x.dtype) for x in inputs)
    for kernel, number, runs, graph in dependences(model, inputs):
        hidden = runs < graph
        assert not (runs > graph).any(), f"kernel {kernel} changes convolution {number}"
        assert name in INEXACT or not hidden.any(), f"kernel {kernel}, convolution {number}"


@settings(max_examples=60)
@given(networks())
def test_random_networks_depend_on_no_more_than_the_graph_says(drawn):
    model, inputs = drawn
    for kernel, number, runs, graph in dependences(model, inputs):
        assert not (runs > graph).any(), f"kernel {kernel} changes convolution {number}"


def test_zero_channel_is_channel_zero():
    model, inputs = make("residual_padded")
    reading = read(model, inputs)
    assert zero_channels(reading.graph, reading.graph.alive)[0]
