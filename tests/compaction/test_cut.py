"""What is cut: the layers and the wirings that can do with fewer channels."""

import time
import warnings

import pytest
import torch
from torch import nn

import fxlean
from fxlean import compact, rules
from fxlean.channels.rules import table
from fxlean.nn import Selected
from tests.support.blocks import Apply, conv
from tests.support.compare import worst_error
from tests.support.zoo import randomise_norms

DEAD = torch.arange(32) % 2 == 1


def kill(*layers, dead=DEAD):
    """Make these channels of the layers zero."""
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter[dead] = 0


def check(model, x, other):
    """The compacted model, after a look at what it computes, without a warning."""
    small = compact(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert worst_error(small(other), model(other)) < 1e-4
    return small


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(
    ("norm", "options"),
    [
        (nn.InstanceNorm2d, {}),
        (nn.InstanceNorm2d, {"affine": True}),
        (nn.InstanceNorm2d, {"affine": True, "track_running_stats": True}),
        (nn.BatchNorm2d, {"track_running_stats": False}),
        (nn.BatchNorm2d, {"affine": False, "track_running_stats": False}),
    ],
)
def test_norms_by_the_statistics_of_an_instance_or_batch(norm, options, samples):
    torch.manual_seed(0)
    norms = [norm(32, **options) for _ in range(2)]
    first, second = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)
    model = nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], conv(32, 4)).eval()
    randomise_norms(model)
    kill(first, second, *norms)
    small = check(model, torch.randn(samples, 3, 12, 12), torch.randn(3, 3, 15, 13))
    assert [m.num_features for m in small.modules() if isinstance(m, norm)] == [16, 16]
    assert small[3].weight.shape == (16, 16, 3, 3)


