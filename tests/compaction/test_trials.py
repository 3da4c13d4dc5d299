"""Units that a model can do without: what its code needs whole is none of them."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlean
from fxlean.compaction import trials
from fxlean.compaction.trials import SAME, TRAINS, cut, units_of
from fxlean.tracing.tracer import trace_model
from tests.support.blocks import conv, conv_bn

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Auxiliary(nn.Module):
    """A second head in training, whose result in eval mode is computed for nothing, or not."""

    def __init__(self, always):
        super().__init__()
        self.always = always
        self.stem, self.middle, self.last = conv_bn(3, 8), conv_bn(8, 8), conv(8, 8)
        self.head, self.aux = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        found = F.relu(self.middle(F.relu(self.stem(x))))
        aux = self.aux(found) if self.always or self.training else None
        result = self.head(F.relu(self.last(found)))
        return (result, aux) if self.training else result


class Attention(nn.Module):
    """Heads of a quarter of the channels that come in, as its code counts them."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(4, width), nn.Conv2d(width, 3 * width, 1)
        self.project = nn.Conv2d(width, width, 1)

    def forward(self, x):
        samples, channels, *size = x.shape
        parts = self.qkv(self.norm(x)).reshape(samples, 3, 4, channels // 4, -1)
        query, key, value = parts.transpose(-1, -2).unbind(1)
        seen = F.scaled_dot_product_attention(query, key, value)
        return x + self.project(seen.transpose(-1, -2).reshape(samples, -1, *size))


def attentive():
    """Group norms all over, and one attention."""
    before = conv(3, 8), nn.GroupNorm(4, 8), nn.ReLU(), conv(8, 16)
    return nn.Sequential(*before, Attention(16), nn.ReLU(), conv(16, 8), nn.ReLU(), conv(8, 2))


def split():
    """Parts of a fixed size, in one place, and views whose sizes are computed in another."""

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = conv(3, 8), conv(4, 8), nn.Linear(8, 6)
            self.last = nn.Linear(6, 2)

        def forward(self, x):
            left, right = F.relu(self.first(x)).split(4, 1)
            pooled = F.relu(self.second(left + right)).mean((2, 3))
            return self.last(F.relu(self.third(pooled)).view(len(x), -1))

    return Split()


class NonLocal(nn.Module):
    """Products of matrices, viewed as what they are added to."""

    def __init__(self):
        super().__init__()
        self.first, self.second = conv(3, 16), conv(16, 16)
        self.seen = nn.Conv2d(16, 48, 1, bias=False)
        self.out, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        y = F.relu(self.second(F.relu(self.first(x))))
        query, key, value = self.seen(y).flatten(2).chunk(3, 1)
        seen = value @ (query.transpose(1, 2) @ key).softmax(-1).transpose(1, 2)
        return self.last(F.relu(y + self.out(seen.view_as(y))))


class Moved(nn.Module):
    """Code that runs with fewer channels between its layers, but does something else."""

    def __init__(self, move):
        super().__init__()
        self.move = move
        self.first, self.second, self.third = conv(3, 16), conv(16, 12), conv(12, 8)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = self.second(self.move(F.relu(self.first(x))))
        return self.last(F.relu(self.third(F.relu(y))))


def in_eights(y):
    """Every eighth channel side by side, of any number of eights."""
    return y.view(len(y), -1, 8, *y.shape[2:]).transpose(1, 2).flatten(1, 2)


def shuffled_back(y):
    """The inverse of a channel shuffle in two groups."""
    return y.view(len(y), y.shape[1] // 2, 2, *y.shape[2:]).transpose(1, 2).flatten(1, 2)


def by_width(y):
    """Divided by the root of the number of channels."""
    return y * y.shape[1] ** -0.5


def undefined(y):
    """Divided by the norm, which a channel of zeros cannot be."""
    return y / y.norm(dim=(2, 3), keepdim=True)


MODELS = {
    "in eights": (lambda: Moved(in_eights), {"first": SAME}),
    "shuffled back": (lambda: Moved(shuffled_back), {"first": SAME}),
    "by width": (lambda: Moved(by_width), {"first": SAME}),
    "undefined": (lambda: Moved(undefined), {"first": SAME}),
    "non-local": (NonLocal, {"second": SAME, "seen": "bmm"}),
    "in training": (lambda: Auxiliary(always=False), {"middle.0": TRAINS}),
    "for nothing": (lambda: Auxiliary(always=True), {"middle.0": SAME}),
    "attention": (attentive, {"3": SAME}),
    "split": (split, {"first": SAME}),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_unit_can_go_alone_and_what_cannot_is_pinned(name):
    torch.manual_seed(0)
    build, pinned = MODELS[name]
    model = build().eval()
    trace = trace_model(model, (X,))
    before = copy.deepcopy(model.state_dict())
    units = units_of(model, trace)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert units.count >= 8
    assert pinned.items() <= units.pinned.items()
    for number in range(units.count):
        smaller = cut(model, units, np.arange(units.count) == number, trace.arguments)
        assert smaller(X).shape == model(X).shape
        copy.deepcopy(smaller).train()(X)


@pytest.mark.parametrize("name", MODELS)
def test_compaction_keeps_promises_and_the_network_can_be_trained(name):
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    result = fxlean.prune(model, 0.7, X, granularity="channel", of="macs", method="l1")
    small = fxlean.compact(model, X)
    torch.testing.assert_close(small(X), model(X), rtol=1e-4, atol=1e-5)
    report = fxlean.report(small, X)
    assert (report.macs, report.parameters) == (
        result.left["macs"][0],
        result.left["parameters"][0],
    )
    assert report.macs <= 0.7 * result.left["macs"][1]
    small.train()(X)


def test_an_auxiliary_head_is_the_reason_why_a_ratio_cannot_be_reached():
    with pytest.raises(
        fxlean.ArgumentError, match=r"channels stay of .*middle\.0: the model does not"
    ):
        fxlean.shrink(Auxiliary(always=False), 0.05, X.repeat(4, 1, 1, 1), progress=False)


@pytest.mark.parametrize("seed", range(20))
def test_halving_finds_what_is_needed(seed):
    draw = random.Random(seed)
    kinds = [np.array([number]) for number in range(draw.randint(1, 40))]
    needed = set(draw.sample(range(len(kinds)), draw.randint(0, min(4, len(kinds)))))

    def problem(some):
        return SAME if needed & {int(kind[0]) for kind in some} else ""

    free = trials._without_needed(problem, kinds)
    assert {int(kind[0]) for kind in free} == set(range(len(kinds))) - needed


def test_after_many_trials_what_is_still_in_question_stays():
    asked = []

    def problem(some):
        asked.append(some)
        return SAME if any(int(kind[0]) % 2 for kind in some) else ""

    kinds = [np.array([number]) for number in range(1000)]
    free = trials._without_needed(problem, kinds)
    assert len(asked) <= trials.TRIALS + 1
    assert all(int(kind[0]) % 2 == 0 for kind in free)
