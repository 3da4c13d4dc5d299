"""Repair over all kinds of networks: what it changes, what it must not, and that it helps."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import fxlean
from fxlean.calibration import corrections, repair_model, running
from fxlean.tracing.sandbox import copied
from tests.support.blocks import conv, pre_activation
from tests.support.calibrated import batches_like, residual_network
from tests.support.compare import same_state, state
from tests.support.zoo import ZOO, make, randomise_norms


def pruned(model, ratio, x, **options):
    reference = copy.deepcopy(model)
    fxlean.prune(model, ratio, x[:1], method="path", **options)
    return reference


def shape_free(name):
    """A network and batches of the size of its example inputs, which some networks need."""
    model, inputs = make(name)
    return model, batches_like(inputs, samples=inputs[0].shape[0])


@pytest.mark.parametrize("name", ZOO)
def test_with_nothing_pruned_nothing_changes(name):
    model, batches = shape_free(name)
    before = state(model)
    result = fxlean.repair(model, batches, copied(model))
    assert same_state(model.state_dict(), before)
    assert result.before == result.after == 0
    assert all(layer.before == layer.after == 0 for layer in result.layers)


@pytest.mark.filterwarnings("ignore:no rule for")
@pytest.mark.parametrize("name", ZOO)
def test_what_repair_must_not_change(name):
    model, batches = shape_free(name)
    reference = copied(model)
    fxlean.prune(model, 0.6, batches[0], method="path")
    before, training = state(model), model.training
    result = fxlean.repair(model, batches, reference)
    assert result.after <= result.before
    assert all(layer.after <= layer.before for layer in result.layers)
    assert model.training is training
    for key, value in model.state_dict().items():
        assert value.dtype == before[key].dtype
        if key.endswith("_mask") or "running_var" in key or "num_batches" in key:
            assert torch.equal(value, before[key]), key
        elif key.endswith("_orig"):
            mask = before[f"{key.removesuffix('_orig')}_mask"]
            assert torch.equal(value[mask == 0], before[key][mask == 0]), key
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                effective = getattr(module, hook._tensor_name)
                assert not effective[getattr(module, f"{hook._tensor_name}_mask") == 0].any()
                assert torch.equal(effective, hook.apply_mask(module))


@pytest.mark.parametrize("name", ["residual", "strided", "no_norm", "u_net"])
def test_repair_helps(name):
    model, inputs = make(name)
    batches = batches_like(inputs, samples=32)
    reference = copied(model)
    fxlean.prune(model, 0.6, inputs, method="path")
    unrepaired = copied(model)
    result = fxlean.repair(model, batches, reference)
    assert result.after < 0.9 * result.before
    (fresh,) = torch.randn(64, *inputs[0].shape[1:]).unsqueeze(0)
    with torch.no_grad():
        wanted = reference(fresh)
        before, after = ((m(fresh) - wanted).square().mean() for m in (unrepaired, model))
    assert after < 0.9 * before


class Queries(nn.Module):
    """Adds what learned queries say, which a norm reads that no image reaches."""

    def __init__(self, norm):
        super().__init__()
        self.encode = nn.Sequential(conv(3, 24), nn.ReLU(), conv(24, 8))
        self.queries, self.norm = nn.Parameter(torch.randn(5, 8)), norm
        self.last = conv(8, 3, 1)

    def forward(self, x):
        said = self.norm(self.queries).mean(0)
        return self.last(self.encode(x) + said[:, None, None])


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.BatchNorm1d(8)])
def test_norms_of_constants_stay(norm):
    torch.manual_seed(0)
    model, x = Queries(norm).eval(), torch.randn(16, 3, 8, 8)
    reference = pruned(model, 0.5, x)
    before = state(norm)
    result = fxlean.repair(model, x, reference)
    assert result.after < result.before
    assert same_state(norm.state_dict(), before)


class Sampling(nn.Module):
    """A network that adds noise to what it has encoded, of a shape or like a value."""

    def __init__(self, drawn):
        super().__init__()
        self.encode = nn.Sequential(conv(1, 24), nn.ReLU(), conv(24, 24), nn.ReLU(), conv(24, 6, 1))
        self.decode = nn.Sequential(conv(6, 16), nn.ReLU(), conv(16, 1, 1))
        self.drawn = drawn

    def forward(self, x):
        code = self.encode(x)
        return self.decode(code + 0.5 * self.drawn(code))


@pytest.mark.parametrize("drawn", [torch.randn_like, lambda code: torch.randn(code.shape)])
def test_both_networks_draw_the_same_numbers(drawn):
    torch.manual_seed(0)
    model, x = Sampling(drawn).eval(), torch.randn(64, 1, 12, 12)
    unchanged = fxlean.repair(model, x, copied(model))
    assert all(layer.before == 0 for layer in unchanged.layers)
    reference = pruned(model, 0.5, x, ignore=["encode.4", "decode.*"])
    state_before = torch.get_rng_state()
    result = fxlean.repair(model, x, reference)
    assert torch.equal(torch.get_rng_state(), state_before)
    assert result.after < 0.7 * result.before
    assert all(layer.before < 0.5 for layer in result.layers if "decode" in layer.name)


def test_the_result_is_a_table():
    model, x = residual_network()
    result = fxlean.repair(model, x, pruned(model, 0.5, x))
    lines = str(result).splitlines()
    assert lines[0].split() == ["layer", "before", "after"]
    assert lines[1].split()[0] == "0.0"
    assert lines[-3].split()[0] == "outputs"
    assert lines[-1].startswith("relative errors on 8 held-out samples, repaired on 24")
    data = result.to_dict()
    assert data["layers"][0]["name"] == "0.0"
    assert data["after"] == result.after


def test_the_model_with_its_masks_off_is_the_default_reference():
    model, x = residual_network()
    reference = pruned(model, 0.5, x)
    other = copied(model)
    given, default = fxlean.repair(model, x, reference), fxlean.repair(other, x)
    assert same_state(model.state_dict(), other.state_dict())
    assert (given.before, given.after) == (default.before, default.after)


@pytest.mark.parametrize("batches", [lambda x: x, lambda x: list(x.split(1))])
def test_errors_on_four_samples_are_relative_to_the_variance_of_two(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    x = torch.randn(4, 3, 6, 6)
    pruned(model, 0.5, x)
    result = fxlean.repair(model, batches(x))
    assert (result.samples, result.held) == (2, 2)
    assert result.after <= result.before < float("inf")
    assert repr(result).endswith("on 2 held-out samples)")


def changed_by_training(model, x):
    model(x).square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.grad is not None], 0.1).step()


def changed_statistics(model, x):
    model.train()(x)
    model.eval()


@pytest.mark.parametrize(
    "change",
    [
        changed_by_training,
        changed_statistics,
        fxlean.repair,
        lambda model, x: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}),
    ],
)
def test_a_model_that_has_changed_needs_a_reference(change):
    model, x = residual_network()
    pruned(model, 0.5, x)
    change(model, x)
    with pytest.raises(
        fxlean.ArgumentError, match=r"(?s)has changed since.*Pass that as reference"
    ):
        fxlean.repair(model, x)
    fxlean.prune(model, 0.3, x[:1], method="path")  # does not make it the unpruned network
    with pytest.raises(fxlean.ArgumentError, match="has changed since"):
        fxlean.repair(model, x)


def test_masks_of_others_need_a_reference():
    model, x = residual_network()
    prune.l1_unstructured(model[0][0], "weight", 0.5)
    with torch.no_grad():
        model(x)
    with pytest.raises(fxlean.ArgumentError, match="they are not from fxlean"):
        fxlean.repair(model, x)


def test_pruning_twice_and_copying_change_nothing_but_masks():
    model, x = residual_network()
    reference = pruned(model, 0.7, x)
    fxlean.prune(model, 0.5, x[:1], method="path")
    model = copied(model)
    other = copied(model)
    fxlean.repair(model, x)
    fxlean.repair(other, x, reference)
    assert same_state(model.state_dict(), other.state_dict())


def test_frozen_parameters_stay():
    model, x = residual_network()
    reference = pruned(model, 0.5, x)
    frozen = model[1].branches[0][0][0].requires_grad_(False)
    before = state(frozen)
    result = fxlean.repair(model, x, reference)
    assert result.skipped == {"1.branches.0.0.0": "its weight does not require gradients"}
    assert same_state(frozen.state_dict(), before)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    with pytest.raises(
        fxlean.ArgumentError, match=r"no layer that can be repaired \(its weight does"
    ):
        fxlean.repair(model.requires_grad_(False), x, reference)


def as_buffers(norm):
    """Scale and shift in buffers, as in the frozen norms of detection libraries."""
    for name in ("weight", "bias"):
        value = getattr(norm, name).data
        delattr(norm, name)
        norm.register_buffer(name, value)


@pytest.mark.parametrize("freeze", [lambda norm: norm.requires_grad_(False), as_buffers])
def test_running_means_of_frozen_norms_stay(freeze):
    model, x = residual_network()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    freeze(norms[0])  # reads a layer without a bias
    reference = pruned(model, 0.5, x)
    before = [norm.running_mean.clone() for norm in norms]
    result = fxlean.repair(model, x, reference)
    assert result.after < result.before
    changed = [not norm.running_mean.equal(m) for norm, m in zip(norms, before, strict=True)]
    assert not changed[0]
    assert any(changed)


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_the_order_of_elements_in_memory_makes_no_difference(order):
    model, x = residual_network()
    other = copy.deepcopy(model).to(memory_format=order)
    weight = other[3].weight
    other[3].weight = nn.Parameter(weight.transpose(0, 1).contiguous().transpose(0, 1))
    for network in (model, other):
        pruned(network, 0.5, x)
    layouts = {name: tensor.stride() for name, tensor in other.named_parameters()}
    result, expected = fxlean.repair(other, x.to(memory_format=order)), fxlean.repair(model, x)
    assert result.after == pytest.approx(expected.after, rel=1e-3)
    for name, tensor in other.named_parameters():
        assert tensor.stride() == layouts[name]
        torch.testing.assert_close(tensor, model.get_parameter(name), atol=1e-3, rtol=1e-3)


def test_errors_of_layers_are_of_what_is_left():
    model, x = residual_network()
    reference = copy.deepcopy(model)
    first, gone = model[0][0], model[2].branches[0][0][0]
    for layer, channels in ((first, slice(4, None)), (gone, slice(None))):
        mask = torch.ones_like(layer.weight)
        mask[channels] = 0
        prune.custom_from_mask(layer, "weight", mask)
    result = fxlean.repair(model, x, reference)
    assert result.layers[0] == corrections.LayerError("0.0", 0, 0)
    assert result.skipped == {"2.branches.0.0.0": "none of its kernels is left"}


def test_without_steps_only_constants_change():
    model, x = residual_network()
    reference = pruned(model, 0.3, x)
    before = state(model)
    result = fxlean.repair(model, x, reference, steps=0)
    assert result.after < result.before
    changed = [name for name in before if not torch.equal(model.state_dict()[name], before[name])]
    assert changed
    assert all(name.endswith(("bias", "running_mean")) for name in changed)


def test_kernels_without_masks_stay_zero():
    model, x = residual_network()
    reference = pruned(model, 0.4, x)
    for module in list(model.modules()):
        for name in [key.removesuffix("_orig") for key in module._parameters if "_orig" in key]:
            prune.remove(module, name)
    before = state(model)
    result = fxlean.repair(model, x, reference)
    assert result.after < 0.9 * result.before
    for key, value in model.state_dict().items():
        if value.dim() == 4:
            zero = (before[key] == 0).flatten(2).all(2)
            assert zero.any() or key == "3.weight"
            assert not value[zero].any(), key


def test_computed_layers_stay():
    model, inputs = make("weight_norm")
    reference = copied(model)
    fxlean.prune(model, 0.5, inputs, method="path")
    result = fxlean.repair(model, batches_like(inputs), reference)
    assert any("computed" in found for found in result.skipped.values())
    assert "skipped: " in str(result)


@pytest.mark.parametrize("name", ["before", "behind"])
def test_constants_without_a_bias_go_into_running_means(name):
    """Of the batch norm behind the convolution, or behind the sum that reads it."""
    torch.manual_seed(0)
    if name == "before":
        model = nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 4), conv(4, 2, 1))
    else:
        model = nn.Sequential(conv(3, 6), pre_activation(conv(6, 6)), nn.BatchNorm2d(6), conv(6, 2))
    randomise_norms(model.eval())
    x = torch.rand(64, 3, 8, 8)
    reference = pruned(model, 0.5, x)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    means = [norm.running_mean.clone() for norm in norms]
    fxlean.repair(model, x, reference)
    assert any(
        not torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, means, strict=True)
    )
    twins = [module for module in reference.modules() if isinstance(module, nn.BatchNorm2d)]
    seen = []
    for norm in (*norms, *twins):
        norm.register_forward_hook(lambda *call: seen.append(call[2].mean((0, 2, 3))))
    with torch.no_grad():
        model(x), reference(x)
    for ours, theirs in zip(seen[: len(norms)], seen[len(norms) :], strict=True):
        alive = ours != 0
        torch.testing.assert_close(ours[alive], theirs[alive], atol=0.05, rtol=0)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_after_an_error_the_model_is_as_it_was(monkeypatch, failure):
    model, x = residual_network()
    reference = pruned(model, 0.5, x)
    before, calls = state(model), []

    def fail(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise failure
        return correct(*args, **options)

    correct = corrections.correct
    monkeypatch.setattr(corrections, "correct", fail)
    with pytest.raises(failure):
        fxlean.repair(model, x, reference)
    assert len(calls) == 3
    assert same_state(model.state_dict(), before)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_repair_that_makes_the_outputs_worse_is_undone(monkeypatch):
    model, x = residual_network()
    reference = pruned(model, 0.5, x)
    before = state(model)
    errors = iter([(0.25, 1.0), (0.36, 1.0)])
    monkeypatch.setattr(repair_model, "output_error", lambda *_: next(errors))
    result = fxlean.repair(model, x, reference)
    assert (result.before, result.after) == (0.5, 0.5)
    assert all(layer.before == layer.after for layer in result.layers)
    assert same_state(model.state_dict(), before)


@pytest.mark.parametrize("batch", [1, 5])
def test_loaders_with_labels_and_batches_of_any_size(batch):
    model, x = residual_network()
    reference = pruned(model, 0.5, x)
    loader = DataLoader(TensorDataset(x[:9], torch.arange(9)), batch)
    result = fxlean.repair(model, loader, reference)
    assert result.after < result.before
    assert result.samples + result.held == 9
    assert result.held == 2


def test_noise_in_place_of_batches():
    model, x = residual_network()
    reference = pruned(model, 0.5, x)
    assert fxlean.repair(model, None, reference).samples == 192
    with torch.no_grad():
        error = (model(x) - reference(x)).square().mean() / reference(x).var()
    assert error < 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype):
    model, x = residual_network()
    model, x = model.to(dtype), x.to(dtype)
    reference = pruned(model, 0.5, x)
    result = fxlean.repair(model, x, reference)
    assert result.after < 0.9 * result.before
    assert all(parameter.dtype == dtype for parameter in model.parameters())


def test_a_model_that_traces_in_parts_is_repaired_part_by_part():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 6))
            self.last = nn.Sequential(conv(6, 6), nn.ReLU(), conv(6, 2, 1))

        def forward(self, x):
            x = self.first(x)
            return self.last(x if x.sum() > -1e9 else F.relu(x))

    torch.manual_seed(0)
    model, x = Parts().eval(), torch.randn(32, 3, 8, 8)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        reference = pruned(model, 0.5, x)
        result = fxlean.repair(model, [x[:16], x[16:]], reference)
    assert [str(warning.message)[:32] for warning in told] == [
        "Parts does not trace as a whole:"
    ] * 2
    assert len({warning.lineno for warning in told}) == 2
    assert [layer.name for layer in result.layers] == ["first.0", "first.2", "last.0", "last.2"]
    assert result.after < 0.9 * result.before


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            nn.Sequential(conv(3, 4)),
            r"(?s)reference Sequential has 1 layers where the model has 11",
        ),
        (3, "reference is a int. Pass a torch.nn.Module"),
    ],
)
def test_references_that_do_not_fit(reference, message):
    model, x = residual_network()
    pruned(model, 0.5, x)
    with pytest.raises(fxlean.ArgumentError, match=message):
        fxlean.repair(model, x, reference)


@pytest.mark.parametrize("steps", [-1, 2.5, True])
def test_arguments_of_repair_that_make_no_sense(steps):
    model, x = residual_network()
    reference = pruned(model, 0.5, x)
    with pytest.raises(fxlean.ArgumentError, match=rf"steps is {steps}\. Pass a whole .*least 0"):
        fxlean.repair(model, x, reference, steps=steps)
    with pytest.raises(fxlean.ArgumentError, match="reference is the model itself"):
        fxlean.repair(model, x, model)


def test_a_broken_reference_is_told_by_layer():
    model, x = residual_network()
    reference = pruned(model, 0.5, x)
    before = state(model)
    with torch.no_grad():
        reference[1].branches[0][0][0].weight[0, 0] = float("nan")
    with pytest.raises(
        fxlean.ArgumentError, match=r"gives NaN or infinity at 1\.branches\.0\.0\.0"
    ):
        fxlean.repair(model, x, reference)
    assert same_state(model.state_dict(), before)


def test_one_sample_is_not_enough():
    model, x = residual_network()
    reference = pruned(model, 0.5, x)
    with pytest.raises(fxlean.ArgumentError, match="Pass at least two"):
        fxlean.repair(model, x[:1], reference)


def test_rounds_of_pruning_and_repair():
    model, x = residual_network()
    once, reference = copy.deepcopy(model), copy.deepcopy(model)
    options = {"method": "relevance", "calibration": x, "repair": True}
    (single,) = fxlean.iterate(once, 0.3, 1, **options)
    results = list(fxlean.iterate(model, 0.3, 4, **options))
    assert results[-1].repair.after < single.repair.after
    assert "repaired: relative error of the outputs" in str(results[-1])
    assert results[-1].to_dict()["repair"]["after"] == results[-1].repair.after
    with torch.no_grad():
        error = (model(x) - reference(x)).square().mean() / reference(x).var()
    assert error.sqrt() < 1.5 * results[-1].repair.after


def test_rounds_trace_the_reference_once(monkeypatch):
    model, x = residual_network()
    traced, trace = [], running.trace_model
    monkeypatch.setattr(
        running,
        "trace_model",
        lambda network, *given: traced.append(network) or trace(network, *given),
    )
    list(fxlean.iterate(model, 0.5, 3, method="l1", calibration=x, repair=True))
    assert sum(network is not model for network in traced) == 1


def test_rounds_on_noise_and_with_batches_that_are_read_once():
    for calibration in (None, iter(torch.randn(4, 8, 3, 8, 8))):
        model, _ = residual_network()
        options = {"method": "relevance", "calibration": calibration, "repair": True}
        results = list(fxlean.iterate(model, 0.4, 2, **options))
        assert all(result.repair.after < result.repair.before for result in results)
        assert results[0].calibration == ("noise" if calibration is None else "batches")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("done", [0, 1])
def test_a_step_whose_repair_fails_is_none(monkeypatch, failure, done):
    def fail(*_):
        raise failure

    model, x = residual_network()
    steps = fxlean.iterate(model, 0.3, 3, method="l1", calibration=x, repair=True)
    for _ in range(done):
        next(steps)
    before, attributes = state(model), set(vars(model[0][0]))
    monkeypatch.setattr(repair_model, "correct_layer", fail)
    with pytest.raises(failure):
        next(steps)
    assert same_state(model.state_dict(), before)
    assert set(vars(model[0][0])) == attributes


def test_rounds_of_a_frozen_model_are_refused_at_the_call():
    model, x = residual_network()
    model.requires_grad_(False)
    before = state(model)
    message = r"no parameter of Sequential requires grad.*model\.requires_grad_\(True\) for all"
    with pytest.raises(fxlean.ArgumentError, match=message):
        fxlean.iterate(model, 0.3, 3, method="l1", calibration=x, repair=True)
    assert same_state(model.state_dict(), before)


def test_noise_of_the_shape_of_the_example_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.Flatten(), nn.Linear(8 * 25, 3))
    x = torch.randn(1, 3, 5, 5)
    fxlean.prune(model, 0.6, x, method="path")
    with pytest.raises(fxlean.ArgumentError, match=r"Pass example_inputs, or batches"):
        fxlean.repair(model)
    assert fxlean.repair(model, example_inputs=x).after < 1
