"""Slots as rules build them."""

import numpy as np
import pytest
import torch

import fxlean
from fxlean.channels.flow import make_flow, scalar_gain
from fxlean.channels.graph import Kind
from fxlean.compaction.rules import FOLLOW
from fxlean.compaction.slots import Slots
from fxlean.compaction.walk import slots_of
from fxlean.tracing.tracer import trace_model
from tests.support.zoo import make


def flow_of(slots, zero):
    ids = slots.new(torch.tensor(zero)).reshape(1, -1)
    return make_flow(ids, scalar_gain(2), (3, len(zero)))


def pinned(slots, numbers):
    return torch.isin(numbers, torch.cat(slots.pinned)).tolist()


def test_channels_with_edges_of_their_own_stay_and_so_does_what_they_depend_on():
    slots = Slots()
    sources = slots.new(torch.zeros(3, dtype=torch.bool))
    targets, lengths = np.array([0, 1]), np.ones(2)
    made = slots.add_rows(Kind.SUM, targets, sources[:2].numpy(), lengths, 2)
    assert pinned(slots, made) == [True, True]
    assert pinned(slots, sources) == [True, True, False]


@pytest.mark.parametrize("build", [Slots.hub, lambda slots, ids: slots.opaque("name", ids)])
def test_a_hub_stays_and_so_does_what_it_depends_on(build):
    slots = Slots()
    sources = slots.new(torch.zeros(3, dtype=torch.bool))
    assert pinned(slots, build(slots, sources[1:])) == [True]
    assert pinned(slots, sources) == [False, True, True]


@pytest.mark.parametrize(
    ("kind", "zero"),
    [
        (Kind.SUM, [True, False, False, False]),
        (Kind.PRODUCT, [True, True, True, False]),
        (Kind.LIVE, [False, False, False, False]),
    ],
)
def test_which_joined_slots_are_zero(kind, zero):
    slots = Slots()
    flows = [flow_of(slots, [True, True, False, False]), flow_of(slots, [True, False, True, False])]
    joined = slots.join(kind, flows, (3, 4))
    assert slots.is_zero(joined.ids)[0].tolist() == zero
    derived = slots.derive(kind, flows[0])
    assert slots.is_zero(derived.ids)[0].tolist() == [kind != Kind.LIVE] * 2 + [False] * 2


def test_what_is_broadcast_to_the_channels_of_another_stays():
    slots = Slots()
    wide, narrow = flow_of(slots, [False] * 4), slots.new(torch.tensor([False]))
    slots.join(Kind.SUM, [wide, make_flow(narrow, scalar_gain(2), (3, 1))], (3, 4))
    assert pinned(slots, narrow) == [True]
    assert not any(pinned(slots, wide.ids[0]))


@pytest.mark.parametrize("name", ["strided", "grouped", "u_net", "three_dimensional"])
def test_the_work_of_all_layers_is_that_of_the_report(name):
    model, inputs = make(name)
    slots = slots_of(model, trace_model(model, inputs), FOLLOW[0])
    work = sum(applied.work * applied.nonzero.numel() for applied in slots.applications)
    assert work == fxlean.report(model, inputs).macs
