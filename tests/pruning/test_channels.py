"""Whole channels and targets: what was promised is what `compact` leaves."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

import fxlean
from fxlean.calibration.shares import shares_of
from fxlean.channels.walk import wire
from fxlean.compaction.trials import units_of
from fxlean.masking import without_masks
from fxlean.nn import Selected
from fxlean.pruning.channels import find_channels
from fxlean.pruning.networks import example_and_data, network_of, with_lengths
from fxlean.selection.methods import METHODS
from fxlean.tracing.tracer import trace_model
from tests.support.blocks import Apply, beside_zeros, conv, conv_bn, conv_bn_relu, residual
from tests.support.strategies import networks
from tests.support.zoo import ZOO, make

pytestmark = pytest.mark.filterwarnings(
    "ignore::fxlean.PruneWarning",
    "ignore:.* keeps its size, for (every|its):fxlean.CompactionWarning",
)
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
NEEDED = {  # networks in which not only what they return needs all channels of a layer
    *("channels_last_block", "coordinates", "dense_in_place", "functional", "group_norm"),
    *(
        "in_place",
        "low_pass",
        "multi_head",
        "norm_without_affine",
        "opaque",
        "self_attention",
        "split",
    ),
    *("stacked_weights", "weight_norm", "weight_standardised"),
}


def run(model, inputs):
    with torch.no_grad():
        return [leaf.clone() for leaf in tree_leaves(model(*inputs))]


def check_promise(model, inputs, ratio, of, **options):
    """Prunes whole channels as far as possible, and holds `compact` to what was promised."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        result = fxlean.prune(model, ratio, inputs, granularity="channel", of=of, **options)
    except fxlean.ArgumentError as err:
        if "no convolution to prune" in str(err):
            return None
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
        least = float(str(err).split("Pass a ratio of at least ")[1].split(",")[0])
        result = fxlean.prune(model, least, inputs, granularity="channel", of=of, **options)
        ratio = least
    if of == "kernels":
        assert result.ratio <= ratio
    else:
        assert result.left[of][0] <= ratio * result.left[of][1]
    expected = run(model, inputs)
    small = fxlean.compact(model, inputs)
    for leaf, other in zip(run(small, inputs), expected, strict=True):
        torch.testing.assert_close(leaf, other, rtol=1e-4, atol=1e-4)
    report = fxlean.report(small, inputs)
    found = {"parameters": report.parameters, "macs": report.macs}
    promised = {name: left for name, (left, _) in result.left.items()}
    if any(name.endswith("_mask") for name in before):
        # Where single kernels were pruned earlier, more can turn out to be dead.
        assert all(found[name] <= promised[name] for name in found)
    else:
        assert found == promised
    assert not any(isinstance(module, Selected) for module in small.modules())
    return result


@pytest.mark.parametrize("of", ["macs", "parameters", "kernels"])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_compaction_leaves_what_was_promised(name, of):
    model, inputs = make(name)
    check_promise(model, inputs, 0.5, of, method="l1")


@pytest.mark.parametrize("name", sorted(set(ZOO) - NEEDED))
def test_only_what_the_model_returns_stays(name):
    model, inputs = make(name)
    result = fxlean.prune(model, 1.0, inputs, granularity="channel", method="l1")
    assert set(result.pinned.values()) == {"output"}


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("name", ["residual", "u_net", "grouped", "squeeze_excite", "concat"])
def test_every_method_prunes_whole_channels(name, method):
    model, inputs = make(name)
    assert check_promise(model, inputs, 0.6, "macs", method=method) is not None


@settings(max_examples=15, deadline=None)
@given(networks(), st.sampled_from([0.7, 0.4]))
def test_promises_to_random_networks_are_kept(network, ratio):
    model, inputs = network
    check_promise(model, inputs, ratio, "parameters", method="l1")


def stages(width=32):
    """Two residual stages and a classifier."""
    body = [nn.Sequential(conv_bn_relu(width, width), conv_bn(width, width)) for _ in range(2)]
    return nn.Sequential(
        conv_bn_relu(3, width),
        *map(residual, body),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 7),
    ).eval()


X = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize("of", ["macs", "parameters", "kernels"])
def test_targets_are_met_within_a_percent(of):
    torch.manual_seed(0)
    model = stages(64)
    result = fxlean.prune(model, 0.4, X, granularity="channel", of=of, method="l1")
    left = result.ratio if of == "kernels" else result.left[of][0] / result.left[of][1]
    assert 0.39 < left <= 0.4


