"""The networks that the other tests use: each runs, and is the same in every run."""

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.support.strategies import Drawn, RandomNet, networks, step
from tests.support.zoo import ZOO, make


@pytest.mark.parametrize("name", ZOO)
def test_network_runs_and_is_reproducible(name):
    first, second = ((model(*inputs), inputs) for model, inputs in (make(name), make(name)))
    for ours, theirs in zip(tree_leaves(first), tree_leaves(second), strict=True):
        assert isinstance(ours, Tensor)
        assert ours.isfinite().all()
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ZOO)
def test_network_works_in_float64(name):
    model, inputs = make(name, torch.float64)
    assert all(output.dtype == torch.float64 for output in tree_leaves(model(*inputs)))


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_every_parameter_matters(name):
    """A parameter without influence would make a test of its pruning vacuous."""
    model, inputs = make(name, torch.float64)
    before = tree_leaves(model(*inputs))
    for key, parameter in model.named_parameters():
        original = parameter.clone()
        parameter.copy_(original.flip(0) + 0.1 * original.cos())
        assert not all(map(torch.equal, before, tree_leaves(model(*inputs)))), key
        parameter.copy_(original)


def test_make_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    make("plain")
    assert torch.equal(torch.get_rng_state(), before)


@given(networks())
@settings(max_examples=50)
def test_drawn_network_runs_and_its_repr_rebuilds_it(drawn: Drawn):
    model, inputs = drawn
    output = model(*inputs)
    assert output.isfinite().all()
    rebuilt = eval(repr(model), {"RandomNet": RandomNet, "step": step})
    assert torch.equal(rebuilt(*inputs), output)
