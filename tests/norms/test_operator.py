"""Norms against dense matrices, fine grids, laws and exact cases."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxlean.errors import ArgumentError
from fxlean.norms import operator, suprema
from fxlean.norms.operator import ORDERS, operator_norms


def random_kernels(kind: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Kernels of a kind, seeded."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    mirrored = normal.flip(tuple(range(2, len(shape))))
    kinds = {
        "normal": normal,
        "positive": normal.abs(),
        "sign": normal.sign(),
        "small integer": normal.mul(1.5).round(),
        "sparse": normal * (torch.rand(shape, generator=generator) < 0.4),
        "heavy": normal**5,
        "odd": normal - mirrored,
        "even": normal + mirrored,
    }
    return kinds[kind]


KINDS = ("normal", "positive", "sign", "small integer", "sparse", "heavy", "odd", "even")


def dense_singular_values(kernel, stride, dilation, outputs):
    """Singular values of the matrix of y[p] = sum over t of w[t] x[stride p + dilation t]."""
    sizes = [outputs * s for s in stride]
    matrix = np.zeros((outputs ** len(sizes), math.prod(sizes)))
    for row, place in enumerate(np.ndindex(*[outputs] * len(sizes))):
        for tap in np.ndindex(*kernel.shape):
            read = [
                (s * p + d * t) % n
                for s, p, d, t, n in zip(stride, place, dilation, tap, sizes, strict=True)
            ]
            matrix[row, np.ravel_multi_index(read, sizes)] += kernel[tap]
    return np.linalg.svd(matrix, compute_uv=False)


def fine_norms(weight: Tensor, stride: tuple[int, ...], points: int) -> np.ndarray:
    """Largest l2 norm over the phases, on a grid by numpy's FFT."""
    axes = tuple(range(2, weight.dim()))
    total = np.zeros(1)
    for phase in itertools.product(*[range(s) for s in stride]):
        phases = [slice(p, None, s) for p, s in zip(phase, stride, strict=True)]
        part = weight.double().numpy()[tuple([slice(None), slice(None), *phases])]
        if part.size:
            total = total + np.abs(np.fft.rfftn(part, [points] * len(axes), axes)) ** 2
    return np.sqrt(total.max(axes))


DENSE = [  # size, stride, dilation, outputs per axis
    ((3,), (1,), (1,), 12),
    ((3,), (1,), (3,), 10),
    ((5,), (2,), (1,), 9),
    ((4,), (3,), (1,), 8),
    ((5,), (2,), (2,), 9),
    ((7,), (4,), (2,), 9),
    ((5,), (4,), (6,), 10),
    ((5,), (2,), (3,), 10),
    ((2,), (3,), (1,), 5),
    ((9,), (1,), (1,), 4),
    ((3, 3), (1, 1), (1, 1), 7),
    ((3, 3), (2, 2), (1, 1), 6),
    ((5, 3), (2, 1), (1, 2), 7),
    ((3, 5), (2, 4), (2, 6), 5),
    ((1, 4), (3, 2), (1, 1), 5),
    ((5, 5), (1, 1), (1, 1), 3),
    ((2, 3, 2), (1, 1, 1), (1, 1, 1), 4),
    ((3, 3, 3), (1, 2, 1), (1, 1, 1), 4),
    ((3, 2, 3), (2, 1, 2), (2, 1, 1), 3),
]


@pytest.mark.parametrize(("size", "stride", "dilation", "outputs"), DENSE)
def test_dense_matrix(size, stride, dilation, outputs):
    weight = random_kernels("normal", (1, 2, *size))
    found = {
        order: operator_norms(weight, stride, dilation=dilation, order=order, grid=outputs)[0]
        for order in ("spectral", "frobenius", "nuclear")
    }
    supremum = operator_norms(weight, stride, dilation=dilation)[0]
    for column in range(2):
        values = dense_singular_values(weight[0, column].numpy(), stride, dilation, outputs)
        assert found["spectral"][column].item() == pytest.approx(values[0], rel=1e-9)
        assert found["frobenius"][column].item() == pytest.approx(np.linalg.norm(values), rel=1e-9)
        assert found["nuclear"][column].item() == pytest.approx(values.sum(), rel=1e-7)
        assert values[0] <= supremum[column].item() * (1 + 1e-9)


