"""Corrections of a layer, against dense least squares."""

import numpy as np
import pytest
import torch
from torch import nn

from fxlean.calibration import contributions, least_squares, systems
from fxlean.calibration.least_squares import correct
from fxlean.calibration.systems import Operator, Sample, in_layout
from fxlean.channels.weights import Weight

# Layer, and the size of its input.
LAYERS = [
    (nn.Conv2d(4, 6, 3), (5, 6)),
    (nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1, dilation=2), (7, 6)),
    (nn.Conv2d(4, 6, (1, 3), groups=2, padding=(0, 1)), (4, 5)),
    (nn.Conv2d(4, 4, 3, groups=4), (6, 6)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (3, 4)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (3, 4)),
    (nn.Conv1d(4, 6, 3, stride=2), (9,)),
    (nn.Conv3d(4, 6, 2, dilation=(1, 2, 1)), (3, 4, 3)),
    (nn.Conv1d(4, 6, 1), (1,)),  # a linear layer
]


@pytest.fixture(params=["covariance", "parts", "convolution", "rows"], autouse=True)
def way(request, monkeypatch):
    """Both ways to the normal equations, whatever the sizes; the covariance also part by part.

    And a few output channels at a time.
    """
    if request.param == "rows":
        monkeypatch.setattr(least_squares, "LARGE", 100)
    build = systems._convolution if request.param == "convolution" else systems._covariance
    if request.param == "parts":
        monkeypatch.setattr(contributions, "CACHED", 50)
        monkeypatch.setattr(systems, "LEAST", 1)
    monkeypatch.setattr(systems, "_covariance", build)
    monkeypatch.setattr(systems, "_convolution", build)


def problem(layer, size, kept=0.6):
    """Operator, mask and a sample with something to correct, in float64."""
    torch.manual_seed(0)
    layer = layer.double()
    transposed = getattr(layer, "transposed", False)
    options = (list(layer.stride), list(layer.padding), list(layer.dilation))
    options = (*options, transposed, list(layer.output_padding))
    value = layer.weight.detach()
    weight = Weight("layer", value, transposed=transposed, groups=layer.groups)
    operator = Operator(weight, options)
    x = torch.randn(20, 4, *size, dtype=torch.float64) + 1
    layer.bias.data.zero_()
    result = layer(x).detach()
    mask = torch.rand(weight.kernels(value).shape) < kept
    return operator, mask, Sample(x, result + 0.3 * torch.randn_like(result) + 2), layer


def dense(operator, mask, sample, channel, free):
    """The columns of the linear map from the kept elements of one output channel."""
    columns = []
    for place in mask[channel].nonzero():
        single = torch.zeros(mask.shape, dtype=torch.float64)
        single[(channel, *place.tolist())] = 1
        columns.append(operator.apply(sample.x, single)[:, channel].reshape(-1))
    ones = [torch.ones(sample.lacks[:, channel].numel(), dtype=torch.float64)] * bool(free)
    return torch.stack(columns + ones, 1).numpy()


@pytest.mark.parametrize(("layer", "size"), LAYERS)
def test_the_operator_is_the_layer(layer, size):
    operator, _, sample, layer = problem(layer, size)
    kernels = operator.weight.kernels(layer.weight.detach())
    torch.testing.assert_close(operator.apply(sample.x, kernels), layer(sample.x).detach())
    assert torch.equal(in_layout(operator.weight, kernels), layer.weight)


@pytest.mark.parametrize(("layer", "size"), LAYERS)
def test_corrections_are_those_of_dense_least_squares(layer, size):
    operator, mask, sample, _ = problem(layer, size)
    free = torch.arange(len(mask)) % 2 == 0
    found = correct(operator, mask, free, [sample], [sample], steps=80, ridges=(0.0,))
    assert not found.kernels[~mask].any()
    assert not found.bias[~free].any()
    for channel in range(len(mask)):
        lacks = sample.lacks[:, channel].reshape(-1).numpy()
        columns = dense(operator, mask, sample, channel, free[channel])
        solution = np.linalg.lstsq(columns, lacks, rcond=None)[0]
        expected = np.square(lacks - columns @ solution).sum()
        assert found.before[channel].item() == pytest.approx(np.square(lacks).sum())
        assert found.after[channel].item() == pytest.approx(expected, rel=1e-6)
        kept = found.kernels[channel][mask[channel]].numpy()
        np.testing.assert_allclose(kept, solution[: len(kept)], rtol=1e-3, atol=1e-4)


