"""Compacted networks against the masked ones that they come from."""

import copy
import subprocess
import sys
import textwrap

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

import fxlean
from fxlean import CompactionError, CompactionWarning, compact
from tests.support.blocks import Apply, DenseInPlace, conv, conv_bn_relu
from tests.support.compare import (
    load_trained_state,
    parameters,
    same_state,
    state,
    worst_error,
)
from tests.support.strategies import networks
from tests.support.zoo import ZOO, make

METHODS = ("lean", "path", "l1", "random")
# At low ratios little is left of small networks; torch.export warns about itself.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.* keeps its size, for (every|its):fxlean.CompactionWarning",
    "ignore::fxlean.PruneWarning",
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
)


def pruned(name, ratio=0.1, method="lean", dtype=torch.float64):
    model, inputs = make(name, dtype)
    torch.manual_seed(0)
    fxlean.prune(model, ratio, inputs, method=method)
    return model, inputs


@pytest.mark.parametrize(("ratio", "method"), [(0.5, "lean"), (0.3, "path"), (0.1, "random")])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_zoo_keeps_its_outputs_and_shrinks(name, ratio, method):
    model, inputs = pruned(name, ratio, method)
    before = state(model)
    small = compact(model, inputs)
    assert same_state(before, model.state_dict())
    assert worst_error(small(*inputs), model(*inputs)) < 1e-10
    larger = tuple(
        torch.randn(3, *x.shape[1:], dtype=x.dtype).repeat_interleave(2, -1) for x in inputs
    )
    assert worst_error(small(*larger), model(*larger)) < 1e-10
    assert parameters(small) <= parameters(model)
    assert not torch_prune.is_pruned(small)
    again = compact(small, inputs)
    assert same_state(small.state_dict(), again.state_dict())


# Compacted once more: with one channel left a group, shapes do not tell groups from channels.
@pytest.mark.filterwarnings("ignore:.* RuntimeError. shape:fxlean.CompactionWarning")
@settings(max_examples=40)
@given(networks(), st.sampled_from([0.5, 0.2, 0.05]), st.sampled_from(METHODS))
def test_random_networks_keep_their_outputs_and_shrink(drawn, ratio, method):
    model, inputs = drawn
    fxlean.prune(model, ratio, inputs, method=method)
    small = compact(model, inputs)
    assert worst_error(small(*inputs), model(*inputs)) < 1e-10
    assert parameters(small) <= parameters(model)
    sizes = {key: tuple(value.shape) for key, value in small.state_dict().items()}
    again = compact(small, inputs).state_dict()
    assert sizes == {key: tuple(value.shape) for key, value in again.items()}


@pytest.mark.parametrize("name", ["plain", "residual", "dense_in_place", "functional"])
def test_an_unpruned_model_comes_back_equal(name):
    model, inputs = make(name)
    assert same_state(model.state_dict(), compact(model, inputs).state_dict())


def test_dead_channels_leave_every_layer_that_they_pass():
    model = nn.Sequential(conv_bn_relu(3, 8), conv_bn_relu(8, 8, groups=8), conv(8, 2, 1)).eval()
    alive = torch.tensor([1, 4, 6])
    with torch.no_grad():
        for parameter in (*model[0].parameters(), *model[1].parameters()):
            kept = parameter[alive].clone()
            parameter.zero_()
            parameter[alive] = kept
    small = compact(model, torch.randn(1, 3, 8, 8))
    assert [small[0][0].out_channels, small[1][0].groups, small[2].in_channels] == [3, 3, 3]
    assert small[1][1].num_features == 3


def test_a_stream_keeps_what_any_of_its_writers_writes():
    model, inputs = make("residual", torch.float64)
    with torch.no_grad():
        block = model[1].branches[0]
        block[0].weight[:3] = 0
        block[1].weight[:3] = 0
        block[1].bias[:3] = 0
    small = compact(model, inputs)
    assert small[0][0].out_channels == 4
    assert worst_error(small(*inputs), model(*inputs)) < 1e-10


