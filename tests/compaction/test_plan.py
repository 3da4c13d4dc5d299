"""Which layers are tied, and which channel counts are filled up."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models import DenseNet

import fxlean
from fxlean.compaction.cut import cost, part_of
from fxlean.compaction.plan import choose_slots, layers_of
from fxlean.compaction.rules import FOLLOW
from fxlean.compaction.solve import WIDTH, fill_up, is_ragged, solve
from fxlean.compaction.walk import slots_of
from fxlean.masking import remove_masks
from fxlean.nn import Selected
from fxlean.tracing.tracer import trace_model
from tests.support.blocks import conv_bn, conv_bn_relu, residual

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* keeps its size, for (every|its):fxlean.CompactionWarning",
    "ignore::fxlean.PruneWarning",
)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=120))
def test_counts_are_filled_up_to_a_multiple_or_left_alone(drawn):
    chosen, among = torch.tensor(drawn).T
    filled = fill_up(chosen, among)
    before, after, others = int(chosen.sum()), int(filled.sum()), int((among & ~chosen).sum())
    assert torch.equal(filled & chosen, chosen)
    assert not (filled & ~chosen & ~among).any()
    missing = -before % WIDTH
    if 10 * others < before + others:
        assert after == before + others
    elif 3 * missing > before:
        assert after == before
    else:
        assert after == before + min(missing, others)


def planned(model, x):
    """Estimated nanoseconds of the plan, and of every choice of layers to tie."""
    remove_masks(model)
    with torch.no_grad():
        slots = slots_of(model, trace_model(model, x), FOLLOW[0])
    layers = layers_of(slots)

    def estimate(kept):
        return sum(cost(part_of(calls, kept)) for calls in layers.values())

    fill = is_ragged(slots, solve(slots))
    loose = solve(slots, fill=fill)
    selecting = [
        name
        for name, calls in layers.items()
        if calls[0].diagonal
        and not torch.equal(loose(calls[0].source.slots), loose(calls[0].result.slots))
    ]
    subsets = itertools.chain.from_iterable(
        itertools.combinations(selecting, count) for count in range(len(selecting) + 1)
    )
    return estimate(choose_slots(slots, layers)), [
        estimate(solve(slots, tied, fill=fill)) for tied in subsets
    ]


def two_blocks():
    bodies = [nn.Sequential(conv_bn_relu(48, 32), conv_bn(32, 48)) for _ in range(2)]
    return nn.Sequential(conv_bn(3, 48), *map(residual, bodies), conv_bn(48, 2))


def dense_block():
    return DenseNet(growth_rate=8, block_config=(4,), num_init_features=16, num_classes=3)


@pytest.mark.parametrize("ratio", [0.5, 0.2, 0.1, 0.05])
@pytest.mark.parametrize("method", ["lean", "path", "random"])
@pytest.mark.parametrize("build", [two_blocks, dense_block])
def test_the_plan_is_nearly_as_fast_as_the_best_choice_of_ties(build, method, ratio):
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(1, 3, 64, 64)
    fxlean.prune(model, ratio, x, method=method)
    found, choices = planned(model, x)
    none, every = choices[0], choices[-1]
    assert found <= min(none, every)
    assert found <= 1.2 * min(choices)


@pytest.mark.parametrize("ratio", [0.5, 0.2, 0.1, 0.05])
@pytest.mark.parametrize("method", ["lean", "path", "random"])
def test_a_selection_is_filled_up_only_with_channels_that_are_there(method, ratio):
    torch.manual_seed(0)
    block = DenseNet(growth_rate=24, block_config=(4,), num_init_features=64, num_classes=3)
    model, x = block.eval(), torch.randn(1, 3, 64, 64)
    fxlean.prune(model, ratio, x, method=method)
    remove_masks(model)
    with torch.no_grad():
        slots = slots_of(model, trace_model(model, x), FOLLOW[0])
    kept = solve(slots, fill=is_ragged(slots, solve(slots)))
    for name, calls in layers_of(slots).items():
        if name.endswith("norm1"):
            assert not (kept(calls[0].result.slots) & ~kept(calls[0].source.slots)).any()


@pytest.mark.parametrize(("dead", "selects"), [(1, False), (60, True)])
def test_a_block_selects_only_if_enough_of_its_channels_are_dead(dead, selects):
    model = nn.Sequential(conv_bn(3, 64), residual(conv_bn(64, 64)), conv_bn(64, 2)).eval()
    last = [m for m in model[1].modules() if isinstance(m, nn.BatchNorm2d)][-1]
    with torch.no_grad():
        last.weight[:dead] = 0
        last.bias[:dead] = 0
    small = fxlean.compact(model, torch.randn(1, 3, 64, 64))
    assert any(isinstance(m, Selected) for m in small.modules()) == selects