@pytest.mark.parametrize("ratio", [0.8, 0.6, 0.3])
def test_channels_that_are_zero_from_the_start_break_no_promise(ratio):
    torch.manual_seed(0)
    layers = [conv(6, 48), conv(48, 48), conv(48, 1)]
    model = nn.Sequential(Apply(beside_zeros), *layers).eval()
    assert check_promise(model, (X,), ratio, "macs", method="l1") is not None


def test_the_layout_in_memory_changes_nothing():
    torch.manual_seed(0)
    model, inputs = make("squeeze_excite")
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    options = {"granularity": "channel", "of": "macs", "method": "l1"}
    expected = fxlean.prune(model, 0.6, inputs, **options)
    images = tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)
    assert fxlean.prune(other, 0.6, images, **options).left == expected.left
    for name, weight in fxlean.compact(other, images).named_parameters():
        if weight.dim() == 4:
            assert weight.is_contiguous(memory_format=torch.channels_last), name


def test_what_cannot_be_reached_says_which_layers_are_left_alone():
    layer = conv(3, 8)
    model = nn.Sequential(layer, conv(8, 8), conv(8, 2))
    options = {"granularity": "channel", "of": "macs", "ignore": ["1"]}
    with pytest.raises(fxlean.ArgumentError, match=r"all channels stay of .*1: ignored"):
        fxlean.prune(model, 0.1, X, **options)


def test_step_by_step_is_no_less_than_the_target_and_earlier_channels_stay_away():
    torch.manual_seed(0)
    model = stages()
    options = {"granularity": "channel", "of": "macs", "method": "l1"}
    masks: dict[str, torch.Tensor] = {}
    for step, result in enumerate(fxlean.iterate(model, 0.2, 3, X, **options), 1):
        assert result.left["macs"][0] <= 0.2 ** (step / 3) * result.left["macs"][1]
        now = {name: b.clone() for name, b in model.named_buffers() if name.endswith("_mask")}
        for name, mask in masks.items():
            assert not (now[name].bool() & ~mask.bool()).any()
        masks = now
    report = fxlean.report(fxlean.compact(model, X), X)
    assert report.macs == result.left["macs"][0]


def widths(model):
    """Channels that each layer of a model writes."""
    return {
        name: getattr(module, "out_channels", getattr(module, "out_features", 0))
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
    }


def test_numbers_of_channels_are_multiples():
    torch.manual_seed(0)
    model = stages()
    fxlean.prune(model, 0.5, X, granularity="channel", of="macs", method="l1", round_to=8)
    found = widths(fxlean.compact(model, X))
    assert {count % 8 for count in list(found.values())[:-1]} == {0}
    assert min(found.values()) < 32


@pytest.mark.parametrize("round_to", [None, 1])
def test_wide_layers_keep_multiples_of_16_unless_told_otherwise(round_to):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 320, 3), nn.ReLU(), nn.Conv2d(320, 10, 3))
    result = fxlean.prune(
        model, 0.64, X, granularity="channel", of="macs", method="l1", round_to=round_to
    )
    kept = 192 if round_to is None else 204
    left, total = result.left["macs"]
    assert left / total == kept / 320
    assert widths(fxlean.compact(model, X))["0"] == kept


@pytest.mark.parametrize("least", [0.75, {"1.*": 0.75}, {nn.Conv2d: 0.75}])
def test_layers_keep_at_least_a_fraction(least):
    torch.manual_seed(0)
    model = stages()
    inside = {"1.branches.0.0.0", "1.branches.0.1.0"} if least == {"1.*": 0.75} else None
    fxlean.prune(model, 0.6, X, granularity="channel", of="macs", method="random", at_least=least)
    found = widths(fxlean.compact(model, X))
    for name, count in list(found.items())[:-1]:
        if inside is None or name in inside:
            assert count >= 24


def test_linear_layers_belong_to_channels_unless_switched_off():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.extend([nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 5)])
    with_linear, without = copy.deepcopy(model), copy.deepcopy(model)
    options = {"granularity": "channel", "of": "parameters", "method": "l1"}
    fxlean.prune(with_linear, 0.6, X, at_least={"0": 1.0}, **options)
    assert fxlean.compact(with_linear, X)[3].out_features < 64
    fxlean.prune(without, 0.9, X, include_linear=False, **options)
    assert fxlean.compact(without, X)[3].out_features == 64


