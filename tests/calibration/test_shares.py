"""Shares of variance, against running each kernel by itself."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxlean
from fxlean.calibration import contributions
from fxlean.calibration.contributions import Contributions
from fxlean.calibration.shares import shares_of
from fxlean.channels.graph import Kind
from fxlean.channels.walk import wire
from fxlean.channels.weights import Weight
from fxlean.pruning.prunable import find_prunable
from fxlean.tracing.tracer import trace_model
from tests.support.blocks import Apply, Combine, conv
from tests.support.zoo import ZOO, make

aten = torch.ops.aten


class RecordCalls(TorchDispatchMode):
    """The arguments of every call of an operator, in order."""

    def __init__(self, *operators):
        super().__init__()
        self.operators, self.calls = operators, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.operators:
            self.calls.append([a.detach().clone() if torch.is_tensor(a) else a for a in args])
        return func(*args, **(kwargs or {}))


def calls_of(model, inputs, *operators):
    with torch.no_grad(), RecordCalls(*operators) as record:
        model(*inputs)
    return record.calls


def alone(call):
    """The variance of each kernel's output, shape (out, in of the group), from running it alone."""
    x, weight, _, stride, padding, dilation, transposed, output_padding, groups = call
    options = (stride, padding, dilation, transposed, output_padding, groups)
    out = weight.shape[1] * groups if transposed else weight.shape[0]
    columns = weight.shape[0] // groups if transposed else weight.shape[1]
    found = np.zeros((out, columns))
    for o in range(out):
        group, within = divmod(o, out // groups)
        for i in range(columns):
            single = torch.zeros_like(weight)
            at = (group * columns + i, within) if transposed else (o, i)
            single[at] = weight[at]
            found[o, i] = aten.convolution(x, single, None, *options)[:, o].var(correction=0)
    return found


def shares_by_block(model, inputs, batches=None):
    """The graph of a model, the shares of its edges, and those of each block by itself."""
    trace = trace_model(model, inputs)
    wired = wire(model, trace)
    options = {"prune_outputs": True, "include_linear": True}
    graph = find_prunable(model, wired, frozenset(), **options).graph
    shares = shares_of(model, graph, trace, wired, batches or [inputs])
    return (
        graph,
        shares,
        [
            (block, shares[block.start :][: block.rows * block.columns].reshape(block.rows, -1))
            for block in wired.wiring.blocks
        ],
    )


def normalised(values):
    total = values.sum(1, keepdims=True)
    return np.divide(values, total, out=np.zeros_like(values), where=total > 0)


@pytest.mark.parametrize("name", ZOO)
def test_shares_are_those_of_each_kernel_run_by_itself(name):
    model, inputs = make(name, torch.float64)
    _, shares, blocks = shares_by_block(model, inputs)
    calls = calls_of(model, inputs, aten.convolution.default)
    convolutions = [found for block, found in blocks if block.weight.columns is None]
    assert len(convolutions) == len(calls)
    for found, call in zip(convolutions, calls, strict=True):
        np.testing.assert_allclose(found, normalised(alone(call)), atol=1e-6)
    assert shares.dtype == np.float32
    assert shares.min() >= 0
    assert shares.max() <= 1


@pytest.mark.parametrize("options", [{"output_padding": 1}, {"dilation": 2}, {"padding": 2}])
def test_transposed_convolutions(options):
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, **options).double()
    inputs = (torch.randn(2, 4, 5, 7, dtype=torch.float64),)
    _, _, [(_, found)] = shares_by_block(layer, inputs)
    (call,) = calls_of(layer, inputs, aten.convolution.default)
    np.testing.assert_allclose(found, normalised(alone(call)), atol=1e-6)


def test_linear_layers_share_by_all_features_of_a_channel():
    torch.manual_seed(0)
    layers = conv(3, 4), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 5)
    model = nn.Sequential(*layers).double()
    inputs = (torch.randn(6, 3, 8, 8, dtype=torch.float64),)
    _, _, [_, (_, found)] = shares_by_block(model, inputs)
    features = model[:3](*inputs).detach().unflatten(1, (4, 9))
    parts = torch.einsum("ncf,ocf->noc", features, layers[3].weight.detach().unflatten(1, (4, 9)))
    np.testing.assert_allclose(found, normalised(parts.var(0, correction=0).numpy()), atol=1e-6)


