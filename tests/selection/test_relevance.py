"""Relevance, against the sum over all complete chains, and what is kept by it."""

import numpy as np
import pytest
import torch
from torch import nn

import fxlean
from fxlean.channels.graph import ChannelGraph, Kind
from fxlean.selection.liveness import used_kernels
from fxlean.selection.relevance import kernel_relevance, most_relevant
from tests.support.blocks import conv, conv_bn_relu, residual
from tests.support.zoo import ZOO, make

# The models whose every layer cuts the inputs from the outputs, without products and shared layers.
CUTS = [
    *("plain", "no_norm", "norm_without_affine", "strided", "dilated", "grouped", "depthwise"),
    *("transposed", "functional", "channel_shuffle", "one_dimensional", "three_dimensional"),
    *("stacked_weights", "weight_norm", "pre_pruned", "group_norm", "pixel_shuffle"),
    *("average_pool", "classifier"),
]
# Every operand of a product gets all, so a chain behind one would count once for each operand.
PRODUCTS = {
    "gated_cell",
    "halves",
    "selective",
    "expanded_gate",
    "product_gate",
    "squeeze_excite",
    "swish_gate",
}


def shares(name, **options):
    model, inputs = make(name)
    options = {"prune_outputs": True, "include_linear": True, **options}
    return fxlean.trace(model, inputs, norm="share", calibration=inputs, **options)


def over_all_chains(graph: ChannelGraph) -> np.ndarray:
    """The sum of the products of shares over all complete chains, by walking each of them."""
    scores = np.zeros(graph.num_kernels)

    def walk(channel: int, product: float, kernels: list[int]) -> None:
        if graph.kinds[channel] == Kind.DEAD:
            return
        if graph.sizes[channel] == 0:
            np.add.at(scores, kernels, product)
        for j in range(graph.sizes[channel]):
            share = graph.lengths[graph.length_start[channel] + j]
            first = graph.kernel_start[channel]
            if share > 0:
                own = [first + j] if first >= 0 else []
                source = graph.sources[graph.source_start[channel] + j]
                walk(int(source), product * share, kernels + own)

    for channel in np.flatnonzero(graph.outputs):
        walk(int(channel), 1.0, [])
    return scores


@pytest.mark.parametrize("name", sorted(set(ZOO) - PRODUCTS - {"channels_last_block"}))
def test_the_score_is_the_sum_over_all_complete_chains(name):
    graph = shares(name)
    np.testing.assert_allclose(kernel_relevance(graph), over_all_chains(graph), atol=1e-5)


@pytest.mark.parametrize("name", CUTS)
def test_relevance_is_conserved(name):
    graph = shares(name)
    scores = kernel_relevance(graph)
    for layer in graph.layers:
        assert scores[layer.kernels].sum() == pytest.approx(graph.outputs.sum(), rel=1e-4)


def test_the_branches_of_a_skip_divide_what_comes_through():
    torch.manual_seed(0)
    block = residual(conv(4, 4), conv(4, 4, 1))
    model = nn.Sequential(conv(3, 4), block, conv(4, 2, 1))
    x = torch.randn(4, 3, 8, 8)
    graph = fxlean.trace(model, x, norm="share", calibration=x, prune_outputs=True)
    first, left, right, last = (kernel_relevance(graph)[layer.kernels] for layer in graph.layers)
    total = pytest.approx(2, rel=1e-5)
    assert first.sum() == total
    assert left.sum() + right.sum() == total
    assert last.sum() == total
    assert min(left.sum(), right.sum()) > 0.1


@torch.no_grad()
def test_scaling_a_channel_up_here_and_down_there_changes_nothing():
    torch.manual_seed(0)
    first, second, last = conv(3, 4, bias=True), conv(4, 6), conv(6, 2, 1)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    before = kernel_relevance(fxlean.trace(model, x, norm="share", calibration=x))
    scale = torch.tensor([0.01, 1.0, 30.0, 1000.0], dtype=torch.float64)
    first.weight *= scale[:, None, None, None]
    first.bias *= scale
    second.weight /= scale[:, None, None]
    after = kernel_relevance(fxlean.trace(model, x, norm="share", calibration=x))
    np.testing.assert_allclose(after, before, rtol=1e-5)


def test_kernels_that_were_pruned_earlier_have_no_relevance():
    model, inputs = make("residual_downsample")
    fxlean.prune(model, 0.5, inputs, method="path")
    graph = fxlean.trace(model, inputs, norm="share", calibration=inputs, prune_outputs=True)
    scores = kernel_relevance(graph)
    assert not graph.alive.all()
    assert (scores[~graph.alive] == 0).all()
    assert (scores[graph.alive] > 0).any()