@pytest.mark.parametrize(("stride", "dilation"), [*itertools.product((1, 2, 3, 4, 6), repeat=2)])
def test_supremum_of_large_dense_matrix(stride, dilation):
    weight = random_kernels("normal", (1, 1, 7), seed=stride * 7 + dilation)
    expected = dense_singular_values(weight[0, 0].numpy(), (stride,), (dilation,), 101)[0]
    assert operator_norms(weight, stride, dilation=dilation).item() == pytest.approx(
        expected, rel=1e-2
    )
    assert operator_norms(weight, stride, dilation=dilation).item() >= expected * (1 - 1e-9)


FINE = [  # size, stride, kernels, points per axis
    ((3,), (1,), 400, 2048),
    ((2,), (1,), 400, 2048),
    ((9,), (1,), 200, 4096),
    ((9,), (2,), 200, 2048),
    ((1200,), (1,), 3, 2**17),
    ((3, 3), (1, 1), 6, 768),
    ((2, 3), (1, 1), 6, 768),
    ((1, 3), (1, 1), 6, 768),
    ((5, 5), (2, 2), 6, 768),
    ((3, 3), (2, 1), 6, 768),
    ((7, 7), (4, 2), 6, 768),
    ((3, 3, 3), (2, 2, 2), 6, 64),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "stride", "count", "points"), FINE)
def test_fine_grid(size, stride, count, points, kind):
    weight = random_kernels(kind, (count, 1, *size), seed=points + count)
    expected = fine_norms(weight, stride, points)
    for dtype in (torch.float64, torch.float32):
        found = operator_norms(weight.to(dtype), stride).double().numpy()
        np.testing.assert_array_less(expected * (1 - 3e-6), found + 1e-30)
        # A grid misses a maximum by at most half its spacing along each axis.
        degrees = [(k - 1) // s for k, s in zip(size, stride, strict=True)]
        missed = 1 / math.cos(sum(degrees) * math.pi / (2 * points)) - 1
        np.testing.assert_array_less(found, expected * (1 + missed + 3e-6) + 1e-30)


BATCHES = [  # size, stride, kernels of each kind
    ((3, 3), 1, 5000),
    ((2, 3), 1, 3000),
    ((5, 5), 2, 3000),
    ((5, 5), 1, 400),
    ((9,), 1, 10000),
    ((3, 3, 3), (1, 2, 1), 400),
    ((3, 3, 3), 1, 60),
    ((5, 5, 5), 2, 40),
]


@pytest.mark.parametrize(("size", "stride", "count"), BATCHES)
def test_no_maximum_is_missed_among_thousands(size, stride, count, monkeypatch):
    weight = torch.cat([random_kernels(kind, (count, 1, *size), 3) for kind in KINDS])
    found = operator_norms(weight.float(), stride).double()
    monkeypatch.setattr(suprema, "_DENSITY", (64, 20, 12))
    monkeypatch.setattr(suprema, "_SLOPE", (0.5, 0.5, 0.5))
    monkeypatch.setattr(suprema, "_SLACK", 1.0)
    expected = operator_norms(weight, stride)
    torch.testing.assert_close(found, expected, rtol=5e-6, atol=0)


# Found by searching millions of kernels with earlier rules for where to start and how far to step.
HARD = [
    [[1.69206, -1.59755, 0.3048], [-1.55384, -4.04593, -1.55384], [0.3048, -1.59755, 1.69206]],
    [[-1.71174, -0.5937, 0.89327], [0.60018, -1.81291, 0.6979], [-0.6917, -0.56081, -1.1634]],
    [[0.52773, -1.69994, -0.65339], [-0.18439, 0.13304, -1.88444]],
]


@pytest.mark.parametrize("taps", HARD)
def test_hard_kernel(taps):
    weight = torch.tensor(taps)[None, None]
    assert operator_norms(weight).item() == pytest.approx(
        fine_norms(weight, (1, 1), 2048).item(), rel=1e-5
    )


@st.composite
def small_kernels(draw):
    """A kernel of few distinct taps, where ties and degenerate symbols are common; a stride."""
    size = draw(st.sampled_from([(3,), (5,), (3, 3), (2, 4), (4, 4), (2, 2, 2)]))
    taps = st.sampled_from([0.0, 0.0, 1.0, -1.0, 0.5, 1e-4, -3.0, 2**-0.5])
    values = draw(st.lists(taps, min_size=math.prod(size), max_size=math.prod(size)))
    stride = draw(st.tuples(*[st.integers(1, 3)] * len(size)))
    return torch.tensor(values).view(1, 1, *size), stride


@settings(max_examples=300, deadline=None, derandomize=True)
@given(small_kernels())
def test_degenerate_kernels(case):
    weight, stride = case
    points = {1: 720, 2: 240, 3: 48}[len(stride)]
    found, expected = operator_norms(weight, stride).item(), fine_norms(weight, stride, points)
    assert found >= expected.item() * (1 - 2e-6)
    assert found <= expected.item() * (1 + 5e-3)
    assert found == pytest.approx(operator_norms(weight.double(), stride).item(), rel=3e-6)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(3,), (3, 3), (5, 3), (3, 3, 3), (13, 13), (5, 5, 5), (70,)])