def test_what_reads_a_constant_and_is_left_alone_keeps_it():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 2, 1)).eval()
    message = (
        r"all channels are gone that may go \(all channels stay of .*0: a layer that is left alone"
    )
    with pytest.raises(fxlean.ArgumentError, match=message):
        fxlean.prune(model, 0.5, X, granularity="channel", of="macs")
    model = nn.Sequential(*model[:2], nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)).eval()
    check_promise(model, (X,), 0.4, "macs", method="l1")


def test_layers_beside_one_that_is_left_alone_are_named():
    model, (x,) = make("residual")
    ignored, *others = (
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.out_channels == layer.in_channels
    )
    result = fxlean.prune(model, 1.0, x, granularity="channel", ignore=[ignored])
    reasons = {name: result.pinned.get(name, "") for name in others}
    assert all("left alone" in reason for reason in reasons.values()), reasons
    assert ignored not in result.pinned


def test_any_measure_can_be_the_target():
    torch.manual_seed(0)
    model = stages()
    seen = []

    def size(candidate):
        seen.append(candidate)
        return sum(parameter.numel() for parameter in candidate.parameters())

    for granularity in ("channel", "kernel"):
        pruned = copy.deepcopy(model)
        result = fxlean.prune(pruned, 0.5, X, granularity=granularity, of=size, method="l1")
        left = size(fxlean.compact(pruned, X)) / size(model)
        assert left <= 0.5
        if granularity == "channel":
            assert left > 0.45
            assert result.left["parameters"][0] == size(fxlean.compact(pruned, X))
    assert not any(isinstance(m, nn.utils.prune.BasePruningMethod) for m in model.modules())


@pytest.mark.parametrize("granularity", ["channel", "kernel"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1, None, "large"])
def test_a_measure_that_is_no_number_above_0_is_refused(value, granularity):
    model = stages()
    before = copy.deepcopy(model.state_dict())
    options = {"granularity": granularity, "method": "l1", "of": lambda _: value}
    with pytest.raises(fxlean.ArgumentError, match=rf"of gave {value!r} for a Sequential\. Pass"):
        fxlean.prune(model, 0.5, X, **options)
    assert before.keys() == model.state_dict().keys()


def test_a_measure_may_be_a_tensor():
    def size(candidate):
        return torch.tensor(sum(parameter.numel() for parameter in candidate.parameters()))

    result = fxlean.prune(stages(), 0.5, X, granularity="channel", of=size, method="l1")
    left, total = result.left["parameters"]
    assert 0.45 * total < left <= 0.5 * total


def test_layers_with_weights_that_cannot_be_cut_are_named():
    first, shared, again = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
    again.weight = shared.weight
    layers = (nn.Conv2d(3, 8, 3), nn.utils.parametrizations.weight_norm(first), shared, again)
    model = nn.Sequential(*layers, nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 2, 1))
    result = fxlean.prune(model, 0.9, X, granularity="channel", of="macs", method="l1")
    assert {name for name, reason in result.pinned.items() if "computed" in reason} == {"1", "2"}
    assert all(layer.kept == layer.total for layer in result.layers if layer.name in ("1", "2"))