def test_biases_of_pruned_channels_that_are_not_masked_stay():
    model = nn.Sequential(conv(3, 4, bias=True), nn.Sigmoid(), conv(4, 2, bias=True)).double()
    torch_prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    small = compact(model, x)
    assert worst_error(small(x), model(x)) < 1e-10


def test_code_with_channel_counts_written_into_it_keeps_them():
    def fixed(x):
        return x.reshape(len(x), 4, -1).mean(2)

    model = nn.Sequential(conv_bn_relu(3, 4), Apply(fixed), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter[1:] = 0
    x = torch.randn(2, 3, 8, 8)
    with pytest.warns(CompactionWarning, match="Where sizes are written into the code") as caught:
        small = compact(model, x)
    assert {warning.filename for warning in caught} == {__file__}
    assert worst_error(small(x), model(x)) < 1e-5


def test_layers_that_only_training_reads_still_work():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.extra = conv_bn_relu(3, 6), conv(6, 2, 1), conv(6, 2, 1)

        def forward(self, x):
            x = self.body(x)
            return (self.head(x), self.extra(x)) if self.training else self.head(x)

    model = Auxiliary().eval()
    with torch.no_grad():
        for parameter in model.body.parameters():
            parameter[2:] = 0
    x = torch.randn(2, 3, 8, 8)
    with pytest.warns(CompactionWarning, match="keeps its size, .* it cannot be trained"):
        small = compact(model, x)
    model.train()
    assert worst_error(small.train()(x), model(x)) < 1e-4


@pytest.mark.parametrize("name", ["residual", "concat", "u_net", "depthwise"])
def test_in_training_mode_it_computes_the_same(name):
    model, inputs = pruned(name, 0.3)
    small = compact(model, inputs).train()
    model.train()
    assert worst_error(small(*inputs), model(*inputs)) < 1e-10
    assert worst_error(small.eval()(*inputs), model.eval()(*inputs)) < 1e-10


@pytest.mark.parametrize("name", ["residual", "dense_in_place", "concat"])
def test_a_rewritten_or_cut_network_trains(name):
    model, inputs = pruned(name, 0.3)
    small = compact(model, inputs).train()
    before = state(small)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(*inputs).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())
    optimizer.step()
    assert not same_state(before, small.state_dict())


