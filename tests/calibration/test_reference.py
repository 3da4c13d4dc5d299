"""What tells the unpruned network: its fingerprint."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxlean.calibration import reference
from fxlean.calibration.reference import fingerprint

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8)


def holder(values):
    model = nn.Module()
    model.register_buffer("values", values)
    return model


@given(st.data(), st.sampled_from(TYPES), st.integers(1, 40))
def test_any_bit_counts(data, dtype, size):
    values = torch.randint(0, 9, (size,)).to(dtype)
    bits = values.view(torch.uint8)
    byte = data.draw(st.integers(0, len(bits) - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK", data.draw(st.sampled_from([1, 8, 2**16])))
        before = fingerprint(holder(values))
        bits[byte] ^= 1 << data.draw(st.integers(0, 7))
        assert fingerprint(holder(values)) != before


@given(st.permutations(range(6)), st.sampled_from(TYPES))
def test_the_order_of_values_counts(order, dtype):
    values = torch.arange(6).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK", 4)
        same = fingerprint(holder(values[order])) == fingerprint(holder(values))
    assert same == (order == list(range(6)))


def test_values_are_told_apart_from_their_layout():
    values = torch.randn(4, 6)
    assert fingerprint(holder(values.T)) == fingerprint(holder(values.T.contiguous()))
    assert fingerprint(holder(values.T)) != fingerprint(holder(values))
    assert fingerprint(holder(torch.empty(0))) != fingerprint(holder(torch.ones(())))
