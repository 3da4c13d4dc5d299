"""Which slots are kept: no more than must be."""

import pytest
import torch
from torch import nn

import fxlean
from fxlean.compaction import cut, solve
from fxlean.compaction.cut import part_of, shrink
from fxlean.compaction.plan import layers_of
from fxlean.compaction.rules import FOLLOW
from fxlean.compaction.verify import difference, outputs
from fxlean.compaction.walk import slots_of
from fxlean.masking import remove_masks
from fxlean.tracing.sandbox import copied
from fxlean.tracing.tracer import trace_model
from tests.support.oracles import RecordConvolutions
from tests.support.zoo import ZOO, make

pytestmark = pytest.mark.filterwarnings("ignore::fxlean.PruneWarning")


def built(model, slots, kept):
    """The model cut to the slots that are kept."""
    result = copied(model)
    for name, ((dim, channels), *_) in slots.tensors.items():
        cut.narrow_tensor(result, name, dim, kept(channels))
    for name, applications in layers_of(slots).items():
        module = result.get_submodule(name)
        smaller = shrink(module, part_of(applications, kept))
        if smaller is not module:
            parent, _, child = name.rpartition(".")
            setattr(result.get_submodule(parent), child, smaller)
    return result


def goes(model, slots, kept, inputs, expected):
    """Whether the model computes the same with these slots alone."""
    try:
        with RecordConvolutions(leaky=True):  # a ReLU would hide what is missing
            return not difference(built(model, slots, kept), [inputs], expected)
    except ValueError:  # a layer without channels
        return False


def without(kept, label, number):
    return lambda slots: kept(slots) & (label[slots] != number)


def test_a_layer_that_feeds_itself_keeps_all_that_it_reads():
    layer = nn.Conv2d(4, 4, 1, bias=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer, layer, nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.ones(3), 1)[:, :, None, None])
        model[3].weight[:, 1:] = 0
    slots = slots_of(model, trace_model(model, torch.zeros(1, 3, 4, 4)), FOLLOW[0])
    kept = solve.solve(slots)
    for applied in slots.applications:
        read = applied.columns_read(kept(applied.result.slots) & ~applied.result.zero)
        assert kept(applied.source.slots)[read].all()


def test_zeros_that_stay_need_nothing_to_be_read():
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 1, groups=8, bias=False))
    with torch.no_grad():
        model[0].weight[2:] = 0
    slots = slots_of(model, trace_model(model, torch.zeros(1, 3, 4, 4)), FOLLOW[0])
    kept = solve.solve(slots)
    first, second = slots.applications
    assert kept(second.result.slots).all()
    assert kept(first.result.slots).tolist() == [True] * 2 + [False] * 6


@pytest.mark.parametrize(("single", "count"), [(5, 32), (0, 30)])
def test_only_where_single_kernels_are_zero_is_a_layer_filled_up(single, count):
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), nn.Conv2d(64, 4, 1)).eval()
    with torch.no_grad():
        model[2].weight[:, 30:] = 0
        model[2].weight[0, :single] = 0
    slots = slots_of(model, trace_model(model, torch.zeros(1, 3, 4, 4)), FOLLOW[0])
    kept = solve.solve(slots, fill=solve.is_ragged(slots, solve.solve(slots)))
    found = [int(kept(applied.result.slots).sum()) for applied in slots.applications]
    assert found == [count, count, 4]


# What an operator without a rule reads is kept, whether or not it matters.
@pytest.mark.parametrize("name", sorted(set(ZOO) - {"opaque"}))
def test_no_further_set_of_linked_slots_can_go(name, monkeypatch):
    # Without what is kept because fewer channels would not be faster.
    for module in (solve, cut):
        monkeypatch.setattr(module, "fill_up", lambda chosen, among: chosen)
    model, inputs = make(name, torch.float64)
    fxlean.prune(model, 0.4, inputs, method="l1")
    remove_masks(model)
    slots = slots_of(model, trace_model(model, inputs), FOLLOW[0])
    kept, label = solve.solve(slots, fill=True), solve.components(slots)
    with RecordConvolutions(leaky=True):
        expected = outputs(model, [inputs])
    assert goes(model, slots, kept, inputs, expected)
    pinned = {int(number) for numbers in slots.pinned for number in label[numbers]}
    everything = torch.arange(slots.count)
    for number in set(label[everything[kept(everything)]].tolist()) - pinned:
        assert not goes(model, slots, without(kept, label, number), inputs, expected)
