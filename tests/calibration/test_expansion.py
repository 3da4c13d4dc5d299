"""Repair of compacted networks: as if they had been repaired before."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fxlean
from fxlean.calibration.expansion import expanded, is_compacted, taken_back
from fxlean.tracing.sandbox import copied
from tests.support.calibrated import batches_like, residual_network
from tests.support.compare import same_state, state
from tests.support.zoo import ZOO, make

pytestmark = pytest.mark.filterwarnings(
    "ignore::fxlean.PruneWarning", "ignore::fxlean.CompactionWarning"
)


def compacted(name, granularity="kernel"):
    """A network, the same pruned, what compaction makes of that, and batches."""
    model, inputs = make(name)
    reference = copied(model)
    if granularity == "channel":
        fxlean.prune(model, 0.6, inputs, method="l1", granularity="channel", of="macs")
    else:
        fxlean.prune(model, 0.3, inputs, method="path")
    small = fxlean.compact(model, inputs)
    return reference, model, small, batches_like(inputs, samples=inputs[0].shape[0])


@pytest.mark.parametrize("name", ZOO)
def test_what_is_expanded_computes_the_same_and_comes_back(name):
    reference, _, small, batches = compacted(name)
    if isinstance(small, torch.fx.GraphModule):
        with pytest.raises(fxlean.ArgumentError, match="is not known"):
            expanded(small, reference, batches)
        return
    before = state(small)
    dense = expanded(small, reference, batches)
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.add_(1)
    taken_back(small, dense)
    assert same_state(small.state_dict(), before)


@pytest.mark.parametrize(
    "name",
    [
        *("residual", "residual_downsample", "strided", "nested", "u_net", "concat", "transposed"),
        *("grouped", "depthwise", "group_norm", "multi_head", "classifier"),
    ],
)
@pytest.mark.parametrize("granularity", ["kernel", "channel"])
def test_repair_and_compaction_may_change_places(name, granularity):
    reference, model, small, batches = compacted(name, granularity)
    assert is_compacted(small) or granularity == "kernel"
    result = fxlean.repair(small, batches, reference)
    expected = fxlean.repair(model, batches, reference)
    assert result.after == pytest.approx(expected.after, rel=1e-3)
    other = fxlean.compact(model, batches[0])
    with torch.no_grad():
        ours, theirs = (network(*batches[0]) for network in (small, other))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()))


def test_masks_of_a_compacted_network_stay():
    model, x = residual_network()
    reference = copy.deepcopy(model)
    fxlean.prune(model, 0.6, x[:1], granularity="channel", of="macs", method="l1")
    small = fxlean.compact(model, x[:1])
    between = copy.deepcopy(small)
    fxlean.prune(small, 0.6, x[:1], method="l1", redundancy=False)
    masks = {key: value for key, value in state(small).items() if key.endswith("_mask")}
    twin, other = copy.deepcopy(small), copy.deepcopy(small)
    result = fxlean.repair(small, x, reference)
    assert result.after < result.before
    assert all(torch.equal(small.state_dict()[key], mask) for key, mask in masks.items())
    # Without a reference it is the compacted network with its masks off.
    default, given = fxlean.repair(twin, x), fxlean.repair(other, x, between)
    assert (default.before, default.after) == (given.before, given.after)
    assert same_state(twin.state_dict(), other.state_dict())


def test_what_is_left_must_be_known():
    model, x = residual_network()
    reference = copy.deepcopy(model)
    fxlean.prune(model, 0.5, x[:1], granularity="channel", of="macs", method="l1")
    small = fxlean.compact(model, x[:1])
    before = state(small)
    with pytest.raises(fxlean.ArgumentError, match=r"no masks.*Pass that as reference"):
        fxlean.repair(small, x)
    cut = next(module for module in small.modules() if "_fxlean_kept" in vars(module))
    del vars(cut)["_fxlean_kept"]  # as in a network that was rebuilt from a file
    with pytest.raises(fxlean.ArgumentError, match=r"weight is not known.*before they are saved"):
        fxlean.repair(small, x, reference)
    assert same_state(small.state_dict(), before)


def test_a_reference_that_is_another_network():
    model, x = residual_network()
    fxlean.prune(model, 0.5, x[:1], granularity="channel", of="macs", method="l1")
    small = fxlean.compact(model, x[:1])
    other = nn.Sequential(nn.Conv2d(3, 8, 3))
    with pytest.raises(fxlean.ArgumentError, match=r"is not known\. Pass the network that was"):
        fxlean.repair(small, x, other)


def test_a_compacted_network_that_was_pruned_by_others_as_well():
    model, x = residual_network()
    reference = copy.deepcopy(model)
    fxlean.prune(model, 0.5, x[:1], granularity="channel", of="macs", method="l1")
    small = fxlean.compact(model, x[:1])
    again = fxlean.compact(small, x[:1])
    prune.l1_unstructured(small[0][0], "weight", 0.3)
    assert fxlean.repair(small, x, reference).after < fxlean.repair(again, x, reference).before


def test_compacted_networks_are_repaired_in_inference_mode():
    model, x = residual_network()
    reference = copy.deepcopy(model)
    fxlean.prune(model, 0.5, x[:1], granularity="channel", of="macs", method="l1")
    small = fxlean.compact(model, x[:1])
    twin = copy.deepcopy(small)
    fxlean.repair(small, x, reference)
    with torch.inference_mode():
        fxlean.repair(twin, x, reference)
    assert same_state(twin.state_dict(), small.state_dict())
