"""A compacted network is an ordinary module to the rest of torch."""

import copy
import functools
import io
import shutil

import pytest
import torch
from torch import fx, nn
from torch.export import Dim, export
from torch.nn.utils.parametrizations import weight_norm

import fxlean
from fxlean import compact
from fxlean.nn import Selected
from tests.support.blocks import between, conv, residual
from tests.support.compare import load_trained_state, parameters, same_state, state, worst_error
from tests.support.zoo import make, randomise_norms


def selecting():
    """A wide stream, of which the middle layer reads and writes but a few channels."""
    middle = conv(48, 48, 5)
    with torch.no_grad():
        middle.weight[8:] = 0
        middle.weight[:, :-16] = 0
    return between(residual(middle), inputs=48, outputs=48)


def computed_weights():
    return nn.Sequential(
        weight_norm(conv(3, 4)),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        weight_norm(conv(4, 6)),
        nn.BatchNorm2d(6, affine=False),
        nn.ReLU(),
        conv(6, 2, 1),
    )


BUILDERS = {"selecting": selecting, "computed_weights": computed_weights}
CUT = {
    "plain": 0.3,
    "residual": 0.1,
    "concat": 0.3,
    "depthwise": 0.3,
    "u_net": 0.3,
    "selecting": 0.9,
}
REWRITTEN = {"dense_in_place": 0.3, "functional": 0.3, "computed_weights": 0.3}
RATIOS = {**CUT, **REWRITTEN}
every_network = pytest.mark.parametrize("name", RATIOS)
COMPILER = "inductor" if shutil.which("g++") else "aot_eager"
HALVES = {torch.float16: 1e-2, torch.bfloat16: 8e-2}

# torch.export warns about itself.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.* keeps its size, for (every|its):fxlean.CompactionWarning",
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
)


def original(name, dtype=torch.float32):
    if name not in BUILDERS:
        return make(name, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BUILDERS[name]().to(dtype).eval()
        randomise_norms(model)
        return model, (torch.randn(2, 3, 32, 32, dtype=dtype),)


def pruned(name, dtype=torch.float32):
    model, inputs = original(name, dtype)
    fxlean.prune(model, RATIOS[name], inputs, method="path")
    return model, inputs


@functools.cache
def compacted_once(name, dtype):
    model, inputs = pruned(name, dtype)
    small = compact(model, inputs)
    assert parameters(small) < parameters(model)
    with torch.no_grad():
        model(*inputs)  # brings computed weights up to date
    return model, small, inputs


def compacted(name, dtype=torch.float32):
    """A masked network, the compacted one, and inputs; the same in every run, to be changed."""
    return copy.deepcopy(compacted_once(name, dtype))


def larger_batch(inputs):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(5, *x.shape[1:], generator=generator).to(x) for x in inputs)


def test_the_networks_are_of_every_kind():
    small = {name: compacted(name)[1] for name in RATIOS}
    assert {name for name in small if isinstance(small[name], fx.GraphModule)} == set(REWRITTEN)
    (layer,) = (module for module in small["selecting"].modules() if isinstance(module, Selected))
    assert layer.reads is not None
    assert layer.places is not None


@every_network
def test_exports(name):
    _, small, inputs = compacted(name)
    exported = export(small, inputs).module()
    assert worst_error(exported(*inputs), small(*inputs)) < 1e-6


@every_network
def test_exports_with_a_free_batch_size(name):
    dense, _ = original(name)
    _, small, inputs = compacted(name)
    batch = [{0: Dim("batch")} for _ in inputs]
    more = larger_batch(inputs)
    for model in (dense, small):
        exported = export(model, inputs, dynamic_shapes=batch).module()
        assert worst_error(exported(*more), model(*more)) < 1e-6


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@every_network
def test_in_half_precision(name, dtype):
    model, small, inputs = compacted(name)
    inputs = [x.to(dtype) for x in inputs]
    found, expected = small.to(dtype)(*inputs), model.to(dtype)(*inputs)
    assert found.dtype == dtype
    assert worst_error(found, expected) < HALVES[dtype]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@every_network
def test_a_model_in_half_precision_is_compacted(name, dtype):
    model, small, inputs = compacted(name, dtype)
    assert {p.dtype for p in small.parameters()} == {dtype}
    more = larger_batch(inputs)
    assert worst_error(small(*more), model(*more)) < HALVES[dtype]