class Twice(nn.Module):
    """Layers with weights that are applied both ways round, or two of which make one product."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first, self.stem = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 16, 3, bias=False)
        self.tip, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(8, 2, 1)
        if kind == "factors":
            self.middle.down = nn.Parameter(torch.randn(4, 8, 1, 1))
            self.middle.up = nn.Parameter(torch.randn(16, 4, 1, 1))

    def forward(self, x):
        x = self.stem(self.first(x).relu()).relu()
        found = self.middle(x)
        if self.kind == "factors":
            inside = x[:, :, 1:-1, 1:-1]
            low = nn.functional.conv2d(inside, self.middle.down)
            return self.tip(found + nn.functional.conv2d(low, self.middle.up))
        found = self.tip(found.relu()).relu()
        return self.last(nn.functional.conv_transpose2d(found, self.middle.weight).relu())


@pytest.mark.parametrize("kind", ["transposed", "factors"])
@pytest.mark.parametrize("granularity", ["kernel", "channel"])
def test_weights_that_a_layer_applies_in_two_ways(kind, granularity):
    torch.manual_seed(0)
    model = Twice(kind)
    result = fxlean.prune(model, 0.9, X, granularity=granularity, method="l1", prune_outputs=True)
    small = fxlean.compact(model, X)
    torch.testing.assert_close(small(X), model(X), rtol=1e-4, atol=1e-5)
    if granularity == "channel":
        assert result.left["parameters"][0] == sum(p.numel() for p in small.parameters())


def test_latency_is_measured():
    torch.manual_seed(0)
    model = stages(128)
    x = torch.zeros(1, 3, 64, 64)
    result = fxlean.prune(model, 0.6, x, granularity="channel", of="latency", method="l1")
    assert result.left["macs"][0] < result.left["macs"][1]


def test_a_layer_that_earlier_masks_removed_leaves_its_neighbours_free():
    torch.manual_seed(0)
    model = stages()
    dead = model.get_submodule("1.branches.0.0.0")
    torch.nn.utils.prune.custom_from_mask(dead, "weight", torch.zeros_like(dead.weight))
    result = fxlean.prune(model, 0.05, X, granularity="channel", of="macs", method="l1")
    assert widths(fxlean.compact(model, X))["0.0"] < 32
    assert fxlean.report(fxlean.compact(model, X), X).macs == result.left["macs"][0]


class Mixed(nn.Module):
    """A linear layer that reads sixteen features of every channel, and one of others."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(3, 24, 3, 2, 1)
        self.hidden, self.out = nn.Linear(24 * 17, 32), nn.Linear(32, 4)

    def forward(self, x):
        wide, narrow = self.wide(x).relu(), self.narrow(x).relu().mean((2, 3))
        return self.out(self.hidden(torch.cat([wide.flatten(1), narrow], 1)).relu())


@pytest.mark.parametrize("ratio", [0.7, 0.5, 0.3])
def test_kernels_are_counted_where_channels_have_unequal_numbers_of_features(ratio):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    result = fxlean.prune(Mixed(), ratio, x, granularity="channel", method="l1")
    assert ratio - 0.05 < result.ratio <= ratio


class Halving(nn.Sequential):
    """Writes into its inputs."""

    def forward(self, x):
        return super().forward(x.div_(2))


def test_inputs_are_not_written_to_while_latency_is_measured():
    model, x = Halving(*stages()), torch.ones_like(X)
    fxlean.prune(model, 0.9, x, granularity="channel", of="latency", method="l1")
    assert torch.equal(x, torch.ones_like(X))


def test_a_measure_may_change_the_networks_that_it_is_given():
    def size(network):
        return sum(parameter.numel() for parameter in network.parameters())

    def size_before_ruin(network):
        count = size(network)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
        network[0] = nn.Identity()
        return count

    torch.manual_seed(0)
    model = stages()
    other, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    options = {"granularity": "channel", "method": "l1"}
    result = fxlean.prune(model, 0.5, X, of=size_before_ruin, **options)
    assert result.left == fxlean.prune(other, 0.5, X, of=size, **options).left
    bare = without_masks(model, permanent=False)
    assert all(torch.equal(before[name], now) for name, now in bare.state_dict().items())


def test_nothing_goes_for_noise_of_a_measure_at_ratio_one():
    model, values = stages(), iter(range(1, 1000))
    result = fxlean.prune(
        model, 1, X, granularity="channel", of=lambda network: float(next(values)), method="l1"
    )
    assert result.kept == result.total


def test_weights_of_no_layer_keep_at_least_a_fraction():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.out = nn.Parameter(torch.randn(16, 3, 3, 3)), nn.Conv2d(16, 2, 1)

        def forward(self, x):
            return self.out(nn.functional.conv2d(x, self.w).relu())

    torch.manual_seed(0)
    options = {"method": "l1", "prune_outputs": True, "redundancy": False}
    model = Functional()
    for ratio in (0.8, 0.7):  # its parameter has another name where it is masked
        result = fxlean.prune(model, ratio, X, at_least={"w": 0.9}, **options)
        assert result.layers[0].kept >= 0.9 * result.layers[0].total


