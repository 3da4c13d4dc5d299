"""Masks on models whose weights are computed, shared, borrowed, or masked before."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import fxlean
from fxlean.masking import put_mask
from fxlean.nn import RefreshMasks
from fxlean.pruning.masks import apply_masks
from fxlean.pruning.prunable import COMPUTED, NORMED
from tests.support.blocks import StandardisedConv2d, conv, conv_bn_relu
from tests.support.oracles import read
from tests.support.zoo import ZOO, make

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings(
    "ignore::fxlean.PruneWarning", "ignore:.*weight_norm. is deprecated:FutureWarning"
)


def train(model, inputs, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        optimizer.step()


def effective_kernels(model, inputs):
    """Every prunable kernel as the model uses it, and whether it is alive."""
    model(*inputs)
    reading = read(model, inputs)
    for layer, weight in zip(reading.graph.layers, reading.network.weights, strict=True):
        alive = reading.graph.alive[layer.kernels].reshape(layer.rows, layer.columns)
        yield weight.kernels(weight.value.detach()), torch.from_numpy(alive)


def assert_masked(model, inputs, count):
    """Pruned kernels are zero in use, living ones are not, and there are `count` of them."""
    total = 0
    for kernels, alive in effective_kernels(model, inputs):
        assert kernels.isfinite().all()
        assert torch.equal(kernels.flatten(2).any(2), alive)
        total += int(alive.sum())
    assert total == count


class Listed(nn.Module):
    """Its kernels are in a ParameterList, which is never called."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(5, channels, 3, 3) * 0.3) for channels in (3, 5, 5)
        )
        self.biases = nn.ParameterDict({"a": torch.ones(5)})
        self.last = conv(5, 2, 1)

    def forward(self, x):
        for weight in self.weights:
            x = F.conv2d(x, weight, self.biases["a"], padding=1).relu()
        return self.last(x)


class Borrowed(nn.Module):
    """Uses the weight of a convolution that is itself never called."""

    def __init__(self):
        super().__init__()
        self.first, self.last = conv(3, 4), conv(4, 2, 1)
        self.inner = nn.Sequential(nn.Identity(), conv(4, 4, bias=True))

    def forward(self, x):
        for _ in range(2):
            x = F.conv2d(self.first(x) if x.shape[1] == 3 else x, self.inner[1].weight, padding=1)
        return self.last(x)


@pytest.mark.parametrize("build", [Listed, Borrowed])
def test_masks_of_modules_that_are_never_called(build):
    torch.manual_seed(0)
    model = nn.Sequential(build())
    result = fxlean.prune(model, 0.4, IMAGE)
    hooks = [h for m in model.modules() for h in m._forward_pre_hooks.values()]
    assert any(isinstance(hook, RefreshMasks) for hook in hooks)
    fxlean.prune(model, 0.4, IMAGE)
    again = [h for m in model.modules() for h in m._forward_pre_hooks.values()]
    refreshing = [h.path for h in again if isinstance(h, RefreshMasks)]
    assert len(refreshing) == len(set(refreshing))
    for _ in range(3):
        train(model, (IMAGE,), 1)
        reading = read(model, (IMAGE,), prune_outputs=False)
        assert int(reading.graph.alive.sum()) <= result.kept
        for layer, weight in zip(reading.graph.layers, reading.network.weights, strict=True):
            alive = reading.graph.alive[layer.kernels].reshape(layer.rows, layer.columns)
            assert not weight.kernels(weight.value.detach())[~torch.from_numpy(alive)].any()


