"""What calls are read as, against running their operators."""

import itertools

import pytest
import torch

from fxlean.channels.calls import (
    BatchNorm,
    Convolution,
    Linear,
    as_numbers,
    nonzero_kernels,
    read_call,
    sample,
    vanishes,
)
from tests.support.calls import IMAGE, LINE, MATRIX, sparse
from tests.support.sites import place

aten = torch.ops.aten
FOUR = [sparse(4, seed=seed) + 0.3 for seed in range(3)]
VARIANCE = torch.tensor([0.01, 0.5, 1.0, 2.0])
POINTWISE = [
    (aten.add.Tensor, (IMAGE, IMAGE)),
    (aten.add.Tensor, (IMAGE, 1.0)),
    (aten.mul.Tensor, (IMAGE, IMAGE)),
    (aten.div.Tensor, (IMAGE, IMAGE)),
    (aten.maximum.default, (IMAGE, IMAGE)),
    (aten.atan2.default, (IMAGE, IMAGE)),
    (aten.addcmul.default, (IMAGE, IMAGE, IMAGE)),
    (aten.pow.Tensor_Tensor, (IMAGE, IMAGE)),
    (aten.relu.default, (IMAGE,)),
    (aten.cos.default, (IMAGE,)),
    (aten.sin.default, (IMAGE,)),
    (aten.eq.Tensor, (IMAGE, IMAGE)),
]


def placed(operator, args):
    return place(operator, args, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("affine", [FOUR[:2], [None, None], [FOUR[0], None], [None, FOUR[1]]])
def test_a_batch_norm_scales_and_shifts_each_channel(affine):
    args = (IMAGE, *affine, FOUR[2], VARIANCE, False, 0.1, 0.003)
    site = placed(aten.native_batch_norm.default, args)
    call = read_call(site.node)
    assert isinstance(call, BatchNorm)
    scale, shift = (part.reshape(1, -1, 1, 1) for part in call.affine(site.value, 4))
    data, result = call.data.meta["val"], site.node.meta["val"][0]
    torch.testing.assert_close((scale * data + shift).float(), result)


def test_complex_numbers_count_by_their_magnitude():
    assert as_numbers(torch.tensor([3j, -4.0])).tolist() == [3.0, 4.0]


def test_with_statistics_of_the_batch_only_weight_and_bias_are_known():
    args = (IMAGE, *FOUR[:2], FOUR[2], VARIANCE, True, 0.1, 0.003)
    site = placed(aten.native_batch_norm.default, args)
    scale, shift = read_call(site.node).affine(site.value, 4)
    assert torch.equal(scale.float(), FOUR[0])
    assert torch.equal(shift.float(), FOUR[1])


def holed(*shape):
    """A sparse weight, of whose kernels some are zero in part."""
    tensor = sparse(*shape)
    tensor.view(-1)[::3] = 0
    return tensor


WEIGHTED = [
    (
        aten.convolution.default,
        (data, holed(*shape), None, [1], [0], [1], transposed, [0], groups),
    )
    for data in [LINE]
    for shape, transposed, groups in [
        ((6, 4, 2), False, 1),
        ((6, 2, 2), False, 2),
        ((4, 6, 2), True, 1),
        ((4, 3, 2), True, 2),
    ]
] + [
    (aten.mm.default, (MATRIX, sparse(4, 6))),
    (aten.addmm.default, (sparse(6), MATRIX, sparse(4, 6))),
]


@pytest.mark.parametrize(("operator", "args"), WEIGHTED)
def test_kernels_that_are_not_zero_are_those_that_change_the_result(operator, args):
    site = placed(operator, args)
    call = read_call(site.node)
    assert isinstance(call, Convolution | Linear)
    rows, width = 6, 4 // call.groups
    nonzero = nonzero_kernels(call, site.value(call.weight))
    assert nonzero.shape == (rows, width)
    for column in range(4):
        data = torch.zeros_like(call.data.meta["val"])
        data[:, column] = torch.rand(data[:, column].shape) + 0.1
        given = [
            data if arg is call.data else getattr(arg, "meta", {"val": arg})["val"]
            for arg in site.node.args
        ]
        result = operator(*given)
        if call.bias is not None:
            result = result - site.value(call.bias)
        changed = result.abs().gt(1e-6).transpose(0, 1).flatten(1).any(1)
        group = column // width
        expected = torch.zeros(rows, dtype=torch.bool)
        part = slice(group * rows // call.groups, (group + 1) * rows // call.groups)
        expected[part] = nonzero[part, column % width]
        assert torch.equal(changed, expected)


@pytest.mark.parametrize(("operator", "args"), POINTWISE, ids=[str(op) for op, _ in POINTWISE])
def test_a_result_vanishes_where_it_is_zero_whatever_the_other_operands_are(operator, args):
    site = placed(operator, args)
    operands = site.nodes()
    numbers = [0.0, *torch.linspace(-3, 3, 7).add(0.01).tolist()]
    for chosen in itertools.product([False, True], repeat=len(operands)):
        zero = {operand for operand, is_zero in zip(operands, chosen, strict=True) if is_zero}
        values = [[0.0] if operand in zero else numbers for operand in operands]
        results = [
            sample(site.node, dict(zip(operands, each, strict=True)), site.constants.value)
            for each in itertools.product(*values)
        ]
        expected = not any(result.nan_to_num(0.0).any() for result in results)
        assert vanishes(site.node, zero, operands, site.constants.value) is expected