def test_laws(size, stride):
    weight = random_kernels("normal", (2, 3, *size), seed=len(size)).float()
    norms = operator_norms(weight, stride)
    taps = weight.flatten(2)
    l1 = operator_norms(weight, stride, order="l1")
    frobenius = operator_norms(weight, stride, order="frobenius")
    nuclear = operator_norms(weight, stride, order="nuclear")
    torch.testing.assert_close(l1, taps.abs().sum(-1))
    torch.testing.assert_close(frobenius, taps.square().sum(-1).sqrt())
    ordered = (taps.abs().amax(-1), frobenius, norms, l1)
    for lower, upper in itertools.pairwise(ordered):
        assert (lower <= upper * (1 + 1e-6)).all()
    assert (nuclear <= frobenius * (1 + 1e-3)).all()
    assert (norms <= l1 * (1 + 1e-6)).all()
    flipped = weight.flip(tuple(range(2, weight.dim())))
    torch.testing.assert_close(operator_norms(flipped, stride), norms, rtol=2e-6, atol=0)
    for factor in (-4.0, 1e-30, 1e30):
        scaled = operator_norms(weight * factor, stride)
        torch.testing.assert_close(scaled, norms * abs(factor), rtol=2e-6, atol=0)


@pytest.mark.parametrize("size", [(9,), (5, 5), (3, 3, 3)])
def test_sums_over_a_grid(size):
    weight = random_kernels("normal", (3, 2, *size))
    points = 24
    frequencies = points ** len(size)
    assert frequencies >= math.prod(size)
    l2 = operator_norms(weight, order="frobenius")
    on_grid = operator_norms(weight, order="frobenius", grid=points)
    torch.testing.assert_close(on_grid, l2 * math.sqrt(frequencies))
    symbols = torch.fft.fftn(weight, [points] * len(size), tuple(range(2, weight.dim()))).abs()
    for order, expected in (
        ("spectral", symbols.flatten(2).amax(-1)),
        ("nuclear", symbols.flatten(2).sum(-1)),
        ("frobenius", symbols.flatten(2).square().sum(-1).sqrt()),
    ):
        torch.testing.assert_close(operator_norms(weight, order=order, grid=points), expected)


@pytest.mark.parametrize(
    ("size", "points"), [((3,), 4000), ((9,), 4000), ((3, 3), 300), ((7, 7), 300), ((3, 3, 3), 60)]
)
def test_nuclear_mean(size, points):
    weight = random_kernels("normal", (10, 1, *size)).float()
    mean = operator_norms(weight, order="nuclear", grid=points) / points ** len(size)
    torch.testing.assert_close(operator_norms(weight, order="nuclear"), mean, rtol=1e-3, atol=0)