class Normed(nn.Conv2d):
    """A convolution with a norm inside, and the counter of a profiler."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.norm = nn.BatchNorm2d(self.out_channels)
        self.register_buffer("total_ops", torch.zeros(1))

    def forward(self, x):
        return self.norm(super().forward(x))


def test_what_else_hangs_on_a_layer_is_not_cut_with_it_or_counted_twice():
    torch.manual_seed(0)
    layers = Normed(3, 32, 3, bias=False), nn.ReLU(), Normed(32, 32, 3, bias=False), conv(32, 4)
    model, x = nn.Sequential(*layers).eval(), torch.randn(1, 3, 12, 12)
    randomise_norms(model)
    result = fxlean.prune(model, 0.5, x, granularity="channel", of="parameters", method="l1")
    small = check(model, x, torch.randn(2, 3, 15, 13))
    assert sum(p.numel() for p in small.parameters()) == result.left["parameters"][0]
    assert small[0].total_ops.shape == (1,)


class Mlp(nn.Module):
    """Pointwise layers as linear ones, with the channels last."""

    def __init__(self, hidden=32):
        super().__init__()
        self.first, self.last = nn.Linear(8, hidden), nn.Linear(hidden, 8)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = self.last(nn.functional.gelu(self.first(x)))
        return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("constant", [False, True])
def test_hidden_features_of_linear_layers_with_the_channels_last(constant):
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), Mlp(), conv(8, 2)).eval()
    kill(model[1].first)
    with torch.no_grad():
        model[1].first.weight[:3] = 0  # a bias is left
        model[1].last.weight[:3] *= not constant
    small = check(model, torch.randn(2, 3, 9, 9), torch.randn(3, 3, 9, 11))
    assert (small[1].first.out_features, small[1].last.in_features) == (16, 16)


def test_a_linear_layer_selects_along_the_last_dimension():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    places = torch.tensor([0, 3])
    selected = Selected(layer, torch.tensor([1, 2, 5]), places, 4)
    x = torch.randn(2, 5, 7, 6)
    found = selected(x)
    assert torch.equal(found[..., places], layer(x[..., [1, 2, 5]]))
    assert found.shape == (2, 5, 7, 4)
    assert not found[..., 1:3].any()


class Halves(nn.Module):
    """The halves of a value, each through a layer of its own."""

    def __init__(self):
        super().__init__()
        self.left, self.right = conv(16, 4), conv(16, 4)

    def forward(self, x):
        left, right = x.chunk(2, 1)
        return torch.cat([self.left(left.relu()), self.right(right.sigmoid())], 1)


def shuffled(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@pytest.mark.parametrize(
    ("behind", "dead"),
    [
        (Halves(), torch.arange(32) % 16 < 8),
        (nn.Sequential(nn.ChannelShuffle(2), conv(32, 4)), torch.arange(32) % 16 < 8),
        (nn.Sequential(Apply(shuffled), conv(32, 4)), torch.arange(32) % 16 < 8),
        (nn.Sequential(nn.PixelShuffle(2), conv(8, 4)), torch.arange(32) % 8 < 4),
        (nn.Sequential(nn.PixelUnshuffle(2), conv(128, 4)), DEAD),
        (nn.Sequential(nn.ConvTranspose2d(32, 8, 3, groups=4), conv(8, 4)), torch.arange(32) < 16),
        (nn.Sequential(nn.ConvTranspose2d(32, 32, 3, groups=32), conv(32, 4)), DEAD),
        (nn.Sequential(nn.GLU(1), conv(16, 4)), torch.arange(32) % 16 < 8),
    ],
)
def test_parts_that_lose_the_same_channels(behind, dead):
    torch.manual_seed(0)
    first = nn.Conv2d(3, 32, 3)
    model = nn.Sequential(first, behind).eval()
    kill(first, dead=dead)
    for layer in behind.modules():  # what lies behind a dead channel is dead, biases included
        if isinstance(layer, nn.ConvTranspose2d):
            with torch.no_grad():
                layer.bias.zero_()
        elif isinstance(layer, nn.Conv2d) and isinstance(behind, Halves):
            with torch.no_grad():
                layer.weight[:, :8] = 0
    small = check(model, torch.randn(2, 3, 12, 12), torch.randn(3, 3, 14, 12))
    assert small[0].out_channels == 16


class Hard(nn.Module):
    """A split with its sizes written into the code."""

    def forward(self, x):
        left, right = x.split([16, 16], 1)
        return left * right


def test_where_sizes_do_not_follow_the_rest_is_cut_all_the_same():
    torch.manual_seed(0)
    first, inner = nn.Conv2d(3, 32, 3), nn.Conv2d(16, 32, 3)
    model = nn.Sequential(
        first, Hard(), inner, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 2)
    ).eval()
    kill(first, inner)
    small = check(model, torch.randn(2, 3, 12, 12), torch.randn(3, 3, 12, 12))
    assert (small[0].out_channels, small[2].out_channels) == (32, 16)


class Deep(nn.Module):
    """A weight computed in many steps, each of which reads the one before twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.scale, self.last = conv(3, 8), nn.Parameter(torch.ones(8)), conv(8, 2)

    def forward(self, x):
        c = self.scale
        for _ in range(60):
            c = (c + c.sin()) / 2
        return self.last(nn.functional.group_norm(self.conv(x), 2, c))


def test_layers_behind_a_constant_are_found_in_the_time_of_its_graph():
    began = time.perf_counter()
    compact(Deep().eval(), torch.randn(1, 3, 8, 8))
    assert time.perf_counter() - began < 60


@pytest.mark.filterwarnings("ignore:.* keeps its size, for its:fxlean.CompactionWarning")
@pytest.mark.parametrize("resizes", [False, True])
def test_a_registered_operator_is_followed_if_it_resizes(resizes, monkeypatch):
    monkeypatch.setattr(table, "RULES", dict(table.RULES))
    monkeypatch.setattr(table, "RESIZES", dict(table.RESIZES))
    fxlean.register(torch.ops.aten._cdist_forward, rules.movements.same, resizes=resizes)
    torch.manual_seed(0)
    first = nn.Conv2d(3, 32, 3)
    model = nn.Sequential(first, Apply(lambda x: torch.cdist(x, x)), conv(32, 4)).eval()
    kill(first)
    small = check(model, torch.randn(2, 3, 12, 12), torch.randn(3, 3, 14, 14))
    assert small[0].out_channels == (16 if resizes else 32)
