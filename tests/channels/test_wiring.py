"""What is built of channels and edges, on graphs small enough to write down."""

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from fxlean.channels.builder import ZERO, Bias
from fxlean.channels.flow import make_flow, scalar_gain
from fxlean.channels.graph import Kind
from fxlean.channels.rules.table import rule_for
from fxlean.channels.wiring import Wiring
from tests.support.calls import IMAGE
from tests.support.sites import site_of

aten = torch.ops.aten
ONES = torch.ones(4)


def finished(wiring):
    return wiring.finish(torch.zeros(0, dtype=torch.int64), {}, torch.zeros(0).bool())


def edges(graph, channel):
    """(source, length) of every edge into a channel."""
    start, first = graph.source_start[channel], graph.length_start[channel]
    size = graph.sizes[channel]
    sources, lengths = graph.sources[start : start + size], graph.lengths[first : first + size]
    return list(zip(sources.tolist(), lengths.tolist(), strict=True))


def test_of_several_edges_between_two_channels_the_longest_counts():
    wiring = Wiring()
    one, two = wiring.add_channels(Kind.LIVE, 2).tolist()
    targets, sources = np.array([1, 0, 0, 0]), np.array([two, two, one, one])
    rows = wiring.add_rows(Kind.SUM, targets, sources, np.array([5.0, 2.0, 1.0, 3.0]), 3)
    graph = finished(wiring)
    found = [edges(graph, channel) for channel in rows.tolist()]
    assert found == [[(one, 3.0), (two, 2.0)], [(two, 5.0)], []]


def followed(operator, *args):
    """The kind of every channel of an operator's result, for an image of four live channels."""
    wiring = Wiring()
    first = wiring.add_channels(Kind.LIVE, 4)

    def flow_of(value):
        return make_flow(first.reshape(1, 4, 1, 1), scalar_gain(4), value.shape)

    site = site_of(operator, (IMAGE, *args), torch.Generator().manual_seed(0), wiring, flow_of)
    result = rule_for(operator)(site)
    flow = result[0] if isinstance(result, tuple) else result
    kinds = finished(wiring).kinds
    return [Kind(kinds[channel]) for channel in flow.ids.reshape(-1).tolist()], wiring


@pytest.mark.parametrize(
    ("bias", "kind"),
    [
        (None, Kind.SUM),
        (torch.zeros(4), Kind.SUM),
        (ONES, Kind.LIVE),
        (Parameter(ONES.clone()), Kind.SUM),
    ],
)
def test_a_bias_that_no_mask_drops_makes_channels_live(bias, kind):
    size = [1, 1], [0, 0], [1, 1]
    args = (torch.ones(4, 4, 1, 1), bias, *size, False, [0, 0], 1)
    wiring = followed(aten.convolution.default, *args)[1]
    assert wiring._kinds[-1].tolist() == [kind] * 4
    assert len(wiring.biases) == isinstance(bias, Parameter)


def test_a_bias_of_the_zero_channel_is_live_though_masks_could_drop_it():
    wiring = Wiring()
    ids = torch.cat([torch.tensor([ZERO]), wiring.add_channels(Kind.LIVE, 1)])
    bias = Bias(torch.ones(2), [("bias", torch.arange(2))])
    shifted = wiring.shift(make_flow(ids, scalar_gain(1), (2,)), bias).ids
    assert shifted[1] == ids[1]
    assert finished(wiring).kinds[shifted[0]] == Kind.LIVE
    ((name, index, channels),) = wiring.biases
    assert (name, index.tolist(), channels.tolist()) == ("bias", [1], [int(ids[1])])


@pytest.mark.parametrize(("masked", "bias"), [(True, ONES), (False, ONES), (False, 0 * ONES)])
def test_what_a_batch_norm_finds_constant_is_dead_if_masks_can_drop_it(masked, bias):
    affine = [Parameter(tensor.clone()) if masked else tensor for tensor in (ONES, bias)]
    variance = torch.tensor([0.0, 1.0, 1e-12, 1.0])
    args = (*affine, torch.zeros(4), variance, False, 0.1, 1e-5)
    kinds, wiring = followed(aten.native_batch_norm.default, *args)
    assert kinds == ([Kind.DEAD, Kind.LIVE] * 2 if masked else [Kind.LIVE] * 4)
    assert len(wiring.biases) == 2 * masked


def test_a_derived_channel_takes_the_gain_along_its_edge():
    wiring = Wiring()
    ids = wiring.add_channels(Kind.LIVE, 2)
    flow = make_flow(ids, torch.tensor([2.0, 3.0]).double(), (2,))
    derived = wiring.derive(Kind.SUM, flow, torch.tensor([True, False]))
    assert derived.ids[1] == ids[1]
    assert derived.gain.tolist() == [1.0, 3.0]
    assert edges(finished(wiring), derived.ids[0]) == [(int(ids[0]), 2.0)]


def test_chains_run_through_what_is_opaque_and_not_through_other_hubs():
    wiring = Wiring()
    ids = wiring.add_channels(Kind.LIVE, 2)
    hub, opaque = int(wiring.hub(ids)), int(wiring.opaque("name", ids))
    graph = finished(wiring)
    assert edges(graph, hub) == [(int(number), 0.0) for number in ids]
    assert edges(graph, opaque) == [(int(number), 1.0) for number in ids]
    assert np.flatnonzero(graph.opaque).tolist() == [opaque]
    assert wiring.opaque_ops == {"name": 1}


def test_joined_channels_have_an_edge_from_each_with_its_own_gain():
    wiring = Wiring()
    ids = wiring.add_channels(Kind.LIVE, 2)
    gains = torch.tensor([2.0, 3.0]).double()
    flows = [make_flow(ids[n : n + 1], gains[n : n + 1], (1,)) for n in range(2)]
    joined = wiring.join(Kind.SUM, flows, (1,))
    assert edges(finished(wiring), joined.ids[0]) == [(int(ids[0]), 2.0), (int(ids[1]), 3.0)]


def test_channels_that_share_an_element_of_a_bias_are_of_one_group():
    wiring = Wiring()
    ids = wiring.add_channels(Kind.LIVE, 5)
    for index, channels in [([0, 1], ids[:2]), ([0, 2], ids[2:4])]:
        wiring.biases.append(("bias", torch.tensor(index), channels))
    wiring.biases.append(("other", torch.tensor([1]), ids[4:]))
    groups = torch.from_numpy(finished(wiring).ties).long()
    assert groups[ids].tolist() == ids[[0, 1, 0, 3, 4]].tolist()


@pytest.mark.parametrize("masked", [True, False])
def test_what_a_parameter_adds_to_channels_is_their_bias(masked):
    added = torch.ones(4, 1, 1)
    wiring = followed(aten.add.Tensor, Parameter(added) if masked else added)[1]
    assert len(wiring.biases) == masked
    assert finished(wiring).num_channels == 6 + 4 * (not masked)