def test_channels_with_different_numbers_of_features():
    torch.manual_seed(0)
    columns = torch.tensor([2, 0, 1, 2, 2, 0])
    weight, x = torch.randn(4, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    collected = Contributions(Weight("fc", weight, columns=columns))
    collected.add(x, None)
    for channel in range(3):
        part = x[:, columns == channel] @ weight[:, columns == channel].T
        expected = part.var(0, correction=0)
        torch.testing.assert_close(collected.variances()[:, channel], expected)


def test_batches_add_up_whatever_their_sizes():
    model, _ = make("u_net", torch.float64)
    inputs = torch.randn(7, 3, 8, 8, dtype=torch.float64)
    _, whole, _ = shares_by_block(model, (inputs,))
    _, parts, _ = shares_by_block(model, (inputs[:2],), [(part,) for part in inputs.split(3)])
    np.testing.assert_allclose(parts, whole, atol=1e-6)


def test_parts_of_large_values_add_up(monkeypatch):
    model, inputs = make("three_dimensional", torch.float64)
    _, whole, _ = shares_by_block(model, inputs)
    monkeypatch.setattr(contributions, "CACHED", 50)
    _, parts, _ = shares_by_block(model, inputs)
    np.testing.assert_allclose(parts, whole, atol=1e-6)


@pytest.mark.parametrize(("positions", "tolerance"), [(10**6, 1e-6), (4096, 0.05)])
def test_large_kernels_are_applied_at_sampled_positions(monkeypatch, positions, tolerance):
    monkeypatch.setattr(contributions, "POSITIONS", positions)
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 13, padding=6, groups=2).double()
    inputs = (torch.randn(4, 4, 40, 40, dtype=torch.float64),)
    _, _, [(_, found)] = shares_by_block(layer, inputs)
    (call,) = calls_of(layer, inputs, aten.convolution.default)
    np.testing.assert_allclose(found, normalised(alone(call)), atol=tolerance)


def test_large_means_cost_no_digits():
    layer = nn.Conv2d(3, 4, 3).float()
    x = torch.randn(64, 3, 8, 8)
    _, _, [(_, found)] = shares_by_block(layer, (x,))
    _, _, [(_, shifted)] = shares_by_block(layer, (x + 1000,))
    np.testing.assert_allclose(shifted, found, atol=1e-3)


class Joined(nn.Module):
    """Two branches joined in some way, then a convolution."""

    def __init__(self, join):
        super().__init__()
        self.body = Combine(join, conv(3, 4), nn.Sequential(conv(3, 4), nn.ReLU()))
        self.last = conv(4, 2, 1)

    def forward(self, x):
        return self.last(self.body(x))


@pytest.mark.parametrize(
    ("join", "factors"),
    [
        (torch.add, (1, 1)),
        (torch.maximum, (1, 1)),
        (lambda a, b: torch.add(a, b, alpha=3), (1, 3)),
        (lambda a, b: torch.sub(a, b, alpha=0.5), (1, 0.5)),
        (lambda a, b: a + b.mean((2, 3), keepdim=True), None),
    ],
)
def test_operands_of_a_sum_share_by_their_variances(join, factors):
    torch.manual_seed(0)
    model = Joined(join).double()
    inputs = (torch.randn(8, 3, 8, 8, dtype=torch.float64),)
    graph, shares, _ = shares_by_block(model, inputs)
    first, second = (branch(*inputs).detach() for branch in model.body.branches)
    if factors is None:
        factors, second = (1, 1), second.mean((2, 3))[..., None, None]
    operands = zip((first, second), factors, strict=True)
    parts = [(x * f).transpose(0, 1).flatten(1).var(1, correction=0) for x, f in operands]
    rows = np.flatnonzero((graph.sizes == 2) & (graph.kernel_start < 0))
    assert len(rows) == 4
    for number, row in enumerate(rows):
        found = shares[graph.length_start[row] :][:2]
        expected = torch.stack(parts)[:, number]
        np.testing.assert_allclose(found, (expected / expected.sum()).numpy(), atol=1e-6)


@pytest.mark.parametrize("name", ["expanded_gate", "product_gate", "squeeze_excite", "swish_gate"])
def test_every_operand_of_a_product_gets_all(name):
    model, inputs = make(name)
    graph, shares, _ = shares_by_block(model, inputs)
    rows = np.flatnonzero(graph.kinds == Kind.PRODUCT)
    assert len(rows)
    for row in rows:
        assert (shares[graph.length_start[row] :][: graph.sizes[row]] == 1).all()


