"""Repair of layers that a network uses several times, against networks that use them once."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlean
from tests.support.blocks import conv
from tests.support.zoo import randomise_norms

SAMPLES = 16  # of a batch
NORMS = ("network.1.", "network.4.")  # batch norms of the encoder


def batches(number):
    """Images whose channels are correlated, so that one can stand in for another."""
    generator = torch.Generator().manual_seed(number)
    noise = torch.randn(SAMPLES, 3, 8, 8, generator=generator, dtype=torch.float64)
    return noise + 0.5 * noise.roll(1, 1)


class Each(nn.Module):
    """One network for all of its arguments."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *args):
        return tuple(map(self.network, args))


def encoder():
    """Every kind of stop: biases and running means that take up constants, norms of both kinds."""
    network = nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.BatchNorm2d(12), conv(12, 8), nn.GroupNorm(2, 8), nn.ReLU()),
        *(nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 10), nn.LayerNorm(10)),
        *(nn.ReLU(), nn.Linear(10, 3)),
    )
    randomise_norms(network)
    return network.double().eval()


def halved(model):
    """Without half of the kernels, none of which are a whole channel's, in place."""
    for weight in (parameter for parameter in model.parameters() if parameter.dim() > 1):
        with torch.no_grad():
            weight[::2, ::2] = weight[1::2, 1::2] = 0


@pytest.mark.parametrize("sizes", [(8, 8), (8, 12, 6)])
def test_several_inputs_count_as_several_batches(sizes):
    torch.manual_seed(0)
    model = Each(encoder())
    reference = copy.deepcopy(model)
    inputs = [batches(number)[..., :size] for number, size in enumerate(sizes)]
    halved(model)
    once = copy.deepcopy(model)
    result = fxlean.repair(model, tuple(inputs), reference)
    wanted = fxlean.repair(once, inputs, reference)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, once.state_dict()[key])
        changed = not torch.equal(value, reference.state_dict()[key])
        assert changed is not key.startswith(NORMS) or "mean" in key, key
    assert len(result.layers) == len(wanted.layers) == 5
    for layer, other in zip(result.layers, wanted.layers, strict=True):
        assert layer.name == other.name
        assert layer.before == pytest.approx(other.before)
        assert layer.after == pytest.approx(other.after)
    assert result.after < 0.8 * result.before


class Repeated(nn.Module):
    """A layer that reads its own results, or what another layer makes of them."""

    def __init__(self, between):
        super().__init__()
        self.layer, self.between = conv(3, 3), between

    def forward(self, x):
        first = self.layer(x)
        second = self.layer(self.between(F.relu(first)))
        return first, second, self.layer(self.between(F.relu(second)))


@pytest.mark.parametrize("between", [nn.Identity, lambda: conv(3, 3)])
@torch.no_grad()
def test_later_uses_read_what_all_layers_are_to_give(between):
    torch.manual_seed(0)
    model = Repeated(between()).double().eval()
    reference = copy.deepcopy(model)
    halved(model)
    once = Each(copy.deepcopy(model.layer))
    first, second, _ = reference(batches(0))
    read = [batches(0), *(reference.between(F.relu(given)) for given in (first, second))]
    fxlean.repair(model, batches(0), reference)
    fxlean.repair(once, read, Each(reference.layer))
    torch.testing.assert_close(model.layer.weight, once.network.weight)
    torch.testing.assert_close(model.layer.bias, once.network.bias)


class Unrolled(nn.Module):
    """A number of steps that are the same, as of an iterative method."""

    def __init__(self):
        super().__init__()
        self.first, self.last = conv(3, 16), conv(16, 3)
        self.shared = nn.Sequential(conv(16, 24), nn.GroupNorm(4, 24), nn.ReLU(), conv(24, 16))

    def forward(self, x):
        x = self.first(x)
        for _ in range(5):
            x = F.relu(x + 0.3 * self.shared(x))
        return (self.last(x),)


class Pyramid(nn.Module):
    """One head for features of three sizes, as of a detector."""

    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleList(conv(n, 16) for n in (3, 16, 16))
        self.shared = nn.Sequential(conv(16, 16), nn.GroupNorm(4, 16), nn.ReLU(), conv(16, 3))

    def forward(self, x):
        given = []
        for level in self.levels:
            x = F.avg_pool2d(F.relu(level(x)), 2)
            given.append(self.shared(x))
        return tuple(given)


@pytest.mark.parametrize("granularity", ["kernel", "channel"])
@pytest.mark.parametrize("build", [Unrolled, Pyramid])
def test_repair_of_shared_layers_helps(build, granularity):
    torch.manual_seed(0)
    model = build().double().eval()
    reference = copy.deepcopy(model)
    fxlean.prune(model, 0.6, batches(0)[:2], method="path", granularity=granularity)
    others = copy.deepcopy(model)
    others.shared.requires_grad_(False)
    data = [batches(number) for number in range(4)]
    assert not fxlean.repair(model, data, reference).skipped
    fxlean.repair(others, data, reference)
    fresh = batches(9)
    with torch.no_grad():
        wanted = torch.cat([given.flatten() for given in reference(fresh)])
        found, worse = (
            (torch.cat([given.flatten() for given in net(fresh)]) - wanted).square().mean()
            for net in (model, others)
        )
    assert found < 0.8 * worse


class Tied(nn.Module):
    """Looks channels up in the weight of its last layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 5, bias=False)

    def forward(self, x):
        y = self.first(x.mean((2, 3)))
        index = (x[:, 0, 0, 0] > 0).long()
        return self.last(F.relu(y + F.embedding(index, self.last.weight)))


def test_what_something_else_than_a_layer_reads_stays():
    torch.manual_seed(0)
    model = Tied().double().eval()
    reference = copy.deepcopy(model)
    halved(model)
    before = model.last.weight.clone()
    result = fxlean.repair(model, batches(0), reference)
    assert torch.equal(model.last.weight, before)
    assert result.skipped == {"last": "its weight is used in several ways"}


class TwoWays(nn.Module):
    """Two layers, of which some parameters are the same, and a norm between them."""

    def __init__(self, shared):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3)
        self.second, self.other = nn.Conv2d(3, 3, 3, padding=2, dilation=2), nn.GroupNorm(1, 3)
        self.last = conv(3, 3)
        shared(self)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        return self.last(F.relu(self.other(self.second(x))))


def weights(model):
    model.second.weight = model.first.weight


def biases(model):
    model.second.bias = model.first.bias


def scales(model):
    model.other.weight = model.norm.weight


@pytest.mark.parametrize(
    ("shared", "stays"),
    [
        (weights, {"first.weight", "second.weight"}),
        (biases, {"first.bias", "second.bias"}),
        (scales, {"norm.weight", "norm.bias", "other.weight", "other.bias"}),
    ],
)
def test_what_is_used_in_several_ways_stays(shared, stays):
    torch.manual_seed(0)
    model = TwoWays(shared).double().eval()
    reference = copy.deepcopy(model)
    halved(model)
    before = copy.deepcopy(model.state_dict())
    result = fxlean.repair(model, batches(0), reference)
    same = {key for key, value in model.state_dict().items() if torch.equal(value, before[key])}
    listed = {"first": "its weight is used in several ways"}
    assert result.after < result.before
    assert result.skipped == (listed if shared is weights else {})
    left = {"first.bias", "second.bias"} if shared is weights else set()
    assert same == stays | left
