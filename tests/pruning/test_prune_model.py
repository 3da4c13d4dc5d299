"""Laws of `prune` and `iterate` over the zoo and over random networks."""

import copy
import gc
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils._pytree import tree_leaves

import fxlean
from fxlean.pruning.prunable import UNREACHED, UNTRACED, UNUSED
from fxlean.selection.liveness import used_kernels, zero_channels
from fxlean.selection.methods import METHODS
from tests.support.blocks import conv, conv_bn_relu
from tests.support.oracles import changed_kernel, observe, read
from tests.support.strategies import networks
from tests.support.zoo import ZOO, make

OPAQUE = {"opaque"}
# The cut-off networks that random and magnitude pruning leave behind are expected here.
pytestmark = pytest.mark.filterwarnings("ignore::fxlean.PruneWarning")
every_network = pytest.mark.parametrize("name", sorted(ZOO))
every_method = pytest.mark.parametrize("method", sorted(METHODS))


def run(model, inputs):
    with torch.no_grad():
        return [leaf.clone() for leaf in tree_leaves(model(*inputs))]


def masks(model):
    return {name: mask for name, mask in model.named_buffers() if name.endswith("_mask")}


def without_constants(model):
    """The model with all biases and means zero, so that a dropped constant costs nothing."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in name or "running_mean" in name:
                tensor.zero_()
    return model


@every_method
@every_network
def test_the_budget_is_met_and_the_model_still_runs(name, method):
    model, inputs = make(name)
    shapes = [leaf.shape for leaf in run(model, inputs)]
    result = fxlean.prune(model, 0.5, inputs, method=method)
    budget = int(0.5 * result.total)
    assert result.selected >= budget
    if method not in ("lean", "path", "relevance"):
        assert result.selected == budget
    assert result.kept == sum(layer.kept for layer in result.layers) <= result.selected
    assert [leaf.shape for leaf in run(model, inputs)] == shapes


@every_network
def test_ratio_1_changes_nothing(name):
    model, inputs = make(name)
    before, state = run(model, inputs), copy.deepcopy(model.state_dict())
    already = masks(model)
    fxlean.prune(model, 1.0, inputs, redundancy=False)
    assert all(torch.equal(a, b) for a, b in zip(before, run(model, inputs), strict=True))
    found = ({n.removesuffix("_orig") for n in names} for names in (model.state_dict(), state))
    now, then = ({name for name in names if not name.endswith("_mask")} for names in found)
    assert now == then
    assert all(torch.equal(mask, already.get(n, mask >= 0)) for n, mask in masks(model).items())
    fxlean.prune(model, 1.0, inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, run(model, inputs), strict=True))


@every_method
def test_masks_only_shrink_along_the_steps(method):
    model, inputs = make("residual_downsample")
    torch.manual_seed(0)
    before, ratios = None, []
    for result in fxlean.iterate(model, 0.2, 4, inputs, method=method):
        now = masks(model)
        for name in before or {}:
            assert not (now[name] > before[name]).any()
        before = {name: mask.clone() for name, mask in now.items()}
        ratios.append(result.ratio)
    assert ratios == sorted(ratios, reverse=True)
    assert len(ratios) == 4


def dead_values(model, inputs):
    """Every value that reads a channel which the graph says is dead."""
    reading = read(model, inputs)
    zero = torch.from_numpy(zero_channels(reading.graph, reading.graph.alive))
    values = observe(model, inputs)
    for channels, value in zip(reading.channels, values[: len(reading.channels)], strict=True):
        yield value.transpose(0, 1)[zero[channels]]


@every_method
@every_network
def test_dead_channels_really_are_zero(name, method):
    model, inputs = make(name)
    torch.manual_seed(0)
    fxlean.prune(model, 0.4, inputs, method=method)
    assert not any(values.any() for values in dead_values(model, inputs))


@settings(max_examples=60)
@given(networks(), st.sampled_from(["lean", "path", "random"]), st.sampled_from([0.7, 0.4, 0.1]))
def test_dead_channels_of_random_networks_really_are_zero(drawn, method, ratio):
    torch.manual_seed(0)
    model, inputs = drawn
    fxlean.prune(model, ratio, inputs, method=method)
    assert not any(values.any() for values in dead_values(model, inputs))


def removing_redundancy_changes(model, inputs, ratio):
    """The largest change of an output when redundant kernels go, all constants being zero."""
    plain, thorough = without_constants(model), copy.deepcopy(model)
    fxlean.prune(plain, ratio, inputs, method="spectral", redundancy=False)
    fxlean.prune(thorough, ratio, inputs, method="spectral")
    pairs = zip(run(plain, inputs), run(thorough, inputs), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("ratio", [0.6, 0.3])
@pytest.mark.parametrize("name", sorted(set(ZOO) - {"pre_pruned", "weight_norm"}))
def test_redundant_kernels_do_not_matter(name, ratio):
    assert removing_redundancy_changes(*make(name, torch.float64), ratio) < 1e-12


@settings(max_examples=60)
@given(networks(), st.sampled_from([0.7, 0.4, 0.1]))
def test_redundant_kernels_of_random_networks_do_not_matter(drawn, ratio):
    model, inputs = drawn
    assert removing_redundancy_changes(model, inputs, ratio) < 1e-9


@pytest.mark.parametrize("name", sorted(set(ZOO) - OPAQUE))
def test_kernels_that_are_left_do_matter(name):
    torch.manual_seed(0)
    model, inputs = make(name, torch.float64)
    inputs = tuple(torch.randn(4, *x.shape[1:], dtype=x.dtype) for x in inputs)
    fxlean.prune(model, 0.5, inputs, method="random")
    reading = read(model, inputs, prune_outputs=False)
    count = len(reading.channels)
    before = observe(model, inputs, leaky=True)[count:]
    for kernel in reading.graph.alive.nonzero()[0]:
        with changed_kernel(reading, model, kernel):
            after = observe(model, inputs, leaky=True)[count:]
        assert any((a != b).any() for a, b in zip(before, after, strict=True)), kernel


@settings(max_examples=60)
@given(networks(), st.sampled_from([0.7, 0.4, 0.1]))
def test_path_leaves_nothing_redundant(drawn, ratio):
    model, inputs = drawn
    reading = read(model, inputs, prune_outputs=False)
    through = used_kernels(reading.graph, reading.graph.alive)
    result = fxlean.prune(model, ratio, inputs, method="path")
    assert result.kept == result.selected or through.sum() < result.selected


def test_path_is_indifferent_to_rescaling_one_layer_against_the_next():
    model, inputs = make("no_norm")
    model, rescaled = copy.deepcopy(model), model
    with torch.no_grad():
        first, second, *_ = [m for m in rescaled.modules() if isinstance(m, nn.Conv2d)]
        for parameter in first.parameters():
            parameter.mul_(16.0)
        second.weight.div_(16.0)
    fxlean.prune(model, 0.4, inputs, method="path")
    fxlean.prune(rescaled, 0.4, inputs, method="path")
    for name, mask in masks(model).items():
        assert torch.equal(mask, masks(rescaled)[name])


def test_the_call_leaves_flags_random_numbers_and_values_alone():
    model, inputs = make("residual")
    model.train()
    model[0].eval()
    flags = [module.training for module in model.modules()]
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    fxlean.prune(model, 0.5, inputs)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        if not name.endswith("_mask"):
            assert torch.equal(tensor, values[name.removesuffix("_orig")])


@every_network
def test_nothing_traced_stays_on_the_model(name):
    model, inputs = make(name)
    fxlean.prune(model, 0.5, inputs)
    for module in model.modules():
        for value in module.__dict__.values():
            for leaf in tree_leaves(value):
                if isinstance(leaf, torch.Tensor):
                    assert type(leaf) in (torch.Tensor, nn.Parameter)
    copied = copy.deepcopy(model)
    pairs = zip(run(model, inputs), run(copied, inputs), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_masks_are_those_of_torch():
    model, inputs = make("residual")
    fxlean.prune(model, 0.5, inputs)
    before = run(model, inputs)
    assert torch_prune.is_pruned(model)
    for module in model.modules():
        for name in [n.removesuffix("_mask") for n, _ in module.named_buffers(recurse=False)]:
            if hasattr(module, f"{name}_mask"):
                torch_prune.remove(module, name)
    assert not torch_prune.is_pruned(model)
    assert all(torch.equal(a, b) for a, b in zip(before, run(model, inputs), strict=True))


@every_network
def test_masks_survive_training(name):
    if name in ("dense_in_place", "functional"):
        model, inputs = make("nested")
    else:
        model, inputs = make(name)
    for _ in fxlean.iterate(model, 0.5, 2, inputs):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            sum(leaf.square().mean() for leaf in tree_leaves(model(*inputs))).backward()
            optimizer.step()
    model.eval()
    reading = read(model, inputs, prune_outputs=False)
    observe(model, inputs)
    assert not reading.graph.alive.all()
    for layer, weight in zip(reading.graph.layers, reading.network.weights, strict=True):
        alive = reading.graph.alive[layer.kernels].reshape(layer.rows, layer.columns)
        kernels = weight.kernels(weight.value.detach())
        assert not kernels[~torch.from_numpy(alive)].any()


def test_state_dict_goes_to_a_model_pruned_alike():
    model, inputs = make("residual")
    other, _ = make("residual")
    fxlean.prune(model, 0.5, inputs)
    fxlean.prune(other, 0.5, inputs)
    with torch.no_grad():
        model[0].weight_orig.mul_(2.0) if hasattr(model[0], "weight_orig") else None
    other.load_state_dict(model.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(run(model, inputs), run(other, inputs), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_weights(dtype):
    model, inputs = make("residual_downsample", dtype)
    result = fxlean.prune(model, 0.5, inputs)
    assert result.selected >= int(0.5 * result.total)
    assert all(mask.dtype == dtype for mask in masks(model).values())


def test_results_print_and_serialise():
    model, inputs = make("opaque")
    with pytest.warns(
        fxlean.PruneWarning, match=r"no rule for .*aten\._cdist_forward.*fxlean\.register"
    ):
        result = fxlean.prune(model, 0.5, inputs)
    text = str(result)
    assert all(layer.name in text for layer in result.layers)
    assert "opaque: aten._cdist_forward" in text
    assert json.loads(json.dumps(result.to_dict()))["ratio"] == result.ratio
    assert set(result.timings) == {"trace", "norms", "select", "masks"}


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_as_it_was_after_a_call_and_after_an_error(enabled):
    model, inputs = make("plain")
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        fxlean.prune(model, 0.5, inputs)
        assert gc.isenabled() == enabled
        with pytest.raises(fxlean.ArgumentError, match="rejects"):
            fxlean.prune(model, 0.5, torch.zeros(1, 77, 8, 8))
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


class Encoder(nn.Module):
    """Returns the features of every stage, as backbones of detectors do."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([conv_bn_relu(3, 4), conv_bn_relu(4, 5), conv_bn_relu(5, 6)])
        self.head = conv(6, 2)

    def forward(self, x):
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features, self.head(x)


