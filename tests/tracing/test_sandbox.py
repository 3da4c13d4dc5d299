"""One thread at a time, as eager code, and every custom function as its forward pass."""

import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import fxlean
from fxlean.tracing.functions import functions_as_code
from fxlean.tracing.sandbox import copied, running
from fxlean.tracing.tracer import trace_model
from tests.support.blocks import conv, conv_bn_relu
from tests.support.compare import same_state
from tests.support.zoo import make

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* keeps its size, for (every|its):fxlean.CompactionWarning"
)

IMAGE = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def masks(model):
    return {name: mask.tolist() for name, mask in model.named_buffers() if name.endswith("_mask")}


def plain():
    torch.manual_seed(0)
    return nn.Sequential(conv_bn_relu(3, 8), conv_bn_relu(8, 6), conv(6, 2, 1))


def test_four_threads_prune_as_one_after_the_other():
    names = ["residual", "nested", "u_net", "in_place"]

    def pruned(case):
        model, inputs = case
        fxlean.prune(model, 0.3, inputs)
        return masks(model)

    expected = [pruned(make(name)) for name in names]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(pruned, [make(name) for name in names])) == expected
    assert gc.isenabled()


class Sign(torch.autograd.Function):
    """The old way: the context comes first."""

    @staticmethod
    def forward(ctx, x, scale=2.0):
        ctx.save_for_backward(x)
        ctx.mark_non_differentiable()
        assert len(ctx.needs_input_grad) >= 1
        return x * scale

    @staticmethod
    def backward(ctx, grad):
        return grad * 2.0, None


class Derived(Sign):
    pass


class Context(torch.autograd.Function):
    """The new way, with a context of its own."""

    @staticmethod
    def forward(x, scale=2.0):
        return x * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        return grad * 2.0, None


class Applied(nn.Module):
    """Calls a custom function, by whatever name it knows it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def applied(function):
    torch.manual_seed(0)
    return nn.Sequential(conv_bn_relu(3, 8), Applied(function), conv_bn_relu(8, 6), conv(6, 2, 1))


@pytest.mark.parametrize("cls", [Sign, Derived, Context])
def test_custom_functions_are_traced_as_their_forward_pass(cls):
    expected, model = applied(lambda x: x * 2.0), applied(cls.apply)
    assert trace_model(model, IMAGE).pieces[0].module == ""
    fxlean.prune(expected, 0.3, IMAGE)
    fxlean.prune(model, 0.3, IMAGE)
    assert masks(model) == masks(expected)
    small = fxlean.compact(model.eval(), IMAGE)
    assert torch.allclose(small(IMAGE), expected.eval()(IMAGE), atol=1e-5)
    x = torch.ones(3, requires_grad=True)
    cls.apply(x).sum().backward()
    assert x.grad.tolist() == [2.0] * 3


def test_custom_functions_are_put_back_after_an_error():
    classes = [Sign, Derived, Context, torch.autograd.Function]
    before = [dict(vars(cls)) for cls in classes]

    def fail():
        with functions_as_code():
            assert "setup_context" in vars(Sign)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [dict(vars(cls)) for cls in classes] == before


def compiled_in_place():
    model = plain()
    model[1].compile(backend="eager")
    model.compile(backend="eager")
    return model


def compiled_part():
    model = plain()
    model[1] = torch.compile(model[1], backend="eager")
    return model


def compiled_function():
    model = plain()
    model[1] = nn.Sequential(
        *model[1][:2], Applied(torch.compile(lambda x: x.relu(), backend="eager"))
    )
    return model


@pytest.mark.parametrize("build", [compiled_in_place, compiled_part, compiled_function])
def test_compiled_models_are_traced_as_a_whole(build):
    expected, model = plain(), build()
    before = [module._compiled_call_impl for module in model.modules()]
    assert trace_model(model, IMAGE).pieces[0].module == ""
    fxlean.prune(expected, 0.3, IMAGE)
    fxlean.prune(model, 0.3, IMAGE)
    assert list(masks(model).values()) == list(masks(expected).values())
    assert [module._compiled_call_impl for module in model.modules()] == before


def test_values_written_in_place_are_put_back():
    model = plain()
    model[0][0].weight.data[0] = 3.0
    nn.utils.prune.l1_unstructured(model[2], "weight", 0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = {name: id(value) for name, value in model.named_parameters()}
    with running(model):
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(1)
        torch._foreach_mul_([*model.parameters()], 2.0)
        torch.mul(model[0][0].weight, 2.0, out=model[0][0].weight)
        model[1][0].weight.data = torch.zeros(6, 8, 3, 3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: id(value) for name, value in model.named_parameters()} == identities


def test_resized_buffers_are_put_back():
    model = plain()
    model.register_buffer("scale", torch.arange(3.0))
    with running(model):
        model.scale.resize_(5).fill_(7)
    assert model.scale.tolist() == [0.0, 1.0, 2.0]


def test_only_what_is_close_to_a_module_is_looked_into():
    model, chain = plain(), []
    model.holder = chain
    for _ in range(30_000):
        chain.append([])
        chain = chain[0]
    model.near, model.far = [1], chain
    with running(model):
        model.near.append(2)
        model[0].training = True
    assert model.near == [1]
    assert model[0].training


def test_copies_of_graph_modules_are_in_the_same_mode():
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout()))
    model.eval()
    model.get_submodule("1").train()
    assert [m.training for m in copied(model).modules()] == [m.training for m in model.modules()]


def test_what_keeps_a_model_from_being_copied_is_named():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
    model[1].lock = threading.Lock()
    with pytest.raises(fxlean.ArgumentError, match=r"for its attribute 1\.lock cannot: "):
        fxlean.compact(model, IMAGE)


def test_copies_hold_the_values_of_what_was_computed():
    """Which has a history, as of a loss for what is in between."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
    seen = model[0](IMAGE)
    model[1].seen, model[1].last = [{"first": seen}], seen
    result = copied(model)
    kept = result[1].seen[0]["first"]
    assert kept is result[1].last
    assert not kept.requires_grad
    assert torch.equal(kept, seen)
    assert seen.requires_grad