def test_average_pooling():
    assert operator_norms(torch.full((1, 1, 2, 2), 1 / 4), 2).item() == 0.5
    assert operator_norms(torch.full((1, 1, 3, 3), 1 / 9), 2).item() == pytest.approx(5 / 9)
    assert operator_norms(torch.full((1, 1, 3, 3), 1 / 9)).item() == pytest.approx(1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_tap_is_exact(order, dtype):
    pointwise = torch.tensor([[0.3, -2.0], [0.0, 1e-7]]).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for stride in (1, 2):
        found = operator_norms(pointwise[:, :, None, None], stride, order=order)
        assert torch.equal(found, pointwise.to(wide).abs())
    inside = torch.zeros(2, 2, 3, 3, dtype=dtype)
    inside[:, :, 0, 2] = pointwise
    found = operator_norms(inside, order=order)
    torch.testing.assert_close(found, pointwise.to(wide).abs(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", [None, 8])
@pytest.mark.parametrize("size", [(3,), (3, 3), (3, 3, 3), (1, 1)])
def test_zero_and_not_a_number(order, grid, size):
    weight = torch.zeros(1, 3, *size)
    weight[0, 1] = math.nan
    weight[0, 2].view(-1)[0] = 1
    zero, nan, one = operator_norms(weight, order=order, grid=grid)[0]
    assert zero.item() == 0
    assert nan.isnan()
    assert one.isfinite()
    assert one > 0


def test_positive_kernels_reach_the_sum_of_their_taps():
    weight = random_kernels("positive", (50, 4, 3, 3)).float()
    torch.testing.assert_close(operator_norms(weight), weight.sum((2, 3)), rtol=5e-7, atol=0)


@pytest.mark.parametrize("size", [(3, 3), (13, 13), (3, 3, 3), (300,)])
@pytest.mark.parametrize("order", ["spectral", "nuclear"])
def test_chunks_change_nothing(size, order, monkeypatch):
    weight = random_kernels("normal", (5, 4, *size)).float()
    whole = operator_norms(weight, order=order)
    monkeypatch.setattr(suprema, "_CPU_CHUNK", 2000)
    torch.testing.assert_close(operator_norms(weight, order=order), whole, rtol=2e-6, atol=0)
    each = [operator_norms(row[None], order=order) for row in weight]
    torch.testing.assert_close(torch.cat(each), whole, rtol=2e-6, atol=0)


@pytest.mark.parametrize("order", ["spectral", "nuclear"])
@pytest.mark.parametrize("size", [(3, 3), (5, 5, 5)])
def test_transforms_agree(size, order, monkeypatch):
    weight = random_kernels("normal", (3, 3, *size))
    usual = operator_norms(weight, order=order)
    for matrix_limit, lags_limit in itertools.product((1, 2**40), (0, 2**40)):
        monkeypatch.setattr(operator, "_MATRIX_LIMIT", matrix_limit)
        monkeypatch.setattr(operator, "_LAGS_LIMIT", lags_limit)
        torch.testing.assert_close(operator_norms(weight, order=order), usual, rtol=1e-5, atol=0)


@pytest.mark.parametrize("by_fft", [False, True])
@pytest.mark.parametrize("size", [(2,), (5,), (3, 3), (1, 4), (4, 2, 3), (3, 1, 2)])
def test_values_on_the_coarse_grid(size, by_fft, monkeypatch):
    monkeypatch.setattr(suprema, "_MATRIX_LIMIT", 0 if by_fft else 2**40)
    lags = operator._lags(size, [1] * len(size))
    squares = torch.randn(len(lags), 3, dtype=torch.float64)
    coarse = suprema.coarse_grid(lags, squares)
    assert all((matrix is None) == by_fft for matrix in coarse.transforms)
    found = suprema._coarse_values(squares, coarse)
    assert found.shape == (*coarse.extents, 3)
    for place in itertools.product(*map(range, coarse.extents)):
        shifted = zip(place, suprema._SHIFT, coarse.points, strict=False)
        turns = [(i - 1 + shift) / n for i, shift, n in shifted]
        frequency = 2 * math.pi * torch.tensor(turns, dtype=torch.float64)
        expected = (coarse.lags.double() @ frequency).cos() @ squares
        torch.testing.assert_close(found[place], expected)


@pytest.mark.parametrize("order", ORDERS)
def test_dtypes(order):
    weight = random_kernels("normal", (4, 5, 3, 3))
    expected = operator_norms(weight, order=order)
    assert expected.dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        found = operator_norms(weight.to(dtype), order=order)
        assert found.dtype == torch.float32
        rounded = operator_norms(weight.to(dtype).double(), order=order).float()
        torch.testing.assert_close(found, rounded, rtol=2e-6, atol=0)
        torch.testing.assert_close(found, expected.float(), rtol=2e-2, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", [None, 8])
@pytest.mark.parametrize("size", [(3,), (1, 1), (3, 3), (13, 13), (5, 5, 5), (70,)])
def test_only_the_number_of_starts_is_read_back_from_a_device(size, grid, order, monkeypatch):
    # The meta device stands for a GPU: nothing can be copied from it, and elementwise operators
    # refuse a tensor of the host beside one of it.
    nonzero = Tensor.nonzero

    def found(mask: Tensor) -> Tensor:
        return mask.new_empty((5, mask.dim()), dtype=torch.long) if mask.is_meta else nonzero(mask)

    monkeypatch.setattr(Tensor, "nonzero", found)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(operator, "_check_weight", lambda weight: None)
    for stride in (1, 2):
        weight = torch.empty(8, 4, *size, device="meta")
        norms = operator_norms(weight, stride, order=order, grid=grid)
        assert norms.is_meta
        assert norms.shape == (8, 4)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [(3,), (3, 3), (13, 13), (1200,)])
def test_the_default_device_changes_nothing(size, order):
    weight = random_kernels("normal", (2, 2, *size)).float()
    expected = operator_norms(weight, 1, order=order)
    with torch.device("meta"):
        assert torch.equal(operator_norms(weight, 1, order=order), expected)


def test_precision_settings_of_the_caller_change_nothing():
    weight = random_kernels("normal", (8, 8, 3, 3)).float()
    expected = operator_norms(weight)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.testing.assert_close(operator_norms(weight), expected, rtol=2e-6, atol=0)
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(operator_norms(weight), expected, rtol=2e-6, atol=0)


def test_weight_is_left_alone():
    weight = torch.nn.Parameter(random_kernels("normal", (4, 3, 3, 3)).float())
    before = weight.detach().clone()
    norms = operator_norms(weight)
    assert torch.equal(weight, before)
    assert not norms.requires_grad
    channels_last = weight.detach().to(memory_format=torch.channels_last)
    torch.testing.assert_close(operator_norms(channels_last), norms)


@pytest.mark.parametrize("shape", [(0, 3, 3, 3), (3, 0, 3), (2, 2, 0, 3)])
def test_nothing_to_measure(shape):
    assert torch.equal(operator_norms(torch.ones(shape)), torch.zeros(shape[:2]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [(3,), (3, 3), (13, 13), (3, 3, 3), (1, 1)])
def test_gpu(size):
    weight = random_kernels("normal", (16, 16, *size)).float()
    for order, grid in itertools.product(ORDERS, (None, 16)):
        found = operator_norms(weight.cuda(), order=order, grid=grid)
        assert found.is_cuda
        expected = operator_norms(weight, order=order, grid=grid)
        torch.testing.assert_close(found.cpu(), expected, rtol=3e-6, atol=0)


KERNELS = torch.ones(1, 1, 3, 3)
ERRORS = [  # weight, arguments, what the message says
    (torch.ones(2, 3), {}, r"shape \(2, 3\), without a spatial axis.*\[:, :, None\]"),
    (torch.ones(3), {}, r"shape \(3,\), without a spatial axis"),
    (torch.ones(1, 1, 3, dtype=torch.int64), {}, r"dtype torch.int64.*floating"),
    (torch.ones(1, 1, 3, dtype=torch.complex64), {}, r"dtype torch.complex64.*floating"),
    (torch.ones(1, 1, 3, device="meta"), {}, "meta device.*load the weights"),
    (KERNELS, {"stride": 0}, "stride is 0 for a weight with 2 spatial axes.*>= 1"),
    (KERNELS, {"stride": (1, -2)}, r"stride is \(1, -2\).*>= 1"),
    (KERNELS, {"stride": (1, 2, 3)}, r"stride is \(1, 2, 3\).*or 2 of them"),
    (KERNELS, {"stride": (1.5, 2)}, r"stride is \(1.5, 2\).*whole number"),
    (KERNELS, {"stride": 1.5}, r"stride is 1.5.*whole number"),
    (KERNELS, {"dilation": 0}, "dilation is 0"),
    (KERNELS, {"dilation": (2,)}, r"dilation is \(2,\).*or 2 of them"),
    (KERNELS, {"order": "fro"}, "order is 'fro'.*'spectral', 'frobenius', 'nuclear', 'l1'"),
    ("w", {}, r"^weight is a str; pass a tensor of shape \(out, in, \*size\)"),
    (KERNELS, {"grid": 0}, "grid is 0; .*>= 1"),
    (KERNELS, {"grid": 2.5}, "grid is 2.5; .*>= 1"),
]


@pytest.mark.parametrize(("weight", "arguments", "message"), ERRORS)
def test_bad_arguments(weight, arguments, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        operator_norms(weight, **arguments)
    assert isinstance(caught.value, ValueError)