def test_only_layers_that_nothing_else_reads_count_as_output():
    torch.manual_seed(0)
    result = fxlean.prune(Encoder().eval(), 0.5, torch.randn(1, 3, 8, 8))
    assert [layer.name for layer in result.layers] == ["stages.0.0", "stages.1.0", "stages.2.0"]
    assert list(result.skipped) == ["head"]


class Unused(nn.Module):
    """A layer that is not called, one that no output depends on, and one that makes it."""

    def __init__(self, looks: bool):
        super().__init__()
        self.looks = looks
        self.body, self.idle = conv_bn_relu(3, 4), nn.Conv2d(4, 4, 1)
        self.auxiliary, self.head = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.body(x)
        self.idle(x)
        return self.head(x) if not self.looks or x.mean() > -1e9 else self.auxiliary(x)


def test_layers_outside_of_the_graph_say_why():
    torch.manual_seed(0)
    skipped = fxlean.prune(Unused(looks=False).eval(), 0.5, torch.randn(1, 3, 8, 8)).skipped
    assert skipped["idle"] == UNUSED
    assert skipped["auxiliary"] == UNREACHED


def test_layers_that_no_traced_part_calls_are_not_called_unreached():
    torch.manual_seed(0)
    model, x = Unused(looks=True).eval(), torch.randn(1, 3, 8, 8)
    with pytest.warns(fxlean.PruneWarning, match="traced one by one"):
        skipped = fxlean.prune(model, 0.5, x).skipped
    assert skipped["auxiliary"] == UNTRACED