@pytest.mark.parametrize("build", [Listed, Borrowed])
def test_the_forward_pass_of_a_caller_uses_what_training_changed(build):
    torch.manual_seed(0)
    model = build()
    fxlean.prune(model, 0.4, IMAGE)
    before = model(IMAGE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "orig" in name:
                parameter.mul_(3.0)
    assert not torch.equal(model(IMAGE), before)
    originals = {k: p for k, p in model.named_parameters() if k.endswith("_orig")}
    model(IMAGE).sum().backward()
    for name, parameter in originals.items():
        mask = dict(model.named_buffers())[name.removesuffix("_orig") + "_mask"]
        assert parameter.grad is None or not parameter.grad[mask == 0].any()


def test_all_modules_that_are_never_called_are_refreshed():
    torch.manual_seed(0)
    model = Listed()
    masks = {
        name: torch.rand(parameter.shape) < 0.5
        for name, parameter in model.named_parameters()
        if not name.startswith("last")
    }
    apply_masks(model, masks, frozenset({"", "last"}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model(IMAGE)
    for name, mask in masks.items():
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        assert torch.equal(getattr(module, key), getattr(module, f"{key}_orig") * mask)


def test_features_of_one_channel_are_masked_together():
    torch.manual_seed(0)
    linear = nn.Linear(16, 6)
    small = torch.rand(6, 4) < 0.4
    with torch.no_grad():
        linear.weight.view(6, 4, 4).copy_(torch.where(small, 1e-6, 1.0)[:, :, None])
    layers = [conv(3, 4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), linear, nn.Linear(6, 2)]
    model = nn.Sequential(*layers)
    fxlean.prune(model, 0.9, IMAGE, method="l1", include_linear=True)
    masked = linear.weight_mask.view(6, 4, 4) == 0
    assert masked.any()
    assert not masked[~small].any()
    assert torch.equal(masked.any(2), masked.all(2))


def test_a_parameter_in_two_modules_is_masked_in_both():
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4), conv(4, 4), nn.ReLU(), conv(4, 4), conv(4, 2, 1))
    model[3].weight = model[1].weight
    result = fxlean.prune(model, 0.4, IMAGE)
    assert [layer.name for layer in result.layers] == ["0", "1"]
    assert model[1].weight_orig is model[3].weight_orig
    for _ in range(2):
        train(model, (IMAGE,), 1)
        model(IMAGE)
        assert torch.equal(model[1].weight, model[3].weight)
        assert torch.equal(model[1].weight_mask, model[3].weight_mask)
        assert not model[1].weight[model[1].weight_mask == 0].any()


@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, nn.utils.weight_norm], ids=["new", "old"]
)
@pytest.mark.parametrize("ratio", [0.5, 0.2, 0.02])
def test_weight_norm_is_finite_and_masked(norm, ratio):
    torch.manual_seed(0)
    model = nn.Sequential(norm(conv(3, 4)), nn.ReLU(), norm(conv(4, 6)), norm(conv(6, 2, 1)))
    result = fxlean.prune(model, ratio, IMAGE, redundancy=False)
    assert result.kept >= int(ratio * result.total)
    assert any(not alive.any(1).all() for _, alive in effective_kernels(model, (IMAGE,)))
    count = result.kept + 12
    assert_masked(model, (IMAGE,), count)
    train(model, (IMAGE,))
    assert model(IMAGE).isfinite().all()
    assert_masked(model, (IMAGE,), count)


def test_weight_norm_of_transposed_convolutions_along_any_dimension():
    torch.manual_seed(0)
    for dim in (0, 1):
        layer = parametrizations.weight_norm(nn.ConvTranspose2d(3, 4, 2, stride=2), dim=dim)
        model = nn.Sequential(layer, nn.ReLU(), conv(4, 4), conv(4, 2, 1))
        result = fxlean.prune(model, 0.2, IMAGE, redundancy=False)
        assert_masked(model, (IMAGE,), result.kept + 8)


