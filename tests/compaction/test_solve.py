"""Which slots are kept: no more than must be."""

import pytest
import torch

import fxlean
from fxlean.compaction import cut, solve
from fxlean.compaction.attempts import remove_masks
from fxlean.compaction.cut import part_of, shrink
from fxlean.compaction.plan import layers_of
from fxlean.compaction.rules import FOLLOW
from fxlean.compaction.verify import difference, outputs
from fxlean.compaction.walk import slots_of
from fxlean.tracing.sandbox import copied
from fxlean.tracing.tracer import trace_model
from tests.support.oracles import RecordConvolutions
from tests.support.zoo import ZOO, make

pytestmark = pytest.mark.filterwarnings("ignore::fxlean.PruneWarning")


def built(model, slots, kept):
    """The model cut to the slots that are kept."""
    result = copied(model)
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


@pytest.mark.parametrize("name", sorted(ZOO))
def test_no_further_set_of_linked_slots_can_go(name, monkeypatch):
    # Without what is kept because fewer channels would not be faster.
    for module in (solve, cut):
        monkeypatch.setattr(module, "fill_up", lambda chosen, among: chosen)
    model, inputs = make(name)
    fxlean.prune(model, 0.4, inputs, method="l1")
    remove_masks(model)
    slots = slots_of(model, trace_model(model, inputs), FOLLOW[0])
    kept, label = solve.solve(slots), solve.components(slots)
    with RecordConvolutions(leaky=True):
        expected = outputs(model, [inputs])
    assert goes(model, slots, kept, inputs, expected)
    pinned = {int(number) for numbers in slots.pinned for number in label[numbers]}
    everything = torch.arange(slots.count)
    for number in set(label[everything[kept(everything)]].tolist()) - pinned:
        assert not goes(model, slots, without(kept, label, number), inputs, expected)