def test_the_example_that_the_documentation_draws():
    graph = ChannelGraph(
        kinds=np.array([0, 0, 1, 1, 1], dtype=np.uint8),
        sizes=np.array([0, 0, 2, 2, 2]),
        source_start=np.array([0, 0, 0, 0, 2]),
        length_start=np.array([0, 0, 0, 2, 4]),
        kernel_start=np.array([-1, -1, 0, 2, 4]),
        sources=np.arange(4, dtype=np.int32),
        lengths=np.array([0.9, 0.1, 0.2, 0.8, 0.75, 0.25], dtype=np.float32),
        outputs=np.arange(5) == 4,
        opaque=np.zeros(5, dtype=bool),
        ties=np.arange(5, dtype=np.int32),
        alive=np.ones(6, dtype=bool),
    )
    expected = [0.675, 0.075, 0.05, 0.2, 0.75, 0.25]
    np.testing.assert_allclose(kernel_relevance(graph), expected, rtol=1e-6)
    assert np.flatnonzero(most_relevant(graph, 3)).tolist() == [0, 3, 4, 5]


def drawn(seed: int) -> ChannelGraph:
    """Three layers of random shares, some of them zero, and some kernels not alive."""
    rng = np.random.default_rng(seed)
    widths = (3, 5, 6, 2)
    sizes = np.repeat([0, *widths[:-1]], widths)
    starts = np.cumsum(sizes) - sizes
    source_start = np.repeat([0, 0, 3, 8], widths)
    count = int(sizes.sum())
    return ChannelGraph(
        kinds=np.where(sizes > 0, Kind.SUM, Kind.LIVE).astype(np.uint8),
        sizes=sizes,
        source_start=source_start,
        length_start=starts,
        kernel_start=np.where(sizes > 0, starts, -1),
        sources=np.arange(len(sizes), dtype=np.int32),
        lengths=(rng.random(count) ** 4 * (rng.random(count) < 0.8)).astype(np.float32),
        outputs=np.arange(len(sizes)) >= len(sizes) - 2,
        opaque=np.zeros(len(sizes), dtype=bool),
        ties=np.arange(len(sizes), dtype=np.int32),
        alive=rng.random(count) < 0.9,
    )


@pytest.mark.parametrize("seed", range(20))
def test_what_is_kept_is_connected_and_reaches_the_budget(seed):
    """The smallest number of best kernels that leaves the budget, found by trying them all."""
    graph = drawn(seed)
    scores = kernel_relevance(graph)
    order = [k for k in np.lexsort((np.arange(len(scores)), -scores)) if graph.alive[k]]
    for budget in (1, 4, 12, 25):
        for count in range(len(order) + 1):
            keep = np.zeros(graph.num_kernels, dtype=bool)
            keep[order[:count]] = True
            expected = used_kernels(graph, keep)
            if expected.sum() >= budget:
                break
        assert np.array_equal(most_relevant(graph, budget), expected)


def test_what_cannot_be_connected_is_filled_up():
    graph = drawn(0)
    graph.lengths[:] = 0
    graph.outputs[:] = False
    keep = most_relevant(graph, 7)
    assert np.array_equal(np.flatnonzero(keep), np.flatnonzero(graph.alive)[:7])


@pytest.mark.parametrize("ratio", [0.5, 0.2, 0.1])
def test_the_ratio_is_the_one_asked_for(ratio):
    """Kernels that would be redundant are given back, but for what the last one connects."""
    torch.manual_seed(0)
    layers = [residual(nn.Sequential(conv_bn_relu(16, 16), conv(16, 16))) for _ in range(3)]
    model = nn.Sequential(conv_bn_relu(3, 16), *layers, conv(16, 2, 1)).eval()
    x = torch.randn(4, 3, 8, 8)
    result = fxlean.prune(model, ratio, x, method="relevance", calibration=x)
    assert result.kept == result.selected
    assert 0 <= result.kept - int(ratio * result.total) <= 8


def test_the_result_says_which_data_were_asked():
    model, inputs = make("plain")
    given = fxlean.prune(model, 0.9, inputs, method="relevance", calibration=inputs)
    noise = fxlean.prune(model, 0.8, inputs, method="relevance")
    other = fxlean.prune(model, 0.7, inputs, method="l1", calibration=inputs)
    assert [r.calibration for r in (given, noise, other)] == ["batches", "noise", ""]
    assert "relevance, on batches, selected" in str(given)
    assert given.to_dict()["calibration"] == "batches"


def test_example_inputs_are_the_first_batch_where_none_are_given():
    model = nn.Sequential(conv(5, 4), nn.Flatten(), nn.Linear(4 * 63, 3))
    batches = torch.randn(4, 2, 5, 7, 9)
    result = fxlean.prune(model, 0.5, method="relevance", calibration=iter(batches))
    assert result.kept == 10


def test_steps_are_pruned_by_relevance_too():
    model, inputs = make("residual")
    results = list(fxlean.iterate(model, 0.3, 3, method="relevance", calibration=inputs))
    total = results[0].total
    for step, result in enumerate(results, 1):
        assert 0 <= result.kept - int(0.3 ** (step / 3) * total) <= 3
