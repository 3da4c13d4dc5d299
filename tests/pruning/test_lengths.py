"""Edge lengths: norms of kernels, with everything folded in that scales what they carry."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlean
from fxlean.channels.weights import Weight
from fxlean.norms.operator import operator_norms
from fxlean.pruning.lengths import kernel_norms
from tests.support.blocks import Apply, conv
from tests.support.oracles import read
from tests.support.zoo import randomise_norms

IMAGE = torch.zeros(1, 3, 8, 8)


def network(*layers):
    torch.manual_seed(0)
    model = nn.Sequential(*layers).eval()
    randomise_norms(model)
    return model


def lengths_of(model, inputs=IMAGE, **options):
    """The lengths of every layer by name, shape (rows, columns)."""
    graph = fxlean.trace(model, inputs, prune_outputs=True, **options)
    found = {}
    for layer in graph.layers:
        first = int(np.flatnonzero(graph.kernel_start == layer.start)[0])
        start = graph.length_start[first]
        values = graph.lengths[start : start + layer.rows * layer.columns]
        found[layer.name] = torch.from_numpy(values.reshape(layer.rows, layer.columns))
    return found


def scale(norm):
    weight = torch.ones(()) if norm.weight is None else norm.weight
    return (weight / (norm.running_var + norm.eps).sqrt()).abs().detach()


def norms(layer, order="spectral"):
    return operator_norms(layer.weight.detach(), layer.stride, order=order)


@pytest.mark.parametrize("order", ["spectral", "frobenius", "nuclear", "l1"])
def test_lengths_are_the_norms_of_the_kernels(order):
    model = network(conv(3, 4, bias=True), nn.ReLU(), conv(4, 6, stride=2), conv(6, 2, 1))
    for name, values in lengths_of(model, norm=order).items():
        torch.testing.assert_close(values, norms(model[int(name)], order))


@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_is_folded_into_the_convolution_before_it(affine):
    first, norm, last = conv(3, 4, bias=True), nn.BatchNorm2d(4, affine=affine), conv(4, 2, 1)
    values = lengths_of(network(first, norm, nn.ReLU(), last))
    torch.testing.assert_close(values["0"], norms(first) * scale(norm)[:, None])
    torch.testing.assert_close(values["3"], norms(last))
    weight = first.weight.detach() * scale(norm)[:, None, None, None]
    torch.testing.assert_close(values["0"], operator_norms(weight))


def test_two_batch_norms_are_folded_one_after_the_other():
    first, one, two, last = conv(3, 4), nn.BatchNorm2d(4), nn.BatchNorm2d(4), conv(4, 2, 1)
    values = lengths_of(network(first, one, two, last))
    torch.testing.assert_close(values["0"], norms(first) * scale(one)[:, None])
    torch.testing.assert_close(values["3"], norms(last) * scale(two))


def test_a_batch_norm_of_what_others_read_too_scales_what_comes_after():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.second, self.last = (
                conv(3, 4),
                nn.BatchNorm2d(4),
                conv(4, 4),
                conv(4, 2, 1),
            )

        def forward(self, x):
            x = self.first(x)
            return self.last(x + self.second(self.norm(x).relu()))

    model = PreActivation().eval()
    randomise_norms(model)
    values = lengths_of(model)
    torch.testing.assert_close(values["first"], norms(model.first))
    torch.testing.assert_close(values["second"], norms(model.second) * scale(model.norm))
    torch.testing.assert_close(values["last"], norms(model.last))


@pytest.mark.parametrize(
    ("layer", "gain"),
    [
        (nn.AvgPool2d(2), 0.5),
        (nn.AvgPool2d(3, stride=1, padding=1), 1.0),
        (nn.AvgPool2d((2, 1)), 0.5**0.5),
        (nn.MaxPool2d(2), 1.0),
        (nn.ReLU(), 1.0),
        (Apply(torch.mul, -0.25), 0.25),
        (Apply(torch.div, 4.0), 0.25),
        (Apply(torch.neg), 1.0),
        (Apply(torch.add, 3.0), 1.0),
        (Apply(torch.mul, torch.tensor([0.5, 2.0, 0.0, 3.0]).reshape(4, 1, 1)), [0.5, 2, 0, 3]),
        (Apply(F.pad, (1, 1, 1, 1)), 1.0),
        (nn.Upsample(scale_factor=2), 1.0),
    ],
)
def test_what_scales_a_value_scales_the_kernels_that_read_it(layer, gain):
    first, last = conv(3, 4), conv(4, 2)
    values = lengths_of(network(first, layer, last))
    torch.testing.assert_close(values["0"], norms(first))
    torch.testing.assert_close(values["2"], norms(last) * torch.tensor(gain))


def test_the_gains_of_a_grouped_convolution_go_to_their_group():
    gain = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    last = conv(6, 4, groups=2)
    model = network(conv(3, 6), Apply(torch.mul, gain.reshape(6, 1, 1)), last, nn.BatchNorm2d(4))
    expected = norms(last) * torch.stack([gain[:3], gain[:3], gain[3:], gain[3:]])
    torch.testing.assert_close(lengths_of(model)["2"], expected * scale(model[3])[:, None])


@pytest.mark.parametrize("name", ["spectral", "frobenius", "l1"])
def test_linear_edges_are_the_norms_of_dense_blocks(name):
    """After a flatten several features carry one channel: their block of the matrix is one edge."""
    linear = nn.Linear(4 * 9, 5)
    model = network(conv(3, 4), nn.AdaptiveAvgPool2d(3), nn.Flatten(), linear, nn.Linear(5, 2))
    values = lengths_of(model, include_linear=True, norm=name)
    blocks = linear.weight.detach().reshape(5, 4, 9)
    order = 1 if name == "l1" else 2
    expected = [[np.linalg.norm(blocks[o, c].numpy(), order) for c in range(4)] for o in range(5)]
    torch.testing.assert_close(values["3"], torch.tensor(expected))
    torch.testing.assert_close(values["4"], model[4].weight.detach().abs())


def test_linear_layers_on_interleaved_channels():
    """In a layout with the channels last, every fourth feature carries the same channel."""
    linear = nn.Linear(4 * 9, 5)
    model = network(
        conv(3, 4),
        nn.AdaptiveAvgPool2d(3),
        Apply(torch.permute, (0, 2, 3, 1)),
        nn.Flatten(),
        linear,
    )
    blocks = linear.weight.detach().reshape(5, 9, 4)
    expected = torch.linalg.vector_norm(blocks, dim=1)
    torch.testing.assert_close(lengths_of(model, include_linear=True)["4"], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_weights(dtype):
    model = network(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 2)).to(dtype)
    values = lengths_of(model, IMAGE.to(dtype))
    expected = lengths_of(model.float())
    for name, lengths in values.items():
        assert lengths.dtype == torch.float32
        torch.testing.assert_close(lengths, expected[name], rtol=2e-2, atol=1e-3)


def test_a_shared_layer_has_the_gains_of_each_of_its_calls():
    shared, norm = conv(4, 4), nn.BatchNorm2d(4)
    model = network(conv(3, 4), shared, norm, shared, conv(4, 2, 1))
    reading = read(model, (IMAGE,))
    start = next(layer.start for layer in reading.graph.layers if layer.name == "1")
    rows = np.flatnonzero(reading.graph.kernel_start == start)
    assert len(rows) == 2
    graph = fxlean.trace(model, IMAGE, prune_outputs=True)
    folded, plain = (graph.lengths[graph.length_start[row] :][:4] for row in rows)
    torch.testing.assert_close(torch.from_numpy(plain), norms(shared)[0])
    torch.testing.assert_close(torch.from_numpy(folded), norms(shared)[0] * scale(norm)[0])


FEATURES = [  # the channel of every feature of a linear layer
    [0, 1, 2, 3],
    [2, 0, 3, 1],
    [0, 0, 1, 1, 2, 2],
    [0, 1, 2, 0, 1, 2],
    [1, 0, 0, 1, 2, 0, 3],
    [3, 3, 0, 0],
]


@pytest.mark.parametrize("norm", ["spectral", "l1"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("features", FEATURES)
def test_features_of_one_channel_are_one_kernel(features, dtype, norm):
    value = torch.randn(5, len(features)).to(dtype)
    columns = torch.tensor(features)
    found = kernel_norms(Weight("classifier", value, columns=columns), norm)
    assert found.shape == (5, max(features) + 1)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    for channel in range(max(features) + 1):
        taps = value[:, columns == channel].to(found.dtype)
        expected = taps.abs().sum(1) if norm == "l1" else taps.square().sum(1).sqrt()
        torch.testing.assert_close(found[:, channel], expected)


@pytest.mark.parametrize("features", FEATURES)
def test_kernels_of_a_linear_layer_are_weighed_on_its_device(features):
    # Nothing can be copied from the meta device, which stands for a GPU.
    value = torch.empty(5, len(features), device="meta")
    assert kernel_norms(Weight("fc", value, columns=torch.tensor(features)), "spectral").is_meta


@pytest.mark.parametrize("spoil", ["weight", "running_var", "bias"])
def test_broken_numbers_are_told_by_layer(spoil):
    model = network(conv(3, 4), nn.BatchNorm2d(4), conv(4, 2))
    with torch.no_grad():
        getattr(model[1], spoil)[2] = float("nan")
    if spoil == "bias":
        fxlean.trace(model, IMAGE)
        return
    with pytest.raises(fxlean.ArgumentError, match=r"hold NaN or infinity in: 0\. Repair"):
        fxlean.trace(model, IMAGE)