@pytest.mark.parametrize("of", ["macs", "parameters"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_single_kernels_are_counted_by_what_they_cost(method, of):
    torch.manual_seed(0)
    model = nn.Sequential(conv_bn_relu(3, 8), conv_bn_relu(8, 16, stride=2), conv_bn(16, 4)).eval()
    fxlean.prune(model, 0.5, X, of=of, method=method, prune_outputs=True, redundancy=False)
    report = fxlean.report(model, X)
    left = sum(getattr(row, f"{of}_left") for row in report.layers)
    total = sum(getattr(row, of) for row in report.layers)
    assert left <= 0.5 * total
    if method not in ("lean", "path", "relevance"):
        assert left > 0.45 * total


def test_single_kernels_keep_a_fraction_of_every_layer():
    torch.manual_seed(0)
    model = stages()
    result = fxlean.prune(model, 0.3, X, method="l1", at_least=0.25, redundancy=False)
    assert min(layer.kept / layer.total for layer in result.layers) >= 0.25
    assert result.kept == int(0.3 * result.total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "layer"}, "granularity is 'layer'. Pass one of kernel, channel"),
        ({"of": "flops"}, "of is 'flops'. Pass one of kernels, parameters, macs, latency, or a"),
        ({"at_least": 2}, "at_least is 2. Pass the fraction"),
        ({"at_least": []}, r"at_least is \[\]. Pass the fraction"),
        ({"at_least": {"0": "x"}}, "at_least is {'0': 'x'}. Pass the fraction"),
        ({"at_least": {"nope": 0.5}}, r"^at_least entries match nothing in .*: 'nope'"),
        ({"round_to": 0}, "round_to is 0. Pass a whole number"),
        ({"round_to": 8}, "single kernels are pruned"),
        ({"of": "macs", "granularity": "channel", "at_least": 1.0}, "100.0% of the macs stay"),
    ],
)
def test_bad_targets_are_refused(options, message):
    model = stages()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fxlean.ArgumentError, match=message):
        fxlean.prune(model, 0.5, X, **options)
    assert before.keys() == model.state_dict().keys()


def unit_scores(model, x, method):
    """What every unit is worth."""
    trace = trace_model(model, (x,))
    wired = wire(model, trace)
    network = network_of(model, wired, [], False, True)
    found = METHODS[method]
    batches = example_and_data(model, (x,), found.norm or "spectral", x)[1]
    lengths = (batches, found.norm or "spectral")
    graph = with_lengths(model, trace, wired, network, *lengths, gains=found.gains)
    channels = find_channels(replace(network, graph=graph), units_of(model, trace))
    kernels = found.scores(graph, np.random.default_rng(0))
    return channels.scores(kernels, np.maximum if found.chains else np.add)


@pytest.mark.parametrize("method", ["relevance", "l1", "spectral", "path"])
def test_a_depthwise_convolution_that_changes_nothing_changes_no_score(method):
    torch.manual_seed(0)
    same = nn.Conv2d(8, 8, 1, groups=8, bias=False)
    nn.init.ones_(same.weight)
    first, last = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 2, 3, bias=False)
    x = torch.randn(4, 3, 8, 8)
    plain = unit_scores(nn.Sequential(first, nn.ReLU(), last), x, method)
    with_depthwise = unit_scores(nn.Sequential(first, same, nn.ReLU(), last), x, method)
    assert plain.shape == (8,)
    np.testing.assert_allclose(with_depthwise, plain, rtol=1e-5)


def with_twins():
    """A network whose channels 0 and 1 are the same, and read the most; and batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter[1] = parameter[0]
        model[2].weight[:, :2] *= 10
    return model, torch.randn(32, 3, 8, 8)


def test_of_two_channels_that_are_the_same_one_goes_first_and_repair_loses_nothing():
    model, x = with_twins()
    expected = model(x)
    options = {"method": "relevance", "granularity": "channel", "calibration": x}
    fxlean.prune(model, 0.9, x[:1], **options)
    assert (model[0].weight_mask.flatten(1).any(1)[:2].sum(), model[0].weight_mask[2:].min()) == (
        1,
        1,
    )
    assert fxlean.repair(model, x, steps=40).after < 1e-3
    torch.testing.assert_close(fxlean.compact(model, x[:1])(x), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("features", [False, True])
def test_overlaps_are_the_correlations_of_what_a_layer_reads(features):
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh())
    last = nn.Sequential(nn.Flatten(), nn.Linear(5 * 4, 2)) if features else nn.Conv2d(5, 2, 1)
    model, x = nn.Sequential(first, last, nn.Tanh()).eval(), torch.randn(16, 3, 4, 4)
    trace = trace_model(model, (x[:4],))
    wired = wire(model, trace)
    network = network_of(model, wired, [], True, True)
    overlaps = {}
    batches = [(batch,) for batch in x.split(4)]
    shares_of(model, network.graph, trace, wired, batches, overlaps)
    expected = np.corrcoef(first(x).detach().transpose(0, 1).flatten(1).numpy())
    np.testing.assert_allclose(overlaps[wired.wiring.blocks[-1].first], expected, atol=1e-5)
