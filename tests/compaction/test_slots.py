"""Slots as rules build them."""

import numpy as np
import torch

from fxlean.channels.graph import Kind
from fxlean.compaction.slots import Slots


def test_channels_with_edges_of_their_own_stay_and_so_does_what_they_depend_on():
    slots = Slots()
    sources = slots.new(torch.zeros(3, dtype=torch.bool))
    targets, lengths = np.array([0, 1]), np.ones(2)
    made = slots.add_rows(Kind.SUM, targets, sources[:2].numpy(), lengths, 2)
    pinned = torch.cat(slots.pinned)
    assert torch.isin(torch.cat([sources[:2], made]), pinned).all()
    assert sources[2] not in pinned