def test_the_ridge_is_relative_to_the_diagonal():
    operator, mask, sample, _ = problem(*LAYERS[0])
    free = torch.ones(len(mask), dtype=torch.bool)
    found = correct(operator, mask, free, [sample], [sample], steps=80, ridges=(0.5,))
    columns = dense(operator, mask, sample, 0, False)
    lacks = sample.lacks[:, 0].reshape(-1).numpy()
    columns, centred = columns - columns.mean(0), lacks - lacks.mean()
    normal = columns.T @ columns
    expected = np.linalg.solve(normal + 0.5 * np.diag(np.diag(normal)), columns.T @ centred)
    # The best iterate on the samples themselves is not the last one, but errors come near.
    error = np.square(centred - columns @ expected).sum()
    assert found.after[0].item() <= error * (1 + 1e-6)


def test_samples_add_up():
    operator, mask, sample, _ = problem(*LAYERS[1])
    free = torch.ones(len(mask), dtype=torch.bool)
    parts = [Sample(sample.x[i : i + 7], sample.lacks[i : i + 7]) for i in (0, 7, 14)]
    whole = correct(operator, mask, free, [sample], [sample])
    apart = correct(operator, mask, free, parts, parts[::-1])
    torch.testing.assert_close(apart.kernels, whole.kernels)
    torch.testing.assert_close(apart.after, whole.after)


def test_channels_scaled_up_are_solved_as_well():
    """The diagonal preconditioner takes a scale of the inputs out."""
    operator, mask, sample, _ = problem(*LAYERS[0])
    free = torch.ones(len(mask), dtype=torch.bool)
    scale = torch.tensor([1e-3, 1.0, 30.0, 1e4], dtype=torch.float64)
    scaled = Sample(sample.x * scale[:, None, None], sample.lacks)
    plain = correct(operator, mask, free, [sample], [sample])
    other = correct(operator, mask, free, [scaled], [scaled])
    torch.testing.assert_close(other.after, plain.after)
    torch.testing.assert_close(other.kernels * scale[:, None, None], plain.kernels)


def test_large_means_cost_no_digits():
    operator, mask, sample, _ = problem(*LAYERS[0])
    free = torch.ones(len(mask), dtype=torch.bool)
    shifted = Sample((sample.x + 30).float(), (sample.lacks + 30).float())
    plain = correct(operator, mask, free, [sample], [sample])
    other = correct(operator, mask, free, [shifted], [shifted])
    torch.testing.assert_close(other.kernels.double(), plain.kernels, rtol=0.01, atol=0.01)
    torch.testing.assert_close(other.after, plain.after, rtol=0.01, atol=0)


def test_what_would_get_worse_on_held_out_samples_stays():
    operator, mask, sample, _ = problem(*LAYERS[0])
    free = torch.ones(len(mask), dtype=torch.bool)
    held = Sample(sample.x, torch.zeros_like(sample.lacks))
    found = correct(operator, mask, free, [sample], [held])
    assert not found.kernels.any()
    assert not found.bias.any()
    assert torch.equal(found.after, found.before)


def test_a_layer_that_lacks_nothing_and_one_that_reads_nothing():
    operator, mask, sample, _ = problem(*LAYERS[0])
    free = torch.zeros(len(mask), dtype=torch.bool)
    for empty in (
        Sample(sample.x, torch.zeros_like(sample.lacks)),
        Sample(torch.zeros_like(sample.x), sample.lacks),
    ):
        found = correct(operator, mask, free, [empty], [empty])
        assert not found.kernels.any()


def test_fewer_samples_than_unknowns():
    """A wide layer on one image: what is left over by chance does not ruin held-out images."""
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 4, 3, bias=False).double()
    weight = Weight("layer", layer.weight.detach())
    operator = Operator(weight, ([1, 1], [0, 0], [1, 1], False, [0, 0]))
    few = torch.randn(9, 8, 6, 6, dtype=torch.float64)  # channels of images depend on each other
    x = torch.einsum("nkyx,ck->ncyx", few, torch.randn(64, 8, dtype=torch.float64))
    x = x + 0.1 * torch.randn_like(x)
    mask = torch.rand(weight.value.shape) < 0.5
    lacks = operator.apply(x, torch.where(mask, 0, weight.value))
    lacks = lacks + 0.5 * operator.apply(x, weight.value * mask)
    free = torch.ones(4, dtype=torch.bool)
    found = correct(operator, mask, free, [Sample(x[:1], lacks[:1])], [Sample(x[1:], lacks[1:])])
    assert (found.after <= found.before).all()
    assert found.after.sum() < 0.9 * found.before.sum()
