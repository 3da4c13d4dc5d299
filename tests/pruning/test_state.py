"""What training keeps between steps of pruning: names, order, and the state of optimizers."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import fxlean
from fxlean.masking import remove_masks, without_masks
from tests.support.blocks import conv, conv_bn_relu
from tests.support.zoo import ZOO, make

pytestmark = pytest.mark.filterwarnings("ignore::fxlean.PruneWarning")
every_network = pytest.mark.parametrize("name", sorted(ZOO))
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01),
}


def public(names):
    return [name.removesuffix("_orig") for name in names]


def order(model):
    return public(name for name, _ in model.named_parameters())


class Checkpointed(nn.Module):
    """Biased convolutions and batch norms, recomputed in the backward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.last = conv_bn_relu(3, 6), conv(5, 2, 1, bias=True)
        self.middle = nn.Sequential(conv(6, 5, bias=True), nn.BatchNorm2d(5), nn.ReLU())

    def forward(self, x):
        return self.last(checkpoint(self.middle, self.first(x), use_reentrant=False))


def build():
    torch.manual_seed(0)
    return Checkpointed()


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(count)]


def train(model, optimizer, images, scaler=None):
    model.train()
    for image in images:
        optimizer.zero_grad()
        loss = model(image).square().mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()


def prune(model, ratio):
    fxlean.prune(model, ratio, torch.zeros(2, 3, 8, 8), method="l1")


@every_network
def test_the_order_of_parameters_stays(name):
    model, inputs = make(name)
    before = order(model)
    objects = {public([key])[0]: parameter for key, parameter in model.named_parameters()}
    for ratio in (0.6, 0.3):
        fxlean.prune(model, ratio, inputs)
        assert order(model) == before
        for key, parameter in model.named_parameters():
            assert parameter is objects[public([key])[0]]
    bare = copy.deepcopy(model)
    remove_masks(bare)
    assert [key for key, _ in bare.named_parameters()] == before


@every_network
@pytest.mark.parametrize("permanent", [True, False])
@pytest.mark.filterwarnings("ignore::fxlean.CompactionWarning")  # what keeps its size is copied
def test_a_copy_without_masks_is_that_of_a_copy_and_shares_no_memory(name, permanent):
    model, inputs = make(name)
    fxlean.prune(model, 0.5, inputs)
    before = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model)
    remove_masks(expected, permanent=permanent)
    found = without_masks(model, permanent=permanent)
    for key, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key
    assert list(found.state_dict()) == list(expected.state_dict())
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    for result in (found, fxlean.compact(model, inputs)):
        left = {key for key, t in result.state_dict().items() if t.data_ptr() in own and t.numel()}
        assert not left
        with torch.no_grad():
            for parameter in result.parameters():
                parameter.fill_(7.0)
    for key, tensor in model.state_dict().items():
        assert torch.equal(before[key], tensor), key


@every_network
def test_the_same_parameters_are_masked_whatever_the_weights_and_the_choice(name):
    keys = set()
    for method, ratio, shift in [("l1", 1.0, 0.0), ("random", 0.5, 0.3), ("lean", 0.02, 0.0)]:
        model, inputs = make(name)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(shift * torch.randn_like(parameter))
        fxlean.prune(model, ratio, inputs, method=method)
        keys.add(tuple(model.state_dict()))
    assert len(keys) == 1


def test_ignored_layers_and_those_that_make_the_output_have_no_masks():
    model = build()
    fxlean.prune(model, 0.5, torch.zeros(2, 3, 8, 8), ignore="middle.0")
    masked = {name for name, _ in model.named_buffers() if name.endswith("_mask")}
    assert masked == {"first.0.weight_mask", "first.1.weight_mask", "first.1.bias_mask"}


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
@pytest.mark.parametrize("scaled", [False, True])
def test_an_optimizer_made_anew_from_its_state_goes_on_as_the_old_one(kind, scaled):
    """The state belongs to the same parameters, so that both train to the same weights."""
    model = build()
    optimizer = OPTIMIZERS[kind](model.parameters())
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    train(model, optimizer, batches(3), scaler)
    for ratio in (0.7, 0.4):
        prune(model, ratio)
        state, names = optimizer.state_dict()["state"], order(model)
        for number, parameter in enumerate(model.parameters()):
            assert all(
                value.shape in (parameter.shape, ())
                for value in state[number].values()
                if isinstance(value, torch.Tensor)
            ), names[number]
        other = copy.deepcopy(model)
        again = OPTIMIZERS[kind](other.parameters())
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, optimizer, batches(2), scaler)
        train(other, again, batches(2), copy.deepcopy(scaler))
        for (key, left), right in zip(model.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(left, right), key


def test_weights_with_the_channels_last_stay_so():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)), torch.randn(1, 3, 9, 9)
    fxlean.prune(model.to(memory_format=torch.channels_last), 0.5, x, prune_outputs=True)
    model(x)
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in model)


def test_masked_elements_stay_zero_and_get_no_gradients():
    model = build()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for ratio in (0.7, 0.4):
        prune(model, ratio)
        train(model, optimizer, batches(2))
        masks = dict(model.named_buffers())
        for name, parameter in model.named_parameters():
            if name.endswith("_orig"):
                mask = masks[f"{public([name])[0]}_mask"]
                assert not parameter.grad[mask == 0].any()
                assert not model.get_parameter(name)[mask == 0].isnan().any()


def test_averages_follow_the_parameters_from_before_pruning_and_their_masks():
    model = build()
    prune(model, 1.0)  # masks of ones, before the average is made
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    for step, ratio in enumerate((0.8, 0.5, 0.3)):
        prune(model, ratio)
        train(model, optimizer, batches(1))
        average.update_parameters(model)
        now = [parameter.detach() for parameter in model.parameters()]
        pairs = zip(expected, now, strict=True)
        expected = [(old + new) / 2 if step else new.clone() for old, new in pairs]
    for mean, parameter in zip(expected, average.module.parameters(), strict=True):
        assert torch.allclose(mean, parameter)
    for left, right in zip(average.module.buffers(), model.buffers(), strict=True):
        assert torch.equal(left, right)
    again = AveragedModel(build(), multi_avg_fn=get_ema_multi_avg_fn(0.5))
    prune(again.module, 1.0)
    again.load_state_dict(average.state_dict())
    image = batches(1)[0]
    assert torch.equal(again.eval()(image), average.eval()(image))


def test_gradients_with_checkpointing_are_those_without():
    model = build()
    prune(model, 0.5)
    image = batches(1)[0]
    model(image).sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.last(model.middle(model.first(image))).sum().backward()
    for left, right in zip(found, model.parameters(), strict=True):
        assert torch.allclose(left, right.grad, atol=1e-6)


def test_a_compiled_model_sees_new_masks_and_trained_weights():
    torch.manual_seed(0)
    model = nn.Sequential(conv_bn_relu(3, 6), conv(6, 5, bias=True), nn.ReLU(), conv(5, 2, 1))
    compiled = torch.compile(model, backend="eager")
    optimizer = OPTIMIZERS["adamw"](compiled.parameters())
    image = batches(1)[0]
    for ratio, _ in itertools.product((0.7, 0.4), range(2)):
        prune(compiled, ratio)
        train(compiled, optimizer, batches(1))
        assert torch.allclose(compiled.eval()(image), model.eval()(image), atol=1e-6)
        assert not model[1].weight[model[1].weight_mask == 0].any()
