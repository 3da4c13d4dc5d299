"""Tracing leaves models as they were, finds inputs that fit, and goes child by child if it must."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils._pytree import tree_leaves

import fxlean
from fxlean.tracing.inputs import as_arguments
from fxlean.tracing.sandbox import untouched
from fxlean.tracing.tracer import trace_model
from tests.support.blocks import conv, conv_bn_relu
from tests.support.zoo import ZOO, make

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* keeps its size, for (every|its):fxlean.CompactionWarning"
)

IMAGE = torch.zeros(1, 3, 16, 16)


def snapshot(model):
    """Everything that hangs on the modules of a model, by identity, and the random state."""
    attributes = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            content = list(value.items()) if isinstance(value, dict) else value
            inside = list(content) if isinstance(content, list) else content
            attributes[f"{name}.{key}"] = inside
    return attributes, {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()


def assert_unchanged(model, before):
    attributes, state, rng = before
    now, state_now, rng_now = snapshot(model)
    assert now.keys() == attributes.keys()
    for key, value in attributes.items():
        leaves, old = tree_leaves(now[key]), tree_leaves(value)
        assert len(leaves) == len(old), key
        assert all(a is b or a == b for a, b in zip(leaves, old, strict=True)), key
    assert all(torch.equal(state_now[key], value) for key, value in state.items())
    assert torch.equal(rng, rng_now)


class Busy(nn.Module):
    """Does to itself in its forward pass what one should not do."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = conv(3, 4, bias=True), conv(4, 5), conv(5, 2, 1)
        self.norm = nn.BatchNorm2d(5)
        self.cache, self.seen, self.shapes = {}, [], set()
        self.latest = None
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x):
        x = self.first(x)
        self.cache["first"], self.latest = x, x
        self.seen.append(x)
        self.shapes.add(tuple(x.shape))
        self.added = x * 2
        self.steps += 1
        self.first.stride = (1, 1)
        x = x + torch.randn(x.shape) * 1e-3
        return self.last(self.norm(self.second(F.dropout(x, training=self.training))))

    def train(self, mode=True):
        raise RuntimeError("this model has a mind of its own")


def busy():
    model = Busy()
    model.cache["old"] = 1
    model.seen.append("old")
    model.first.register_forward_hook(lambda module, args, out: out * 2)
    model.second.register_forward_pre_hook(lambda module, args: None)
    model.norm.training = False
    torch_prune.l1_unstructured(model.second, "weight", 0.5)
    return model


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = busy()
    before = snapshot(model)
    trace_model(model, IMAGE)
    assert_unchanged(model, before)
    fxlean.trace(model, IMAGE)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_network_is_left_as_it_was(name):
    model, inputs = make(name)
    model.train()
    before = snapshot(model)
    trace_model(model, inputs)
    assert_unchanged(model, before)


def test_a_model_that_fails_is_left_as_it_was():
    model = busy()
    before = snapshot(model)
    with pytest.raises(fxlean.ArgumentError, match="rejects the example inputs"):
        trace_model(model, torch.zeros(1, 5, 16, 16))
    assert_unchanged(model, before)


@pytest.mark.parametrize("always", [True, False])
def test_untouched_puts_back_after_an_error(always):
    model = busy()
    before = snapshot(model)[:2]

    def spoil():
        with untouched(model, always=always):
            model.cache.clear()
            model.new = torch.zeros(1)
            model.steps.add_(7)
            model.first.weight = nn.Parameter(torch.zeros(1))
            del model.norm
            raise KeyError

    with pytest.raises(KeyError):
        spoil()
    assert_unchanged(model, (*before, torch.get_rng_state()))


def test_untouched_lets_success_stand_if_asked():
    model = busy()
    with untouched(model, always=False):
        model.new = 1
    assert model.new == 1


class LeNet(nn.Module):
    """Takes 28x28 images of one channel, and nothing else."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.linear = nn.Linear(16 * 5 * 5, 10)

    def forward(self, x):
        x = F.max_pool2d(self.first(x).relu(), 2)
        return self.linear(F.max_pool2d(self.second(x).relu(), 2).flatten(1))


class Both(nn.Module):
    """Takes two images, and a flag that may be left out."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = conv(3, 4), conv(3, 4), conv(4, 2, 1)

    def forward(self, left, right, scale=2.0, *, flag=False):
        return self.last(self.left(left) + scale * self.right(right))