def test_inference_mode_leaves_ordinary_tensors():
    expected, model = plain(), plain()
    fxlean.prune(expected, 0.3, IMAGE)
    with torch.inference_mode():
        fxlean.prune(model, 0.3, IMAGE)
        small = fxlean.compact(model, IMAGE)
    assert masks(model) == masks(expected)
    for tensor in (*model.state_dict().values(), *small.state_dict().values()):
        assert not tensor.is_inference()
    model(IMAGE).sum().backward()
    small(IMAGE).sum().backward()


class Drawing(nn.Module):
    """A network that draws a random number wherever it is run."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.last(self.first(x).relu() * (1 + 0 * torch.rand(())))


@pytest.mark.filterwarnings("ignore::fxlean.CompactionWarning")
@pytest.mark.parametrize(
    "call",
    [
        lambda model, x: fxlean.prune(model, 0.5, x),
        lambda model, x: fxlean.prune(model, 0.5, x, method="relevance", calibration=[x]),
        lambda model, x: fxlean.prune(model, 0.7, x, granularity="channel", of="macs"),
        lambda model, x: fxlean.repair(model, x, copy.deepcopy(model)),
        lambda model, x: fxlean.compact(model, x),
        lambda model, x: fxlean.report(model, x),
        lambda model, x: fxlean.trace(model, x),
        lambda model, x: fxlean.shrink(model, 0.7, x, rounds=1, progress=False),
    ],
)
def test_what_a_model_draws_leaves_the_random_state_as_it_was(call):
    model, x = Drawing().eval(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model.first.weight[2:4] = 0
    before = torch.get_rng_state()
    call(model, x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("granularity", ["kernel", "channel"])
def test_inside_autocast_everything_is_as_outside(granularity):
    def run():
        model = plain()
        fxlean.prune(
            model, 0.5, IMAGE, method="relevance", calibration=IMAGE, granularity=granularity
        )
        fxlean.repair(model, IMAGE)
        return model, fxlean.compact(model, IMAGE), str(fxlean.report(model, IMAGE))

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run()
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert same_state(ours.state_dict(), theirs.state_dict())
    assert found[2] == expected[2]


def test_parameters_that_were_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model = plain()
    with pytest.raises(fxlean.ArgumentError, match=r"made in inference mode.*copy\.deepcopy"):
        fxlean.prune(model, 0.5, IMAGE)
    fxlean.prune(copy.deepcopy(model), 0.5, IMAGE)
