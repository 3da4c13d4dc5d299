"""Which layers can be cut, and what stays around those that cannot."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxlean.compaction.rules import FOLLOW
from fxlean.compaction.solve import solve
from fxlean.compaction.walk import owners_of, slots_of
from fxlean.tracing.tracer import trace_model

IMAGE = torch.zeros(1, 3, 9, 9)


class Own(nn.Module):
    """A convolution of its own, or what `Borrows` reads."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.weight)


class Borrows(nn.Module):
    """The weight of a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return F.conv2d(x, self.inner.weight)


def shares(layer):
    other = nn.Conv2d(8, 8, 1)
    other.weight = layer.weight
    return nn.Sequential(layer, other)


@pytest.mark.parametrize(
    ("build", "owned"),
    [
        (lambda: nn.Conv2d(8, 8, 1), ["1.weight", "1.bias"]),
        (lambda: nn.BatchNorm2d(8), [f"1.{name}" for name in nn.BatchNorm2d(8).state_dict()]),
        (Own, []),
        (Borrows, []),
        (lambda: shares(nn.Conv2d(8, 8, 1)), ["1.0.bias", "1.1.bias"]),
    ],
)
def test_a_layer_owns_what_it_alone_has_if_it_is_a_module_that_is_called(build, owned):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), build()).eval()
    owners = owners_of(model, trace_model(model, IMAGE))
    assert {name for name in owners if name.startswith("1.")} == set(owned)


class Penalised(nn.Module):
    """A middle layer whose weight something else reads."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x):
        return self.last(self.middle(self.first(x))) + self.middle.weight.sum()


def test_what_a_refused_layer_reads_and_writes_stays():
    model = Penalised()
    with torch.no_grad():
        model.middle.weight[:, 1:] = 0
        model.last.weight[:, 1:] = 0
    slots = slots_of(model, trace_model(model, IMAGE), FOLLOW[0])
    kept = solve(slots)
    first, last = slots.applications
    assert kept(first.result.slots).all()
    assert kept(last.source.slots).all()