@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.Conv1d(4, 3, 3)), [(1, 2, 1024)]),
        (lambda: nn.Sequential(conv(3, 4), conv(4, 2)), [(1, 3, 64, 64)]),
        (lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.Conv3d(4, 2, 3)), [(1, 1, 32, 32, 32)]),
        (lambda: nn.Sequential(nn.ConvTranspose2d(5, 4, 3), conv(4, 2)), [(1, 5, 64, 64)]),
        (lambda: nn.Sequential(conv(4, 8, groups=2), conv(8, 2)), [(1, 4, 64, 64)]),
        (lambda: nn.Sequential(conv(3, 4), conv(4, 2)).double(), [(1, 3, 64, 64)]),
        (LeNet, [(1, 1, 28, 28)]),
        (Both, [(1, 3, 64, 64), (1, 3, 64, 64)]),
    ],
)
def test_inputs_that_fit_are_found(build, shapes):
    (piece,) = trace_model(build()).pieces
    placeholders = [node for node in piece.graph.graph.nodes if node.op == "placeholder"]
    inputs = placeholders[len(piece.state) :]
    assert [tuple(node.meta["val"].shape) for node in inputs] == shapes


def test_functional_convolutions_tell_the_channels_too():
    model, _ = make("functional")
    assert len(trace_model(model).pieces) == 1


@pytest.mark.parametrize(
    ("inputs", "arguments"),
    [
        ({"image": IMAGE}, {"image": IMAGE}),
        (OrderedDict(image=IMAGE), {"image": IMAGE}),
        (({"image": IMAGE},), ({"image": IMAGE},)),
        (([IMAGE, IMAGE],), ([IMAGE, IMAGE],)),
        ((IMAGE, 3, None), (IMAGE, 3, None)),
        (IMAGE, (IMAGE,)),
        ([IMAGE], ([IMAGE],)),
    ],
)
def test_arguments_are_positional_or_named(inputs, arguments):
    assert type(as_arguments(inputs)) is type(arguments)
    assert as_arguments(inputs) == arguments


class Stubborn(nn.Module):
    """Decides by the data what to do next, with tensors that go from one submodule to another."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = conv_bn_relu(3, 4), conv_bn_relu(4, 5)
        self.head = nn.Sequential(nn.ReLU(), conv(5, 2, 1))

    def forward(self, x):
        x = self.stem(x)
        if x.sum().item() > -1e9:
            x = self.body(x)
        return {"out": self.head(x)}


def test_a_model_that_does_not_trace_is_traced_by_its_children():
    torch.manual_seed(0)
    model = Stubborn()
    before = snapshot(model)
    with pytest.warns(
        fxlean.PruneWarning,
        match=r"^Stubborn does not trace .*: Python looks at values.*\(stem, body, head\)",
    ) as caught:
        trace = trace_model(model, IMAGE)
    assert caught[0].filename == __file__
    assert_unchanged(model, before)
    assert [piece.module for piece in trace.pieces] == ["stem", "body", "head"]
    for before_piece, after_piece in zip(trace.pieces, trace.pieces[1:], strict=False):
        assert before_piece.outputs[0] is after_piece.inputs[0]
    assert "does not trace as a whole" in trace.left_out["Stubborn"]
    assert {"", "stem", "stem.0", "body", "head", "head.1"} <= trace.called


@pytest.mark.filterwarnings("ignore:Stubborn does not trace")
def test_children_are_linked_as_in_the_whole():
    torch.manual_seed(0)
    model = Stubborn()
    result = fxlean.prune(model, 0.4, IMAGE, method="path")
    whole = nn.Sequential(model.stem, model.body, model.head)
    assert [layer.name for layer in result.layers] == ["stem.0", "body.0"]
    assert "Stubborn" in result.skipped
    assert "head.1" in result.skipped
    again = fxlean.trace(whole, IMAGE)
    apart = fxlean.trace(model, IMAGE)
    assert again.num_edges == apart.num_edges
    assert again.alive.tolist() == apart.alive.tolist()
    assert again.lengths.tolist() == apart.lengths.tolist()


class Hopeless(nn.Module):
    """Has nothing that traces: the convolution itself depends on the data."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight * (2.0 if x.sum().item() >= 0 else 1.0))