@pytest.mark.parametrize(
    ("name", "backend"),
    [("concat", COMPILER)]
    + [
        (name, "aot_eager")
        for name in ("plain", "functional", "depthwise", "u_net", "selecting", "computed_weights")
    ],
)
def test_compiled_it_gives_the_same_outputs_and_gradients(name, backend):
    torch._dynamo.reset()
    _, small, inputs = compacted(name)
    twin = copy.deepcopy(small)
    compiled = torch.compile(small, backend=backend, fullgraph=True)
    found, expected = compiled(*inputs), twin(*inputs)
    assert worst_error(found, expected) < 1e-5
    found.square().sum().backward()
    expected.square().sum().backward()
    gradients = [[p.grad for p in model.parameters()] for model in (small, twin)]
    assert worst_error(*gradients) < 1e-4


@every_network
def test_state_loads_where_the_model_is_pruned_anew(name):
    _, trained, inputs = compacted(name)
    fresh = compact(*pruned(name))
    load_trained_state(trained, fresh)
    assert torch.equal(fresh(*inputs), trained(*inputs))


@every_network
def test_saved_whole(name):
    _, small, inputs = compacted(name)
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert same_state(loaded.state_dict(), small.state_dict())
    assert torch.equal(loaded(*inputs), small(*inputs))


@every_network
def test_copies_share_nothing(name):
    model, small, inputs = compacted(name)
    before, masked, expected = state(small), state(model), small(*inputs)
    twin = copy.deepcopy(small)
    assert torch.equal(twin(*inputs), expected)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert same_state(before, small.state_dict())
    assert torch.equal(small(*inputs), expected)
    with torch.no_grad():
        for tensor in small.state_dict().values():
            tensor.zero_()
    assert same_state(masked, model.state_dict())


@every_network
def test_in_double_precision(name):
    model, small, inputs = compacted(name)
    inputs = [x.double() for x in inputs]
    assert worst_error(small.to(torch.float64)(*inputs), model.double()(*inputs)) < 1e-6


@every_network
def test_shapes_on_the_meta_device(name):
    _, small, inputs = compacted(name)
    more = larger_batch(inputs)
    expected = small(*more)
    found = small.to("meta")(*[x.to("meta") for x in more])
    assert (found.shape, found.dtype, found.is_meta) == (expected.shape, expected.dtype, True)


@pytest.mark.parametrize("name", REWRITTEN)
def test_in_training_mode_a_rewritten_model_computes_the_same(name):
    model, small, inputs = compacted(name, torch.float64)
    assert worst_error(small.train()(*inputs), model.train()(*inputs)) < 1e-10
    assert worst_error(small.eval()(*inputs), model.eval()(*inputs)) < 1e-10


@every_network
def test_training_reaches_every_parameter_and_lowers_the_loss(name):
    _, small, inputs = compacted(name)
    small.train()
    before, losses = state(small), []
    target = torch.randn(small(*inputs).shape, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(small.parameters(), lr=0.01)
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(small(*inputs), target)
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in small.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = small.state_dict()
    statistics = [key for key in after if "running_" in key]
    assert statistics or name in ("dense_in_place", "functional")
    assert not any(torch.equal(before[key], after[key]) for key in statistics)


@every_network
def test_a_frozen_model_stays_frozen(name):
    model, inputs = pruned(name)
    small = compact(model.requires_grad_(False), inputs)
    assert not any(parameter.requires_grad for parameter in small.parameters())


@pytest.mark.parametrize("name", CUT)
def test_frozen_layers_stay_frozen(name):
    model, inputs = pruned(name)
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad = False
    expected = {key.removesuffix("_orig"): p.requires_grad for key, p in model.named_parameters()}
    small = compact(model, inputs)
    found = {key.replace(".layer.", "."): p.requires_grad for key, p in small.named_parameters()}
    assert found == expected


@pytest.mark.parametrize(
    ("name", "frozen", "expected"),
    [
        ("functional", "weight2_orig", {"weight2.weight"}),
        ("dense_in_place", "bias_orig", {f"weight{i}.bias" for i in range(4)}),
        ("computed_weights", "6.weight", {"6.weight"}),
    ],
)
def test_frozen_parameters_stay_frozen_in_a_rewritten_model(name, frozen, expected):
    model, inputs = pruned(name)
    model.get_parameter(frozen).requires_grad = False
    small = compact(model, inputs)
    assert {key for key, p in small.named_parameters() if not p.requires_grad} == expected
