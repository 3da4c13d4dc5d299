"""Bad input: the message says what, where and what to do next, and the model stays as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrizations import spectral_norm

import fxlean
from tests.support.blocks import StandardisedConv2d
from tests.support.zoo import make


def snapshot(model):
    hooks = [list(module._forward_pre_hooks) for module in model.modules()]
    flags = [module.training for module in model.modules()]
    return copy.deepcopy(model.state_dict()), hooks, flags, torch.get_rng_state()


def assert_unchanged(model, before):
    state, hooks, flags, rng = before
    now = model.state_dict()
    assert list(now) == list(state)
    for name, value in state.items():
        assert torch.equal(now[name], value) or (value != value).any()
    assert [list(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), rng)


class Doubled(torch.Tensor):
    """A tensor that computes in its own way."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Doubled(args[0].inner)
        raise NotImplementedError


def with_weight(value):
    model, inputs = make("residual")
    convolutions = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        convolutions[1][1].weight[0, 0, 0, 0] = value
    return model, inputs, convolutions[1][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.0}, r"ratio is 0\.0\. .*above 0 and at most 1"),
        ({"ratio": 1.5}, r"ratio is 1\.5\. "),
        ({"ratio": torch.zeros(2, 3, 9, 9)}, r"ratio is a tensor of shape \(2, 3, 9, 9\)\. "),
        ({"ratio": list(range(99))}, r"ratio is a list\. "),
        ({"ratio": -0.1}, r"ratio is -0\.1\. "),
        ({"ratio": float("nan")}, r"ratio is nan\. "),
        ({"ratio": "0.5"}, r"ratio is '0\.5'\. "),
        ({"ratio": True}, r"ratio is True\. "),
        (
            {"method": "lan"},
            r"method is 'lan'\. Pass one of lean, path, relevance, spectral, l1, random",
        ),
        ({"method": ["lean"]}, r"method is \['lean'\]\. Pass one of lean, path"),
        ({"redundancy": "no"}, r"redundancy is 'no'\. Pass True or False"),
        ({"prune_outputs": 1}, r"prune_outputs is 1\. Pass True or False"),
        ({"include_linear": 1}, r"include_linear is 1\. Pass True or False"),
        ({"progress": "bar"}, r"progress is 'bar'\. Pass True or False"),
        ({"norm": "l7"}, r"norm is 'l7'\. Pass one of spectral, frobenius, nuclear, l1"),
        (
            {"ignore": ["stem", "*.nope"]},
            r"match nothing in .*'stem', '\*\.nope'\. .*named_modules",
        ),
        ({"ignore": nn.Linear(1, 1)}, r"match nothing"),
        ({"ignore": nn.Conv3d}, r"match nothing"),
        ({"example_inputs": torch.zeros(0, 3, 8, 8)}, r"empty tensor .*Pass at least one sample"),
        (
            {"example_inputs": Doubled(torch.zeros(1, 3, 8, 8))},
            r"holds a Doubled, .*Pass a torch\.T",
        ),
        ({"ignore": 5}, r"match nothing in Sequential: 5\. Pass names"),
        ({"ignore": [None]}, r"match nothing in Sequential: None\. "),
        (
            {"example_inputs": "image"},
            r"example_inputs is 'image', which holds no tensor\. Pass a tensor",
        ),
        (
            {"example_inputs": torch.zeros(1, 7, 8, 8)},
            r"rejects the example inputs \(1, 7, 8, 8\): RuntimeError.*Pass example_inputs that",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    model, inputs = make("residual")
    before = snapshot(model)
    given = {"ratio": 0.5, "example_inputs": inputs, **arguments}
    with pytest.raises(fxlean.ArgumentError, match=message):
        fxlean.prune(model, **given)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metod": "lean"}, r"^metod is no option\. Did you mean method\? Pass any of method, ig"),
        ({"xyz": 1}, r"^xyz is no option\. Pass any of method, ignore"),
        ({"ignore": "nope"}, r"match nothing in Sequential: 'nope'"),
        ({"at_least": {"nope": 0.5}}, r"^at_least entries match nothing in Sequential: 'nope'"),
        ({"method": {}}, r"method is \{\}\. Pass one of"),
        ({"redundancy": "no"}, r"redundancy is 'no'"),
        ({"example_inputs": "image"}, r"which holds no tensor"),
        ({"example_inputs": torch.zeros(1, 7, 8, 8)}, r"rejects the example inputs"),
    ],
)
def test_iterate_complains_at_the_call(options, message):
    model, inputs = make("residual")
    before = snapshot(model)
    with pytest.raises(fxlean.ArgumentError, match=message):
        fxlean.iterate(model, 0.5, 3, **{"example_inputs": inputs, **options})
    assert_unchanged(model, before)


def test_what_the_model_says_is_chained():
    model, _ = make("residual")
    with pytest.raises(ValueError, match="rejects") as caught:
        fxlean.prune(model, 0.5, torch.zeros(1, 7, 8, 8))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value):
    model, inputs, name = with_weight(value)
    before = snapshot(model)
    with pytest.raises(fxlean.ArgumentError, match=rf"NaN or infinity in: {name}\. Repair"):
        fxlean.prune(model, 0.5, inputs)
    assert_unchanged(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_biases_that_are_no_numbers(value):
    model, inputs = make("classifier")
    with torch.no_grad():
        model[0][1].bias[1] = value
    before = snapshot(model)
    with pytest.raises(fxlean.ArgumentError, match=r"biases .* NaN or infinity in: 0\.1\. Repair"):
        fxlean.prune(model, 0.5, inputs)
    assert_unchanged(model, before)


def with_strange_weight():
    model, _ = make("residual")
    model[0][0].weight = nn.Parameter(Doubled(model[0][0].weight.detach()))
    return model


def with_script():
    model, _ = make("residual")
    model[0][2] = torch.jit.script(nn.ReLU())
    return model


def observed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)).eval()
    model.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    return torch.ao.quantization.prepare(model)