@pytest.mark.parametrize("name", ["residual", "dense_in_place", "channel_shuffle"])
def test_saving_and_loading_in_a_fresh_process(name, tmp_path):
    model, inputs = pruned(name, 0.2)
    small = compact(model, inputs)
    torch.save(small, tmp_path / "model.pt")
    torch.save((inputs, small(*inputs).detach(), small.state_dict()), tmp_path / "rest.pt")
    script = f"""
        import torch
        torch.set_num_threads(1)
        model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        inputs, expected, state = torch.load({str(tmp_path / "rest.pt")!r}, weights_only=True)
        assert torch.equal(model(*inputs), expected)
        model.load_state_dict(state)
        assert torch.equal(model(*inputs), expected)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


@pytest.mark.parametrize("name", ["residual", "dense_in_place"])
def test_state_loads_into_a_compacted_twin(name):
    model, inputs = pruned(name, 0.2)
    first, second = compact(model, inputs), compact(model, inputs)
    load_trained_state(first, second)
    assert torch.equal(first(*inputs), second(*inputs))


@pytest.mark.parametrize("name", ["residual", "dense_in_place", "channel_shuffle"])
def test_copies_and_types(name):
    model, inputs = pruned(name, 0.2)
    small = copy.deepcopy(compact(model, inputs))
    single = small.float()(*[x.float() for x in inputs])
    assert worst_error(single.double(), model(*inputs)) < 1e-4
    half = small.bfloat16()(*[x.bfloat16() for x in inputs])
    assert worst_error(half.double(), model(*inputs)) < 0.2


@pytest.mark.parametrize("name", ["residual", "dense_in_place"])
def test_compiles(name):
    model, inputs = pruned(name, 0.2)
    small = compact(model, inputs)
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    assert worst_error(compiled(*inputs), small(*inputs)) < 1e-10


@pytest.mark.parametrize("name", ["residual", "dense_in_place", "channel_shuffle"])
def test_exports_to_onnx(name, tmp_path):
    model, inputs = pruned(name, 0.2, dtype=torch.float32)
    small = compact(model, inputs)
    torch.onnx.export(small, inputs, tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [argument.name for argument in session.get_inputs()]
    values = [x.numpy() for x in inputs]
    (found,) = session.run(None, dict(zip(names, values, strict=True)))
    assert worst_error(torch.from_numpy(found), model(*inputs)) < 1e-4


def test_dense_network_of_raw_parameters_becomes_one_of_small_layers():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DenseInPlace(2, 12).eval()
        x = torch.randn(1, 2, 16, 16)
    fxlean.prune(model, 0.1, x)
    small = compact(model, x)
    assert parameters(small) < 0.35 * parameters(model)
    for shape in ((1, 2, 16, 16), (3, 2, 9, 21)):
        x = torch.randn(shape)
        assert worst_error(small(x), model(x)) < 1e-4


def test_without_example_inputs():
    model, _ = pruned("plain", dtype=torch.float32)
    small = compact(model)
    x = torch.randn(2, 3, 20, 20)
    assert worst_error(small(x), model(x)) < 1e-5


def test_after_training_the_masked_model():
    model, inputs = pruned("plain")
    model.train()
    model(*inputs).sum().backward()
    model.eval()
    assert worst_error(compact(model, inputs)(*inputs), model(*inputs)) < 1e-10


def test_a_model_that_never_returns_the_same_is_an_error():
    calls = []

    def count(x):
        calls.append(1)
        return x + len(calls)

    model = nn.Sequential(conv(3, 4), Apply(count))
    with pytest.raises(CompactionError, match="outputs differ"):
        compact(model, torch.randn(1, 3, 8, 8))


def test_what_cannot_be_rewritten_stays_and_is_named():
    class Unexportable(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 1, 1))

        def forward(self, x):
            if torch.compiler.is_exporting():
                raise ValueError("not for export")
            return nn.functional.conv2d(x, self.weight)

    model = Unexportable()
    with torch.no_grad():
        model.weight[:, 0] = 0
    x = torch.randn(1, 3, 8, 8)
    with pytest.warns(CompactionWarning, match="belong to no layer"):
        small = compact(model, x)
    assert torch.equal(small(x), model(x))


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_a_rewritten_model_averages_running_statistics_as_before(momentum):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
            self.norm = nn.BatchNorm2d(4, momentum=momentum)

        def forward(self, x):
            return self.norm(nn.functional.conv2d(x, self.weight))

    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(2, 3, 8, 8)
    model(x)
    with torch.no_grad():
        model.weight[:, 0] = 0
    small = compact(model, x)
    assert isinstance(small, torch.fx.GraphModule)
    for _ in range(2):
        model(x + 1), small(x + 1)
    for name, buffer in small.named_buffers():
        if name.startswith("norm."):
            torch.testing.assert_close(buffer, model.get_buffer(name))


PADS = {
    "reflect": lambda x: F.pad(x, [2, 1, 1, 2], "reflect"),
    "circular": lambda x: F.pad(x, [2, 1, 1, 2], mode="circular"),
    "one": lambda x: F.pad(x, [2, 1], value=1.0),
    "to_a_multiple": lambda x: F.pad(x, [0, -x.shape[-1] % 8, 0, 0], mode="replicate"),
}


class PadsMany(nn.Module):
    """A function of raw parameters that pads two values of several channels side by side."""

    def __init__(self, pad):
        super().__init__()
        self.pad = pad
        self.first = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.second = nn.Parameter(torch.randn(4, 6, 1, 1))
        self.third = nn.Parameter(torch.randn(5, 10, 3, 3))
        with torch.no_grad():
            for weight, dead in ((self.first, 2), (self.second, 1), (self.third, 3)):
                weight[dead] = 0
            self.third[:, 7:9] = 0

    def forward(self, x):
        x = F.conv2d(x, self.first).relu()
        x = torch.cat([x, F.conv2d(x, self.second).relu()], 1)
        return F.conv2d(self.pad(x), self.third)


@pytest.mark.parametrize("pad", PADS)
def test_several_values_are_padded_together(pad):
    model = PadsMany(PADS[pad]).double()
    small = compact(model, torch.randn(2, 3, 13, 13, dtype=torch.float64))
    x = torch.randn(3, 3, 11, 18, dtype=torch.float64)
    assert worst_error(small(x), model(x)) < 1e-10
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    assert worst_error(compiled(x), model(x)) < 1e-10
    read = {"one": 8}.get(pad, 7)  # a channel of zeros is not zero once it is padded with ones
    assert [m.in_channels for m in small.modules() if isinstance(m, nn.Conv2d)] == [3, 5, read]


class FromOne(nn.Module):
    """A function of raw parameters whose layers read one channel, or one feature, each."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 1, 3, 3))
        self.last = nn.Parameter(torch.randn(1, 8, 3, 3))
        self.features = nn.Parameter(torch.randn(5, 1))

    def forward(self, x):
        x = nn.functional.conv2d(nn.functional.conv2d(x, self.first).relu(), self.last)
        return nn.functional.linear(x.mean((2, 3)), self.features)