@pytest.mark.parametrize("name", ZOO)
def test_shares_into_a_channel_add_up_to_one(name):
    model, inputs = make(name)
    graph, shares, _ = shares_by_block(model, inputs)
    for channel in np.flatnonzero((graph.sizes > 0) & (graph.kinds != Kind.PRODUCT)):
        total = shares[graph.length_start[channel] :][: graph.sizes[channel]].sum()
        assert total == 0 or abs(total - 1) < 1e-5


def test_merged_channels_share_by_their_variances():
    """A pixel shuffle brings four channels into one, each at its positions."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4), nn.PixelShuffle(2), conv(1, 2, 1)).double()
    inputs = (torch.randn(8, 3, 8, 8, dtype=torch.float64),)
    graph, shares, _ = shares_by_block(model, inputs)
    variances = model[0](*inputs).detach().transpose(0, 1).flatten(1).var(1, correction=0)
    (row,) = np.flatnonzero((graph.sizes == 4) & (graph.kernel_start < 0))
    found = shares[graph.length_start[row] :][:4]
    np.testing.assert_allclose(found, (variances / variances.sum()).numpy(), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.* does not trace as a whole:fxlean.PruneWarning")
def test_a_model_that_traces_in_parts():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Sequential(conv(3, 4), nn.ReLU()), conv(4, 2)

        def forward(self, x):
            x = self.first(x)
            return self.last(x if x.sum() > -1 else F.relu(x))

    torch.manual_seed(0)
    model = Parts().double()
    inputs = (torch.randn(4, 3, 8, 8, dtype=torch.float64),)
    _, _, blocks = shares_by_block(model, inputs)
    calls = calls_of(model, inputs, aten.convolution.default)
    for (_, found), call in zip(blocks, calls, strict=True):
        np.testing.assert_allclose(found, normalised(alone(call)), atol=1e-6)


def test_batches_that_lead_through_other_channels_are_refused():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.more = conv(3, 4), conv(4, 4)

        def forward(self, x):
            x = self.first(x)
            return self.more(x) if x.shape[-1] > 8 else x

    model, small, large = Growing(), torch.randn(1, 3, 8, 8), torch.randn(1, 3, 9, 9)
    with pytest.raises(fxlean.ArgumentError, match="Pass batches of the same shape"):
        fxlean.trace(model, small, norm="share", calibration=large, prune_outputs=True)


class PerSample(nn.Module):
    """Adds a vector of its own to every sample."""

    def __init__(self):
        super().__init__()
        self.first, self.more, self.vectors = conv(3, 4), conv(4, 6), nn.Embedding(5, 4)

    def forward(self, x, label):
        return self.more(F.relu(self.first(x)) + self.vectors(label)[:, :, None, None])


@pytest.mark.parametrize("sizes", [[12], [8, 4], [3, 3, 6]])
def test_where_channels_depend_on_the_number_of_samples_batches_are_cut_to_it(sizes):
    torch.manual_seed(0)
    model, images = PerSample().double(), torch.randn(12, 3, 8, 8, dtype=torch.float64)
    labels = torch.arange(12) % 5
    batches = list(zip(images.split(sizes), labels.split(sizes), strict=True))
    fours = list(zip(images.split(4), labels.split(4), strict=True))
    if 3 in sizes:  # three samples and the first of them again
        threes = [(torch.cat([x, x[:1]]), torch.cat([y, y[:1]])) for x, y in batches[:2]]
        six, six_labels = batches[2]
        rest = [(six[:4], six_labels[:4])]
        rest += [(six[[4, 5, 0, 1]], six_labels[[4, 5, 0, 1]])]
        fours = threes + rest
    _, expected, _ = shares_by_block(model, fours[0], fours)
    _, found, _ = shares_by_block(model, (images[:4], labels[:4]), batches)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_noise_serves_where_channels_depend_on_the_number_of_samples():
    model = PerSample()
    inputs = torch.randn(4, 3, 8, 8), torch.arange(4)
    result = fxlean.prune(model, 0.5, inputs, method="relevance")
    assert result.calibration == "noise"


def test_broken_weights_are_told_by_layer():
    model = nn.Sequential(conv(3, 4), conv(4, 2))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(fxlean.ArgumentError, match=r"hold NaN or infinity in: 0\. Repair"):
        fxlean.trace(model, torch.randn(1, 3, 8, 8), norm="share")


def test_values_that_overflow_are_told():
    model = nn.Sequential(Apply(torch.mul, 1e30), Apply(torch.square), conv(3, 4), conv(4, 2))
    with pytest.raises(fxlean.ArgumentError, match="values become NaN or infinity before 2"):
        fxlean.trace(model, torch.randn(1, 3, 8, 8), norm="share")
