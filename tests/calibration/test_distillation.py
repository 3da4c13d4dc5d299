"""Training towards the unpruned network, on masked and on compacted models."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxlean
from fxlean.calibration import distillation
from fxlean.calibration.statistics import measure_statistics
from tests.support.blocks import Outputs, conv, conv_bn_relu, residual
from tests.support.compare import same_state, state
from tests.support.zoo import randomise_norms

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    block = residual(nn.Sequential(*conv_bn_relu(8, 8), nn.Dropout(), conv(8, 8)))
    model = nn.Sequential(conv_bn_relu(3, 8), block, conv(8, 2, 1, bias=True)).eval()
    randomise_norms(model)
    reference = copy.deepcopy(model)
    fxlean.prune(model, 0.5, X[:1], method="path")
    return model, reference


@torch.no_grad()
def error(model, reference):
    wanted = reference.eval()(X)
    return ((model.eval()(X) - wanted).square().mean() / wanted.var()).item()


@pytest.mark.parametrize("form", ["masked", "compacted"])
def test_the_outputs_come_nearer(form):
    model, reference = network()
    if form == "compacted":
        model = fxlean.compact(model, X[:1])
    before, kept = error(model, reference), state(reference)
    masks = {key: value for key, value in state(model).items() if key.endswith("_mask")}
    fxlean.distill(model, X.split(16), reference, 100, rate=0.01)
    assert error(model, reference) < 0.5 * before
    assert same_state(reference.state_dict(), kept)
    after = model.state_dict()
    assert all(torch.equal(after[key], mask) for key, mask in masks.items())
    copy.deepcopy(model)  # which a computed weight with gradients would refuse


def test_loaders_with_labels_and_several_outputs():
    torch.manual_seed(0)
    model = Outputs(("near", "deep")).eval()
    reference = copy.deepcopy(model)
    fxlean.prune(model, 0.6, X[:1], method="path")
    loader = DataLoader(TensorDataset(X, torch.zeros(64)), 16)

    def errors():
        with torch.no_grad():
            ours, theirs = model(X), reference(X)
        return [(ours[key] - theirs[key]).square().mean() for key in ours]

    before = errors()
    fxlean.distill(model, loader, reference, 100, rate=0.01)
    assert all(now < 0.7 * then for now, then in zip(errors(), before, strict=True))


def test_what_stays_as_it_was():
    model, reference = network()
    frozen = model[2].requires_grad_(False)
    before, flags = state(frozen), []
    model[0].train()
    model[0][0].weight_orig.grad = given = torch.ones(8, 3, 3, 3)
    model[1].branches[0].register_forward_hook(lambda module, *_: flags.append(module[3].training))
    fxlean.distill(model, X, reference, 60, rate=0.01)
    assert same_state(frozen.state_dict(), before)
    assert model[0].training
    assert not model.training
    assert model[0][0].weight_orig.grad is given
    assert not any(flags), "dropout is in training mode"
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.momentum == 0.1 for norm in norms)


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        (0, {}, "steps is 0. Pass a whole number"),
        (2.5, {}, "steps is 2.5"),
        (5, {"rate": 0}, "rate is 0. Pass a positive number"),
        (9, {"rate": 1e30}, "(?s)the error is (nan|inf) at step [1-9]. Pass a smaller rate"),
        (
            5,
            {"reference": conv(3, 5)},
            r"returns shapes \[\(16, 2, 8, 8\)\], the reference \[\(16, 5",
        ),
        (5, {"reference": None}, "reference is a NoneType. Pass a torch.nn.Module"),
        (5, {"batches": X[:, :2]}, "Sequential rejects batch 0"),
    ],
)
def test_arguments_that_make_no_sense(steps, options, message):
    model, reference = network()
    before = state(model)
    given = {"batches": X.split(16), "reference": reference, **options}
    with pytest.raises(fxlean.ArgumentError, match=message):
        fxlean.distill(model, given.pop("batches"), given.pop("reference"), steps, **given)
    assert same_state(model.state_dict(), before)


def test_a_model_is_not_its_own_reference():
    model, _ = network()
    with pytest.raises(fxlean.ArgumentError, match="reference is the model itself"):
        fxlean.distill(model, X.split(16), model, 5)


def test_nothing_to_train():
    model, reference = network()
    with pytest.raises(fxlean.ArgumentError, match="no parameter of Sequential requires gradients"):
        fxlean.distill(model.requires_grad_(False), X, reference, 1)


def test_weights_that_are_too_coarse_to_train():
    model, reference = (each.half() for each in network())
    with pytest.raises(ValueError, match=r"is in float16.*model.float\(\)"):
        fxlean.distill(model, X.half(), reference, 2)
    with pytest.raises(ValueError, match="is in float16"):
        fxlean.shrink(reference, 0.5, X.half(), distill=2)


def regressor(form):
    """A network that gives a number for each sample; `form` makes of it what the model returns."""

    class Regressor(nn.Module):
        def __init__(self):
            super().__init__()
            body = [conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
            self.body = nn.Sequential(*body, nn.Flatten(), nn.Linear(8, 1))

            self._form = form

        def forward(self, x):
            return self._form(self.body(x))

    torch.manual_seed(0)
    model = Regressor().eval()
    reference = copy.deepcopy(model)
    fxlean.prune(model, 0.5, X[:1], method="path")
    return model, reference


@pytest.mark.parametrize("size", [[64], [1] * 64, [63, 1]])
def test_the_split_into_batches_does_not_change_what_an_error_is_relative_to(size):
    model, reference = regressor(lambda y: y)
    before = error(model, reference)
    fxlean.distill(model, X.split(size), reference, 100)
    assert error(model, reference) < 0.5 * before


def test_what_is_constant_does_not_count():
    mask = torch.tensor([[0.0, -torch.inf]])
    ours, theirs = regressor(
        lambda y: (y, torch.ones(3) / 3, y.softmax(1), y[:0], mask.expand(len(y), 2))
    )
    plain, _ = regressor(lambda y: y)
    fxlean.distill(ours, X.split(16), theirs, 20)
    fxlean.distill(plain, X.split(16), regressor(lambda y: y)[1], 20)
    assert same_state(ours.state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda y: y.argmax(1), r"returns no floating-point tensor.*such as logits"),
        (lambda y: y.softmax(1), r"does not vary over the batches.*Pass more"),
        (lambda y: y.detach(), "does not depend on a parameter that requires gradients"),
    ],
)
def test_outputs_that_say_nothing(form, message):
    model, reference = regressor(form)
    before = state(model)
    with pytest.raises(fxlean.ArgumentError, match=message):
        fxlean.distill(model, X, reference, 3)
    assert same_state(model.state_dict(), before)


def test_a_training_that_makes_it_worse_is_undone():
    model, reference = network()
    before = state(model)
    with pytest.warns(fxlean.PruneWarning, match=r"relative error of the outputs of Seq.*put back"):
        fxlean.distill(model, X.split(16), reference, 3, rate=1.0)
    assert same_state(model.state_dict(), before)


def test_infinite_logits_do_not_spoil_the_others():
    mask = torch.tensor([[True] + [False] * 7])
    errors = []
    for fill in (-torch.inf, 0.0):
        model, reference = regressor(lambda y, f=fill: y.expand(-1, 8).masked_fill(mask, f))
        fxlean.distill(model, X.split(16), reference, 20)
        model._form = reference._form = lambda y: y
        errors.append(error(model, reference))
    assert errors[0] == pytest.approx(errors[1], rel=0.2)
    assert errors[0] < 0.9 * error(*regressor(lambda y: y))


def test_a_training_inside_autocast_is_as_outside():
    (model, reference), (twin, _) = network(), network()
    fxlean.distill(twin, X.split(16), reference, 60, rate=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fxlean.distill(model, X.split(16), reference, 60, rate=0.01)
    assert same_state(model.state_dict(), twin.state_dict())


def test_a_buffer_that_gradients_flow_into_is_put_back():
    class Averaging(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body
            self.register_buffer("average", torch.zeros(2, 8, 8))

        def forward(self, x):
            y = self.body(x)
            return y - self.average.mul_(0.9).add_(0.1 * y.mean(0))

    model, reference = map(Averaging, network())
    before = state(model)
    with pytest.raises(RuntimeError, match="second time"):
        fxlean.distill(model, X.split(16), reference, 3)
    assert same_state(model.state_dict(), before)
    assert not model.average.requires_grad


@pytest.mark.parametrize("rate", [1.0, 1e30])
def test_what_a_model_assigns_as_it_runs_is_put_back_as_well(rate):
    class Counting(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count = self.count + 1
            return self.body(x)

    model, reference = map(Counting, network())
    before = state(model)
    result = pytest.warns(fxlean.PruneWarning, match="put back")
    if rate > 1:
        result = pytest.raises(fxlean.ArgumentError, match="Pass a smaller rate")
    with result:
        fxlean.distill(model, X.split(16), reference, 5, rate=rate)
    assert same_state(model.state_dict(), before)


def test_batches_of_one_sample_that_batch_norms_refuse():
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 2)]
    reference = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), *head).eval()
    model = copy.deepcopy(reference)
    fxlean.prune(model, 0.6, X[:1], method="path")
    before = state(model)
    message = r"rejects batch 4, \(1, 3, 8, 8\), with its batch norms in training mode.*drop_last"
    with pytest.raises(fxlean.ArgumentError, match=message):
        fxlean.distill(model, [*X.split(16), X[:1]], reference, 9)
    assert same_state(model.state_dict(), before)
    with pytest.raises(fxlean.ArgumentError, match="in training mode"):
        fxlean.shrink(reference, 0.5, [*X.split(16), X[:1]], distill=9)


def test_a_reference_that_does_not_take_the_batches():
    model, reference = network()
    for function in (fxlean.repair, lambda *given: fxlean.distill(*given, 3)):
        with pytest.raises(fxlean.ArgumentError, match=r"reference Sequential rejects.*same type"):
            function(model, X, copy.deepcopy(reference).double())


@pytest.mark.filterwarnings("ignore:no rule for aten.copy_:fxlean.PruneWarning")
def test_a_model_that_writes_into_its_inputs_leaves_the_batches_alone():
    torch.manual_seed(0)

    class Shifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 2))

        def forward(self, x):
            return self.body(x.sub_(0.5).mul_(2))

    batches = [x.clone() for x in X.split(16)]
    reference = Shifting()
    model = copy.deepcopy(reference)
    options = {"method": "relevance", "calibration": batches, "repair": True}
    list(fxlean.iterate(model, 0.5, 2, **options))
    fxlean.distill(model, batches, reference, 8, rate=1e-3)
    fxlean.shrink(reference, 0.7, batches, progress=False)
    assert all(torch.equal(*pair) for pair in zip(batches, X.split(16), strict=True))


def test_in_inference_mode_and_with_models_that_draw_numbers():
    model, reference = regressor(lambda y: y + 0 * torch.rand_like(y))
    twin, _ = regressor(lambda y: y)
    numbers = torch.get_rng_state()
    fxlean.distill(model, X.split(16), reference, 20)
    assert torch.equal(torch.get_rng_state(), numbers)
    with torch.inference_mode():
        fxlean.distill(twin, [2 * x / 2 for x in X.split(16)], reference, 20)
    assert same_state(model.state_dict(), twin.state_dict())


def test_what_was_learned_before_an_interruption_stays(monkeypatch):
    model, reference = network()
    before, calls = state(model), []

    def interrupted(goal, *given):
        calls.append(given)
        if len(calls) == 7:  # of these, four for the error at the beginning
            raise KeyboardInterrupt
        return loss(goal, *given)

    loss = distillation._Goal.loss
    monkeypatch.setattr(distillation._Goal, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fxlean.distill(model, X.split(16), reference, 9)
    assert not same_state(model.state_dict(), before)
    assert not model[0][1].training


def test_statistics_are_the_means_over_batches():
    norm = nn.BatchNorm2d(3, momentum=0.7).eval()
    measure_statistics(nn.Sequential(norm, nn.Dropout()), [(X[:32],), (X[32:],)])
    halves = [part.transpose(0, 1).flatten(1) for part in (X[:32], X[32:])]
    torch.testing.assert_close(norm.running_mean, sum(h.mean(1) for h in halves) / 2)
    torch.testing.assert_close(norm.running_var, sum(h.var(1) for h in halves) / 2)
    assert norm.momentum == 0.7
    assert norm.num_batches_tracked == 0
    assert not norm.training


@pytest.mark.parametrize("stop", [None, RuntimeError, KeyboardInterrupt])
def test_statistics_are_all_measured_or_none(stop):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False))
    with torch.no_grad():
        model.train()(X)
    model[0].requires_grad_(False)
    before = state(model)

    def batches():
        yield (X[:32] + 1,)
        if stop is not None:
            raise stop
        yield (X[32:],)

    with nullcontext() if stop is None else pytest.raises(stop):
        measure_statistics(model, batches())
    changed = [key for key, value in model.state_dict().items() if not value.equal(before[key])]
    assert changed == [] if stop else all(key.startswith(("1.run", "2.run")) for key in changed)
    assert len(changed) == (0 if stop else 4)
    assert model.training