def quantisation_aware():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)).train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(model)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)).to(torch.complex64),
            r"complex weights: 0, 1\. .*keep real and imaginary parts",
        ),
        (with_strange_weight, r"0\.0\.weight: of type Doubled, .*Prune the model before"),
        (with_script, r"compiled by TorchScript.*: 0\.2\. Prune with the original modules"),
        (quantisation_aware, r"prepared for quantisation.*: 0\..*Prune the model before torch\.ao"),
        (observed, r"prepared for quantisation.*: 0\..*Prune the model before torch\.ao"),
        (lambda: "resnet18", r"model is a str\. Pass a torch\.nn\.Module"),
        (lambda: nn.Linear(3, 4), r"Linear has no parameter that could be a convolution kernel"),
        (
            lambda: nn.Conv2d(3, 4, 3),
            r"no convolution to prune \(.*produces the model's output .*\)\. "
            r"Pass prune_outputs=True to prune the layers that make the output\.$",
        ),
        (
            lambda: nn.Sequential(StandardisedConv2d(3, 3, 1), nn.Flatten(), nn.Linear(768, 2)),
            r"no convolution to prune \(.*weight standardisation.*\)\. "
            r"Pass include_linear=True to prune linear layers\.$",
        ),
        (
            lambda: nn.Sequential(*[StandardisedConv2d(3, 3, 1) for _ in range(5)]),
            r"no convolution to prune \(0, 1, 2 and 2 more: its weight is a buffer, or computed so"
            r".*weight standardisation; a layer that has the computed weight.*Change what keeps",
        ),
        (
            lambda: spectral_norm(nn.Conv2d(3, 4, 3)),
            r"no convolution to prune \(.*divided by a norm.*spectral norm; .*remove_parametriz",
        ),
        (lambda: nn.Conv2d(3, 4, 3, device="meta"), r"meta device .*: weight, bias\. Load weights"),
        (lambda: nn.LazyConv2d(4, 3), r"no shape yet: weight, bias\. Run the model once"),
        (lambda: torch.jit.script(nn.Conv2d(3, 4, 3)), r"TorchScript.*Prune the original module"),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*",
    "ignore:Lazy modules",
    "ignore:Complex modules",
    "ignore:torch.ao.quantization",
    "ignore:Please use quant_min",
)
def test_models_that_cannot_be_pruned(build, message):
    model = build()
    before = copy.copy(vars(model)) if isinstance(model, nn.Module) else {}
    with pytest.raises(fxlean.ArgumentError, match=message):
        fxlean.prune(model, 0.5)
    assert not before or vars(model) == before


def test_a_model_of_other_layers():
    with pytest.raises(fxlean.ArgumentError, match=r"\(none was found\)\. Only weights of conv"):
        fxlean.prune(nn.LSTM(8, 4), 0.5, torch.zeros(3, 2, 8))


def test_no_size_fits():
    class Picky(nn.Conv2d):
        def forward(self, x):
            raise RuntimeError("only 7 pixels")

    with pytest.raises(
        fxlean.TraceError, match=r"none of the inputs tried .*64.*only 7 pixels.*Pas"
    ):
        fxlean.prune(Picky(3, 4, 3), 0.5)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True])
def test_bad_steps_are_told_at_the_call(steps):
    model, inputs = make("residual")
    with pytest.raises(fxlean.ArgumentError, match="steps is"):
        fxlean.iterate(model, 0.5, steps, inputs)


def test_a_bad_ratio_of_iterate_is_told_at_the_call():
    model, inputs = make("residual")
    with pytest.raises(fxlean.ArgumentError, match="ratio is 2"):
        fxlean.iterate(model, 2, 3, inputs)


def test_a_failure_while_masking_leaves_the_model_as_it_was(monkeypatch):
    model, inputs = make("pre_pruned")
    model.train()
    before = snapshot(model)
    original, calls = torch_prune.CustomFromMask, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("no room for a mask")
        return original(*args, **kwargs)

    monkeypatch.setattr(torch_prune, "CustomFromMask", failing)
    with pytest.raises(MemoryError):
        fxlean.prune(model, 0.3, inputs)
    assert len(calls) == 3
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (1e-9, r"the ratio leaves none of the 100 kernels, so the output is constant\. Keep more"),
        (0.02, r"2 kernels that random selected connect no input to an output.*fxlean\.iterate"),
    ],
)
def test_a_model_of_which_nothing_is_left(ratio, message):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(5, 5, 1) for _ in range(5)])
    with pytest.warns(fxlean.PruneWarning, match=message):
        fxlean.prune(model, ratio, torch.zeros(1, 5, 4, 4), method="random")


class Normed(nn.Module):
    """Every channel over its own norm, with nothing added to that."""

    def forward(self, x):
        return x / x.norm(dim=(2, 3), keepdim=True)


@pytest.mark.parametrize("masked", [False, True])
def test_masks_that_make_the_outputs_no_numbers_are_refused(masked):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, bias=False), Normed(), nn.Conv2d(16, 4, 3), nn.Conv2d(4, 2, 1)
    model, x = nn.Sequential(*layers), torch.randn(1, 3, 8, 8)
    if masked:
        fxlean.prune(model, 0.9, x, method="random")
    before = snapshot(model)
    with pytest.raises(
        fxlean.ArgumentError,
        match=r"Sequential returns NaN or infinity, as 1 does where a channel is zero\. Add a",
    ):
        fxlean.prune(model, 0.05, x, method="l1")
    assert_unchanged(model, before)
