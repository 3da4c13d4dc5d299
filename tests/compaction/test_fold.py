"""Batch norms in the convolutions before them."""

import pickle

import pytest
import torch
from torch import nn

import fxlean
from fxlean import compact
from tests.support.blocks import conv
from tests.support.compare import worst_error
from tests.support.zoo import ZOO, make, randomise_norms

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* keeps its size, for (every|its):fxlean.CompactionWarning",
    "ignore::fxlean.PruneWarning",
)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_batch_norms_fold_into_convolutions_where_nothing_is_to_be_trained(name):
    model, inputs = make(name, torch.float64)
    fxlean.prune(model, 0.5, inputs, method="path")
    trainable = compact(model, inputs)
    frozen = compact(model.requires_grad_(False), inputs)
    assert worst_error(frozen(*inputs), model(*inputs)) < 1e-10

    def norms(network):
        return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())

    if name in {"plain", "residual", "concat", "depthwise", "transposed"}:
        assert norms(frozen) == 0 < norms(trainable)
    assert norms(frozen) <= norms(trainable)


def test_a_batch_norm_stays_where_something_else_reads_the_convolution():
    class Peeking(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = conv(3, 4), nn.BatchNorm2d(4), conv(4, 2)

        def forward(self, x):
            y = self.conv(x)
            return self.last(self.norm(y) * y.sigmoid())

    model, x = Peeking().eval().requires_grad_(False), torch.randn(1, 3, 8, 8)
    frozen = compact(model, x)
    assert any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    assert worst_error(frozen(x), model(x)) < 1e-5


def test_layers_under_two_names_are_folded_under_both():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = conv(3, 4), nn.BatchNorm2d(4), conv(4, 2)
            self.body = nn.Sequential(self.conv, self.norm)

        def forward(self, x):
            return self.last(self.body(x))

    model, x = Named().eval().requires_grad_(False), torch.randn(1, 3, 8, 8)
    randomise_norms(model)
    frozen = compact(model, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    assert frozen.conv is frozen.body[0]
    assert worst_error(frozen(x), model(x)) < 1e-5


class Activated(nn.BatchNorm2d):
    """A batch norm that brings an activation along, as those of timm do."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return 2 * self.act(super().forward(x))


class Undecided(nn.BatchNorm2d):
    """A batch norm that Python has to look at numbers for."""

    def forward(self, x):
        x = super().forward(x)
        return -x if x.shape[0] > 100 else x


class Padded(nn.Conv2d):
    """A convolution with a forward pass of its own."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 0, 1, 0)))


@pytest.mark.parametrize(("norm", "folds"), [(Activated, True), (Undecided, False)])
def test_subclasses_are_folded_and_what_else_they_do_stays(norm, folds):
    torch.manual_seed(0)
    model = nn.Sequential(Padded(3, 8, 3), norm(8), conv(8, 2)).eval().requires_grad_(False)
    randomise_norms(model)
    x = torch.randn(2, 3, 9, 9)
    frozen = compact(model, x)
    assert worst_error(frozen(x), model(x)) < 1e-5
    assert any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules()) is not folds
    assert worst_error(pickle.loads(pickle.dumps(frozen))(x), model(x)) < 1e-5