def test_one_input_channel_does_not_make_a_convolution_depthwise():
    torch.manual_seed(0)
    model, x = FromOne(), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        model.first[3:] = 0
        model.last[:, :2] = 0
    small = compact(model, x)
    assert worst_error(small(x), model(x)) < 1e-5
    assert parameters(small) == 9 + 9 + 5


class Wide(nn.Module):
    """Takes another way with wide images."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide, self.last = conv(3, 8), conv(3, 8), conv(8, 2)

    def forward(self, x):
        return self.last(self.wide(x) if x.shape[-1] > 20 else self.narrow(x))


def test_python_that_looks_at_sizes_is_found_out_at_another_size():
    torch.manual_seed(0)
    model, x = Wide().eval(), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        model.narrow.weight[2:] = 0
    with pytest.warns(CompactionWarning, match="Wide keeps its size, for what was cut out of it"):
        small = compact(model, x)
    for size in (16, 40):
        x = torch.randn(1, 3, 16, size)
        assert worst_error(small(x), model(x)) < 1e-5


class Choosing(nn.Module):
    """Returns where scores are largest, which rounding decides where they are equal."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 1, 1)

    def forward(self, x):
        scores = self.last(self.first(x)).flatten(1)
        return scores.double().round(decimals=6).topk(5, 1).values.float() * 1e6 % 7


def test_what_differs_by_rounding_is_compared_in_double_precision():
    torch.manual_seed(0)
    model, x = Choosing().eval(), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        for parameter in model.first.parameters():
            parameter[::2] = 0
    assert compact(model, x).first.out_channels == 16


@pytest.mark.filterwarnings("default::fxlean.CompactionWarning")
def test_a_model_that_keeps_its_size_says_why():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 2, 3)), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        model[0].weight[:8, 0] = 0
    with pytest.warns(CompactionWarning, match="keeps its size, for every channel still carries"):
        compact(model, x)
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = 0, 0
    with pytest.warns(CompactionWarning, match="keeps its size, for its 1 dead channels share"):
        compact(model, x)


@pytest.mark.filterwarnings("error::fxlean.CompactionWarning")
def test_a_model_that_became_smaller_does_not_say_that_it_keeps_its_size():
    # Once its first group is gone, the layer is looked at again, and single zeros are no reason.
    torch.manual_seed(0)
    model, x = nn.Sequential(conv(3, 8), conv(8, 8, groups=2), conv(8, 2)), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        model[0].weight[:4], model[1].weight[:4], model[2].weight[:, :4] = 0, 0, 0
        model[1].weight[4, 0] = 0
    small = compact(model, x)
    assert small[1].groups == 1
    assert small[1].weight.shape == (4, 4, 3, 3)