@pytest.mark.parametrize(
    "norm", [parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["new", "old"]
)
def test_spectral_norm_is_left_alone_and_told(norm):
    """Divided by its own norm, a weight that is all zero is not a number."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4), norm(conv(4, 4)), conv(4, 4), conv(4, 2, 1))
    result = fxlean.prune(model, 0.3, IMAGE)
    assert result.skipped["1"] == NORMED
    assert [layer.name for layer in result.layers] == ["0", "2"]
    assert model(IMAGE).isfinite().all()


class ScaledStandardised(StandardisedConv2d):
    """One with a gain, as in networks without normalisation."""

    def __init__(self, *args, gain):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), gain))

    def forward(self, input):
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        weight = self.gain * (self.weight - mean) / torch.sqrt(variance + 1e-5)
        return F.conv2d(input, weight, self.bias)


@pytest.mark.parametrize("zero", ["gain", "weight"])
def test_a_weight_that_is_zero_by_chance_is_not_taken_for_one_that_masks_can_zero(zero):
    """A gain may start at zero; trained, it would bring back what masks had removed."""
    torch.manual_seed(0)
    layer = ScaledStandardised(4, 4, 3, gain=1.0)
    with torch.no_grad():
        getattr(layer, zero).zero_()
    result = fxlean.prune(nn.Sequential(conv(3, 4), layer, conv(4, 4), conv(4, 2, 1)), 0.3, IMAGE)
    assert result.skipped["1"] == COMPUTED
    assert [row.name for row in result.layers] == ["0", "2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_mask_is_what_torch_puts_on(dtype):
    torch.manual_seed(0)
    layer = conv(3, 4).to(dtype)
    plain, mask = copy.deepcopy(layer), torch.rand(layer.weight.shape) < 0.5
    put_mask(layer, "weight", mask)
    torch_prune.custom_from_mask(plain, "weight", mask)
    for _ in range(2):  # as they are, and with another mask of torch's on top
        ours, theirs = layer.state_dict(), plain.state_dict()
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name])
            assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(layer.weight, plain.weight)
        (mine,), (other,) = (m._forward_pre_hooks.values() for m in (layer, plain))
        assert type(mine) is type(other)
        for module in (layer, plain):
            torch_prune.l1_unstructured(module, "weight", 0.3)
    for module in (layer, plain):
        torch_prune.remove(module, "weight")
    assert torch.equal(layer.weight, plain.weight)
    assert not layer._forward_pre_hooks


def test_masks_that_are_there_are_narrowed_and_not_wrapped():
    torch.manual_seed(0)
    model, inputs = make("residual")
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    torch_prune.random_unstructured(model.get_submodule(names[1]), "weight", 0.3)
    before = model.get_submodule(names[1]).weight_mask.clone()
    for ratio in (0.7, 0.5, 0.3):
        fxlean.prune(model, ratio, inputs)
        for module in model.modules():
            hooks = [
                hook._tensor_name
                for hook in module._forward_pre_hooks.values()
                if isinstance(hook, torch_prune.BasePruningMethod)
            ]
            assert len(hooks) == len(set(hooks))
            for name in hooks:  # without another forward pass
                masked = getattr(module, f"{name}_orig") * getattr(module, f"{name}_mask")
                assert torch.equal(getattr(module, name), masked)
            assert not any("orig_orig" in name for name, _ in module.named_parameters())
        now = model.get_submodule(names[1]).weight_mask
        assert not (now > before).any()
        before = now.clone()


def test_masks_of_other_hands_in_several_steps_are_respected():
    torch.manual_seed(0)
    layer = conv(4, 4)
    for _ in range(2):
        torch_prune.ln_structured(layer, "weight", 1, n=2, dim=0)
    model = nn.Sequential(conv(3, 4), layer, conv(4, 2, 1))
    mask = layer.weight_mask.clone()
    result = fxlean.prune(model, 0.5, IMAGE)
    assert not (layer.weight_mask > mask).any()
    assert result.selected >= int(0.5 * result.total)


@pytest.mark.parametrize("name", ["weight_norm", "pre_pruned", "shared_sequence", "functional"])
@torch.no_grad()  # deepcopy refuses the masked weights of a forward pass with gradients
def test_copies_and_state_dicts_carry_the_masks(name):
    model, inputs = make(name)
    fxlean.prune(model, 0.4, inputs)
    out = model(*inputs)
    assert torch.equal(copy.deepcopy(model)(*inputs), out)
    other, _ = make(name)
    fxlean.prune(other, 0.4, inputs, method="random")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(*inputs), out)


@pytest.mark.parametrize("name", sorted(set(ZOO) - {"weight_norm"}))
def test_remove_makes_the_masks_permanent(name):
    model, inputs = make(name)
    fxlean.prune(model, 0.4, inputs)
    with torch.no_grad():
        out = model(*inputs)
        for module in model.modules():
            for key in [k.removesuffix("_mask") for k in module._buffers if k.endswith("_mask")]:
                torch_prune.remove(module, key)
        assert not any(key.endswith(("_mask", "_orig")) for key in model.state_dict())
        again = model(*inputs)
    pairs = zip(*(x.values() if isinstance(x, dict) else x for x in (out, again)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_a_masked_channel_adds_is_masked_with_it():
    torch.manual_seed(0)
    model = nn.Sequential(conv_bn_relu(3, 4), conv_bn_relu(4, 4), conv(4, 2, 1)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.fill_(0.7)
        model[0][0].weight[2] = 1e-6
    fxlean.prune(model, 0.3, IMAGE, method="l1")
    assert not model[0](IMAGE)[:, 2].any()
    assert not dict(model.named_buffers())["0.1.bias_mask"][2]
    assert not dict(model.named_buffers())["0.1.weight_mask"][2]
