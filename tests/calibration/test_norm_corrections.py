"""Scale and shift of group and layer norms, against ordinary least squares."""

import copy

import pytest
import torch
from torch import nn

import fxlean
from tests.support.blocks import Apply, conv
from tests.support.compare import same_state, state

X = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HELD = 8  # of the samples


def network(norm):
    """A frozen convolution that lost two channels, and a norm that may change; the whole one."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 6), *norm, nn.ReLU(), conv(6, 2)).double().eval()
    for parameter in norm[len(norm) // 2].parameters():
        nn.init.normal_(parameter, 1.0)
    model[0].requires_grad_(False)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight[[0, 3]] = 0
    return model, reference


def group_norm():
    return [nn.GroupNorm(2, 6)]


def layer_norm():
    return [
        Apply(lambda x: x.permute(0, 2, 3, 1)),
        nn.LayerNorm(6),
        Apply(lambda x: x.permute(0, 3, 1, 2)),
    ]


@pytest.mark.parametrize("norm", [group_norm, layer_norm])
@torch.no_grad()
def test_every_channel_is_fitted_by_least_squares(norm):
    model, reference = network(norm())
    depth = 1 + len(norm())
    given, wanted = (net[:depth](X).transpose(0, 1).flatten(1) for net in (model, reference))
    result = fxlean.repair(model, X, reference)
    found = model[:depth](X).transpose(0, 1).flatten(1)
    fit = slice(None, -HELD * 36)
    held = slice(-HELD * 36, None)
    for ours, target, mine in zip(given, wanted, found, strict=True):
        columns = torch.stack([ours, torch.ones_like(ours)], 1)
        solved = columns @ torch.linalg.lstsq(columns[fit], target[fit]).solution
        better = (solved - target)[held].norm() < (ours - target)[held].norm()
        torch.testing.assert_close(mine, solved if better else ours)
    left = [1, 2, 4, 5]
    assert (found - wanted)[left].norm() < 0.9 * (given - wanted)[left].norm()
    assert result.after < result.before


def test_frozen_norms_stay():
    model, reference = network(group_norm())
    for net in (model, reference):
        net[1].bias.requires_grad_(False)
    before = state(model[1])
    fxlean.repair(model, X, reference)
    assert same_state(model[1].state_dict(), before)