def test_a_model_without_any_part_that_traces():
    with pytest.raises(fxlean.TraceError, match=r"neither Hopeless nor any .*Prune a submodule"):
        trace_model(Hopeless(), IMAGE)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            torch.zeros(1, 5, 8, 8),
            r"^Sequential rejects .*\(1, 5, 8, 8\): RuntimeError: .* Pass ex",
        ),
        ((IMAGE, IMAGE), r"rejects .*\(1, 3, 16, 16\) \+ \(1, 3, 16, 16\): TypeError"),
        (3, r"^example_inputs is 3, which holds no tensor\. Pass a tensor, such as torch.zeros"),
        ((), r"^example_inputs is \(\), which holds no tensor\."),
    ],
)
def test_what_the_model_rejects(inputs, message):
    with pytest.raises(fxlean.ArgumentError, match=message):
        trace_model(nn.Sequential(conv(3, 4), conv(4, 2)), inputs)


def test_a_model_that_no_guess_fits():
    class Square(nn.Conv2d):
        def forward(self, x):
            raise ValueError("7 pixels or nothing")

    message = (
        r"^Square accepts none of .*\(1, 3, 64, 64\), .*\(1, 3, 224, 224\).*7 pixels or nothing"
    )
    with pytest.raises(fxlean.TraceError, match=message) as caught:
        trace_model(Square(3, 4, 3))
    assert isinstance(caught.value.__cause__, ValueError)


def test_circular_padding_is_free_of_in_place_writes():
    model = nn.Sequential(conv(3, 4), nn.CircularPad2d(2), conv(4, 3), conv(3, 2))
    (piece,) = trace_model(model, IMAGE).pieces
    for node in piece.graph.graph.nodes:
        assert node.op != "call_function" or not node.target._schema.is_mutable
    result = fxlean.prune(model, 0.5, IMAGE, method="path")
    assert not result.opaque_ops
    assert result.kept == result.selected


def test_operators_on_parameters_draw_no_random_numbers_from_the_user():
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + torch.randn(1) + torch.randn_like(x[:, :1])

    model = Noisy(conv(3, 4), conv(4, 4), conv(4, 2))
    state = torch.get_rng_state()
    fxlean.prune(model, 0.5, IMAGE)
    assert torch.equal(torch.get_rng_state(), state)


class ChannelsLast(nn.Module):
    """Linear layers on permuted values, as a ConvNeXt block has them, and a plain product."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 12, bias=False)
        self.weight = nn.Parameter(torch.randn(12, 8))

    def forward(self, x):
        x = self.first(x).permute(0, 2, 3, 1)
        return self.last((self.down(self.up(x).relu()).relu() @ self.weight).permute(0, 3, 1, 2))


class SequenceFirst(nn.Module):
    """Attention over positions, which come before the samples."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        x = self.first(x)
        tokens = x.flatten(2).permute(2, 0, 1)
        tokens, _ = self.attention(tokens, tokens, tokens)
        return self.last(tokens.permute(1, 2, 0).reshape(x.shape))


class Recurrent(nn.Module):
    """A recurrent layer over the columns of an image, whose products are not written in Python."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(5, 2)
        self.rnn = nn.GRU(8, 5, batch_first=True)

    def forward(self, x):
        columns = self.first(x).relu().mean(2)
        return self.last(self.rnn(columns.transpose(1, 2))[0])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("build", "layers"),
    [
        (Recurrent, ["first", "rnn.weight_ih_l0", "rnn.weight_hh_l0"]),
        (ChannelsLast, ["first", "up", "down", "weight"]),
        (SequenceFirst, ["first", "attention.in_proj_weight", "attention.out_proj"]),
    ],
)
def test_products_by_a_matrix_are_told_with_and_without_masks(build, layers, frozen):
    torch.manual_seed(0)
    model, x = build().requires_grad_(not frozen), torch.randn(2, 3, 8, 8)
    reference, seen = copy.deepcopy(model), []
    for ratio in (0.8, 0.5):
        result = fxlean.prune(model, ratio, x, include_linear=True, method="l1")
        seen.append([layer.name for layer in result.layers])
    assert seen == [layers] * 2
    if not frozen:
        assert fxlean.repair(model, torch.randn(16, 3, 8, 8), reference).after < 1
    (piece,) = trace_model(model, x).pieces
    with torch.no_grad():
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        (found,) = piece.graph(*[tensors[name] for name in piece.state], x)
        torch.testing.assert_close(found, model(x))
