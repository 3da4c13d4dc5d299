"""The real run before a trace: caches hold real tensors, and hooks that only look stay away."""

import copy
import functools
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import fxlean
from fxlean.tracing.rehearsal import rehearse
from fxlean.tracing.tracer import trace_model
from tests.support.blocks import Anchored, anchors, conv, conv_bn_relu

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* keeps its size, for (every|its):fxlean.CompactionWarning"
)

IMAGE = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
KEPT: list[object] = []


class Between(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second, self.last = conv_bn_relu(3, 8), conv(8, 6), conv(6, 2, 1)
        self.register_buffer("scale", torch.tensor([2.0, 0.5]))
        self.between = between

    def forward(self, x):
        return self.last(self.second(self.between(self, self.first(x))).relu())


def masks(model, **options):
    """What pruning masks, as one comparable object."""
    torch.manual_seed(0)
    result = fxlean.prune(model, 0.3, IMAGE, **options)
    buffers = model.state_dict().items()
    return result.kept, {name: mask.tolist() for name, mask in buffers if name.endswith("_mask")}


def plain(between=lambda module, x: x):
    torch.manual_seed(0)
    return Between(between)


class Holder:
    """A helper object, with containers in containers."""

    def __init__(self):
        self.latest = None
        self.by_size = {"sizes": [{}]}


def caches():
    @functools.lru_cache
    def grid(height, width):
        return torch.linspace(0, 1, width).expand(height, width).clone()

    table = {}

    def remembered(size):
        if size not in table:
            table[size] = torch.ones(size)
        return table[size]

    return {
        "lru_cache": (lambda module, x: x + grid(*x.shape[-2:]), lambda: grid(12, 12)),
        "dictionary": (lambda module, x: x * remembered(x.shape[-1]), lambda: table[12]),
    }


@pytest.mark.parametrize("name", caches())
def test_caches_are_filled_with_real_tensors(name):
    between, cached = caches()[name]
    model = plain(between)
    kept = masks(model)
    assert kept == masks(plain())
    assert type(cached()) is torch.Tensor
    assert cached().data_ptr() != 0
    expected = model(IMAGE)
    expected.sum().backward()
    assert torch.allclose(fxlean.compact(model.eval(), IMAGE)(IMAGE), model(IMAGE), atol=1e-5)


def test_what_only_real_tensors_can_fill_is_filled():
    torch.manual_seed(0)
    model = Anchored()
    fixed = plain(lambda module, x: x * anchors(x, [0.5, 2.0]))
    assert len(trace_model(model, IMAGE).pieces) == 1
    assert masks(model) == masks(fixed)
    assert model.kept is model.shape is None
    compacted = fxlean.compact(model.eval(), IMAGE)
    with torch.no_grad():
        torch.testing.assert_close(compacted(IMAGE), model(IMAGE))
        wide = torch.rand(2, 3, 24, 12)
        torch.testing.assert_close(compacted(wide), model(wide))


def test_what_is_kept_of_the_inputs_is_no_constant():
    model = Anchored(lambda y, strides: y.new_full((1,), strides[0]) * y.mean((2, 3), keepdim=True))
    with pytest.warns(fxlean.PruneWarning, match=r"^Anchored does not trace as a whole"):
        trace = trace_model(model, IMAGE)
    assert [piece.module for piece in trace.pieces] == ["first", "second", "last"]


def test_helper_objects_and_nested_containers_are_put_back():
    holder = Holder()
    inner = holder.by_size["sizes"][0]

    def between(module, x):
        module.holder.latest = x
        module.holder.by_size["sizes"][0]["x"] = x
        module.holder.by_size["sizes"].append(x)
        return x

    model = plain(between)
    model.holder = holder
    assert masks(model) == masks(plain())
    assert holder.latest is None
    assert holder.by_size["sizes"] == [inner]
    assert inner == {}


def test_tensors_that_outlive_the_trace_are_told():
    def between(module, x):
        KEPT.append(x)
        return x

    with pytest.warns(fxlean.PruneWarning, match=r"kept tensors .* in .*\.KEPT \(shapes: .*clear"):
        found = masks(plain(between))
    KEPT.clear()
    assert found == masks(plain())


LOOKS = {
    "item": lambda x: x.flatten()[0].item(),
    "float": lambda x: float(x.flatten()[0]),
    "tolist": lambda x: x.flatten().tolist()[0],
    "numpy": lambda x: x.detach().cpu().numpy().flat[0],
    "asarray": lambda x: np.asarray(x).flat[0],
    "condition": lambda x: 2.0 if x.flatten()[0] > 1.5 else 1 / 0,
    "equal": lambda x: 2.0 if torch.equal(x, x.clone()) else 1 / 0,
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_values_of_buffers_are_the_real_ones(look):
    seen = []

    def between(module, x):
        seen.append(look(module.scale * 1.0))
        return x * float(seen[-1])

    # A number that scales a value is part of the gain, as a number in the code is.
    assert masks(plain(between)) == masks(plain(lambda module, x: x * 2.0))
    assert set(seen) == {2.0}


@pytest.mark.parametrize("look", [LOOKS[name] for name in ("item", "numpy", "asarray", "tolist")])
def test_where_python_looks_at_the_data_the_model_comes_apart(look):
    seen = []

    def between(module, x):
        seen.append(float(look(x)))
        return x if seen[-1] == seen[0] else 1 / 0

    model = plain(between)
    with pytest.warns(fxlean.PruneWarning, match=r"^Between does not .*looks at values that dep"):
        trace = trace_model(model, IMAGE)
    assert [piece.module for piece in trace.pieces] == ["first", "second", "last"]
    with torch.no_grad():
        assert float(look(model.eval().first(IMAGE))) == seen[0]


def test_scaling_by_the_data():
    model = plain(lambda module, x: x / x.abs().max().item())
    with pytest.warns(fxlean.PruneWarning, match="looks at values"):
        masks(model)
    with pytest.warns(fxlean.PruneWarning, match="looks at values"):
        small = fxlean.compact(model.eval(), IMAGE)
    assert torch.allclose(small(IMAGE), model(IMAGE), atol=1e-5)


def logging_hooks(model, log):
    def look(*given):
        log.append(given[-1][0] if isinstance(given[-1], tuple) else given[-1])
        log.append(float(log[-1].mean()))
        log.append(log[-2].numpy().copy())

    model.first.register_forward_hook(look)
    model.second.register_forward_pre_hook(look)
    model.last.register_forward_hook(lambda module, args, kwargs, out: look(out), with_kwargs=True)
    return torch.nn.modules.module.register_module_forward_hook(look)


def test_hooks_that_look_see_real_tensors_only():
    model, log = plain(), []
    everywhere = logging_hooks(model, log)
    before = [dict(m._forward_hooks) | dict(m._forward_pre_hooks) for m in model.modules()]
    try:
        found = masks(model)
    finally:
        everywhere.remove()
    tensors = [entry for entry in log if isinstance(entry, torch.Tensor)]
    assert tensors
    assert all(type(tensor) is torch.Tensor and tensor.data_ptr() for tensor in tensors)
    assert found == masks(plain())
    now = [dict(m._forward_hooks) | dict(m._forward_pre_hooks) for m in model.modules()]
    assert all(old.items() <= new.items() for old, new in zip(before, now, strict=True))


def test_hooks_that_change_something_are_part_of_the_model():
    scale = torch.tensor([1.0] * 4 + [9.0] * 4)[:, None, None]
    expected = masks(plain(lambda module, x: x * scale * 2.0))
    returning, writing = plain(), plain()
    returning.first.register_forward_hook(lambda module, args, out: out * scale)
    returning.second.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    writing.first.register_forward_hook(lambda module, args, out: none(out.mul_(scale)))
    writing.second.register_forward_pre_hook(lambda module, args: none(args[0].mul_(2.0)))
    assert masks(returning) == expected != masks(plain())
    assert masks(writing) == expected


def none(_):
    """None, whatever was done."""


class Skip(Between):
    """Adds what its first convolution computes."""

    def forward(self, x):
        y = self.first[0](x)
        return self.last(self.second(self.first[1:](y) + y).relu())


@pytest.mark.parametrize("read", [dict.pop, dict.__getitem__])
@pytest.mark.filterwarnings("ignore:Between has kept tensors")
def test_what_a_hook_keeps_for_the_model_is_seen(read):
    kept = {}
    model = plain(lambda module, x: x + read(kept, "skip"))
    model.first[0].register_forward_hook(lambda module, args, out: kept.update(skip=out))
    torch.manual_seed(0)
    assert masks(model) == masks(Skip(None))


class Keeping(Between):
    """Adds what a hook has kept of its first convolution in a call of any time."""

    def __init__(self):
        super().__init__(None)
        self.kept = {}
        self.first[0].register_forward_hook(self.keep)

    def keep(self, module, args, out):
        self.kept["skip"] = out

    def forward(self, x):
        return self.last(self.second(self.first(x) + self.kept["skip"]).relu())


@pytest.mark.parametrize("copies", [False, True])
def test_hooks_that_no_copy_can_run_are_named(copies):
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.kept = conv_bn_relu(3, 16), conv(16, 2, 1), {}
            keep = functools.partial(Keeping.keep, self) if copies else lambda *_: self.keep(*_)
            self.first.register_forward_hook(keep)

        def keep(self, module, args, result):
            self.kept["first"] = result

        def forward(self, x):
            return self.last(self.first(x) + self.kept.pop("first"))

    model = Keeping().eval()
    images = torch.rand(8, 3, 12, 12)
    fxlean.prune(copy.deepcopy(model) if copies else model, 0.5, images, method="l1")
    told = pytest.raises(fxlean.ArgumentError, match=r"KeyError: 'first'.*the hooks of first: ")
    with nullcontext() if copies else told:
        fxlean.shrink(model, 0.5, images, progress=False)


def test_what_a_hook_has_kept_of_an_earlier_call_is_not_read():
    torch.manual_seed(0)
    expected = masks(Skip(None))
    torch.manual_seed(0)
    model = Keeping().eval()
    with torch.no_grad():
        model(IMAGE)
    earlier = model.kept["skip"]
    (piece,) = trace_model(model, IMAGE).pieces
    assert not piece.graph.graph.find_nodes(op="get_attr")
    assert model.kept["skip"] is earlier
    assert masks(model) == expected


class Recurrent(Between):
    """Adds a state that every call replaces, which is a constant of the next one."""

    def __init__(self):
        super().__init__(None)
        self.state = torch.ones(8, 1, 1)

    def forward(self, x):
        y = self.first(x) + self.state
        self.state = y.mean((0, 2, 3))[:, None, None].detach()
        return self.last(self.second(y).relu())


def test_a_state_that_a_call_reads_and_replaces_is_a_constant():
    trace = trace_model(Recurrent().eval(), IMAGE)
    assert len(trace.pieces[0].graph.graph.find_nodes(op="get_attr")) == 1
    assert not trace.left_out


def test_features_that_hooks_collect_are_results():
    class Collecting(Between):
        def forward(self, x):
            super().forward(x)
            kept, self.kept = self.kept, {}
            return list(kept.values())

    torch.manual_seed(0)
    model = Collecting(lambda module, x: x)
    model.kept = {}
    model.first.register_forward_hook(lambda module, args, out: model.kept.update(first=out))
    model.second.register_forward_hook(lambda module, args, out: model.kept.update(second=out))
    (piece,) = trace_model(model, IMAGE).pieces
    shapes = [tuple(node.meta["val"].shape) for node in list(piece.graph.graph.nodes)[-1].args[0]]
    assert shapes == [(2, 8, 12, 12), (2, 6, 12, 12)]
    assert model.kept == {}


@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.parametrizations.weight_norm,
        lambda layer: torch_prune.l1_unstructured(layer, "weight", 0.4),
        nn.utils.spectral_norm,
    ],
)
def test_hooks_that_make_weights_run(wrap):
    model = plain()
    wrap(model.second)
    hooks = rehearse(model, (IMAGE,)).hooks
    assert hooks >= set(model.second._forward_pre_hooks)
    (piece,) = trace_model(model, IMAGE).pieces
    convolutions = [n for n in piece.graph.graph.nodes if "convolution" in str(n.target)]
    assert convolutions[1].args[1].op == "call_function"


def with_seeds(function):
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    return function()


def test_random_states_and_parameters_are_put_back():
    def between(module, x):
        draw()
        with torch.no_grad():
            module.second.weight.mul_(0.5)
            module.last.weight.data = module.last.weight * 2
        if x.sum() < 0:
            raise ValueError
        return x.relu_()

    def draw():
        return random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002

    model, inputs = plain(between), IMAGE.clone()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    numbers = with_seeds(draw)
    with_seeds(lambda: None)
    with pytest.warns(fxlean.PruneWarning, match="Between does not trace"):
        trace_model(model, inputs)
    assert draw() == numbers
    assert torch.equal(inputs, IMAGE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
