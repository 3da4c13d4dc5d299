"""Moving small tensors of ids, against the same operator on tensors of the full size."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fxlean.channels.flow import Flow, _aligned, distinct, make_flow, move, reduce_to, reshape

sizes = st.integers(0, 4) | st.just(1)
shapes = st.lists(sizes, max_size=4).map(tuple)


@st.composite
def flows(draw, shape):
    """A flow whose ids and gains vary along some of the dimensions, and may repeat themselves."""

    def vary():
        size = [draw(st.sampled_from([1, length])) for length in shape]
        count = math.prod(size)
        values = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
        return torch.tensor(values, dtype=torch.int64).reshape(size)

    return make_flow(vary(), vary().double(), shape)


@st.composite
def reshapes(draw):
    """A flow, and another shape with as many elements."""
    factors = draw(st.lists(sizes, max_size=5))

    def grouped():
        cuts = sorted(draw(st.lists(st.integers(0, len(factors)), max_size=3)))
        ends = [0, *cuts, len(factors)]
        return tuple(math.prod(factors[a:b]) for a, b in pairwise(ends))

    return draw(flows(grouped())), grouped()


def full(flow: Flow) -> list[torch.Tensor]:
    return [flow.ids.expand(flow.shape), flow.gain.expand(flow.shape)]


def assert_equals(result: Flow, expected: list[torch.Tensor]) -> None:
    """The flow is what the operator made of full tensors, and as small as it can be."""
    assert result.shape == tuple(expected[0].shape)
    for small, large in zip((result.ids, result.gain), expected, strict=True):
        assert torch.equal(small.expand(result.shape), large)
        for dim, size in enumerate(small.shape):
            assert size == 1 or large.shape[dim] == size
            if size > 1:
                assert (large != large.narrow(dim, 0, 1)).any()


@given(reshapes())
def test_reshape_equals_the_reshape_of_full_ids(drawn):
    flow, shape = drawn
    assert_equals(reshape(flow, shape), [tensor.reshape(shape) for tensor in full(flow)])


@given(shapes, shapes)
def test_aligned_dimensions_have_equal_products(old, new):
    assume(math.prod(old) == math.prod(new))
    runs = _aligned(old, new)
    assert [dim for left, _ in runs for dim in left] == list(range(len(old)))
    assert [dim for _, right in runs for dim in right] == list(range(len(new)))
    if math.prod(old):
        for left, right in runs:
            assert math.prod(old[d] for d in left) == math.prod(new[d] for d in right)


def test_aligned_dimensions_are_as_few_as_can_be():
    assert _aligned((1, 6, 4), (1, 2, 3, 4)) == [([0], [0]), ([1], [1, 2]), ([2], [3]), ([], [])]
    assert _aligned((2, 12, 5), (24, 5)) == [([0, 1], [0]), ([2], [1]), ([], [])]


@st.composite
def joined_flows(draw):
    """Two or three flows that differ in size along one dimension only, and that dimension."""
    shape = list(draw(st.lists(sizes, min_size=1, max_size=3)))
    dim = draw(st.integers(0, len(shape) - 1))
    lengths = draw(st.lists(sizes, min_size=2, max_size=3))
    each = [(*shape[:dim], length, *shape[dim + 1 :]) for length in lengths]
    return [draw(flows(size)) for size in each], dim


@given(joined_flows())
def test_move_along_a_dimension_equals_the_operator_on_full_ids(drawn):
    parts, dim = drawn
    expected = [torch.cat(tensors, dim) for tensors in zip(*map(full, parts), strict=True)]
    assert_equals(move(parts, lambda t: torch.cat(t, dim), expected[0].shape, [dim]), expected)


@given(st.data(), st.lists(sizes, min_size=1, max_size=4).map(tuple))
def test_move_of_dimensions_and_of_all_equal_the_operator_on_full_ids(data, shape):
    flow = data.draw(flows(shape))
    order = data.draw(st.permutations(range(len(shape))))
    for apply, dims in ((lambda t: t[0].permute(order), []), (lambda t: t[0].flatten(), None)):
        expected = [apply([tensor]) for tensor in full(flow)]
        assert_equals(move([flow], apply, expected[0].shape, dims), expected)


@given(shapes.flatmap(flows))
def test_make_flow_compresses_and_adds_dimensions(flow):
    leading = make_flow(*full(flow), (1, *flow.shape))
    assert_equals(leading, [tensor[None] for tensor in full(flow)])


@given(st.lists(st.integers(-2, 3), max_size=9))
def test_distinct_numbers_and_their_places(numbers):
    values, places = distinct(torch.tensor(numbers, dtype=torch.int64))
    assert values.tolist() == sorted(set(numbers))
    assert values[places].tolist() == numbers


@pytest.mark.parametrize("like", [(1, 3), (2, 1), (1, 1), (1,), (3,)])
def test_reduce_to_combines_where_the_other_does_not_vary(like):
    tensor = torch.tensor([[1.0, 5.0, 2.0], [4.0, 3.0, 0.0]])
    small = reduce_to(tensor, torch.zeros(like), torch.amax)
    assert (small.expand(2, 3) >= tensor).all()
    assert set(small.flatten().tolist()) <= set(tensor.flatten().tolist())
    assert small.numel() == torch.zeros(like).numel()
