"""Tensors are found in whatever models take and return, and objects that hide them are refused."""

from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxlean
from fxlean.tracing.leaves import replaced, strangers_in, tensors_in
from tests.support.blocks import conv, conv_bn_relu

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* keeps its size, for (every|its):fxlean.CompactionWarning"
)

A, B = torch.zeros(1), torch.ones(2)
Pair = namedtuple("Pair", "first second")
IMAGE = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@dataclass
class Out:
    features: Any
    note: str = "none"
    more: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Frozen:
    features: Any


class ModelOutput(OrderedDict[str, Any]):
    """As in Hugging Face's libraries: keys are attributes as well."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value


class Box:
    """A plain object."""

    def __init__(self, content: Any) -> None:
        self.content = content


class Slots:
    __slots__ = ("content",)

    def __init__(self, content: Any) -> None:
        self.content = content


TREES = {
    "tensor": lambda x: x,
    "tuple": lambda x: (1, x, None),
    "list": lambda x: [x, "name"],
    "dict": lambda x: {"a": 1, "b": x},
    "nested": lambda x: {"a": [({"b": x},)]},
    "named tuple": lambda x: Pair(x, 3),
    "ordered": lambda x: OrderedDict(a=x),
    "model output": lambda x: ModelOutput(logits=x, hidden=None),
    "user dict": lambda x: UserDict(a=x),
    "default dict": lambda x: defaultdict(list, a=[x]),
    "deque": lambda x: deque([x]),
    "dataclass": lambda x: Out(x),
    "deep dataclass": lambda x: Out(None, more=[Frozen(x)]),
}
STRANGERS = {
    "Box": Box,
    "Slots": Slots,
    "Normal": lambda x: torch.distributions.Normal(x, 1.0, validate_args=False),
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_containers(tree):
    assert [id(tensor) for tensor in tensors_in(tree(A))] == [id(A)]
    assert not strangers_in(tree(A))
    old = tree(A)
    new = replaced(old, lambda tensor: B)
    assert type(new) is type(tree(A))
    assert tensors_in(new)[0] is B
    assert tensors_in(old)[0] is A


@pytest.mark.parametrize("name", STRANGERS)
def test_objects_that_hide_tensors(name):
    assert strangers_in([1, {"a": STRANGERS[name](A)}]) == [name]


@pytest.mark.parametrize("tree", [1, "text", None, Box(3), Box([Box({"a": 1})]), int, nn.Linear])
def test_objects_without_tensors(tree):
    assert not strangers_in(tree)
    assert not tensors_in(tree)


class Features(nn.Module):
    """Returns its features beside its output, in some container."""

    def __init__(self, tree):
        super().__init__()
        self.body, self.head, self.tree = conv_bn_relu(3, 8), conv(8, 2, 1), tree
        self.stem = conv_bn_relu(3, 3)

    def forward(self, x):
        features = self.body(self.stem(x))
        return self.head(features), self.tree(features)


def features(tree):
    torch.manual_seed(0)
    return Features(tree).eval()


@pytest.mark.parametrize("name", sorted(TREES.keys() - {"tensor"}))
def test_results_in_containers_are_seen(name):
    plain, wrapped = features(TREES["tensor"]), features(TREES[name])
    counts = [fxlean.prune(model, 0.4, IMAGE, prune_outputs=True) for model in (plain, wrapped)]
    assert counts[0].layers == counts[1].layers
    for (key, value), other in zip(
        plain.state_dict().items(), wrapped.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), key
    small = fxlean.compact(wrapped, IMAGE)
    expected, found = tensors_in(wrapped(IMAGE)), tensors_in(small(IMAGE))
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    assert torch.allclose(found[1], expected[1], atol=1e-5)


@pytest.mark.parametrize("name", STRANGERS)
def test_results_in_other_objects_are_refused(name):
    model = features(STRANGERS[name])
    with pytest.raises(fxlean.ArgumentError, match=rf"^Features returns tensors in {name}.*Return"):
        fxlean.prune(model, 0.4, IMAGE)
    with pytest.raises(fxlean.ArgumentError, match=rf"^Features returns tensors in {name}"):
        fxlean.compact(model, IMAGE)


@dataclass
class Scan:
    image: Tensor
    spacing: float


class Named(nn.Module):
    """Takes an image by name, and things that are no tensors."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(conv_bn_relu(3, 8), conv(8, 6)), conv(6, 2, 1)

    def forward(self, *, pixel_values, scale=1.0, mode="sum", extra=None):
        x = self.body(pixel_values) * scale
        return self.head(x if extra is None else x + extra["scans"][0].image[:, :1])


def named():
    torch.manual_seed(0)
    return Named().eval()


INPUTS = {
    "keywords": {"pixel_values": IMAGE},
    "model output": ModelOutput(pixel_values=IMAGE),
    "no tensors": {"pixel_values": IMAGE, "scale": 1.0, "mode": "mean"},
    "nested": {"pixel_values": IMAGE, "extra": {"scans": [Scan(IMAGE, 0.5)]}},
    "guessed": None,
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_by_name(name):
    model, inputs = named(), INPUTS[name]
    result = fxlean.prune(model, 0.4, inputs)
    positional = nn.Sequential(named().body, named().head)
    if name != "nested":
        assert result.kept == fxlean.prune(positional, 0.4, IMAGE).kept
        assert torch.equal(model.body[1].weight, positional[0][1].weight)
    small = fxlean.compact(model, inputs)
    given = INPUTS["nested"] if name == "nested" else INPUTS["keywords"]
    assert torch.allclose(small(**given), model(**given), atol=1e-5)
    assert fxlean.report(small, inputs).kernels_left == result.kept + model.head.weight.numel()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            IMAGE,
            r"^Named rejects .*TypeError.*takes pixel_values by name: pass example_inputs=dict",
        ),
        (
            {"pixels": IMAGE},
            r"^Named rejects the example inputs pixels=\(1, 3, 12, 12\): TypeError",
        ),
        ({3: IMAGE}, r"^example_inputs is a dict with keys \[3\], .*Pass \(inputs,\) for a model"),
        ({"pixel_values": Box(IMAGE)}, r"^example_inputs holds tensors in Box, .*Pass tensors in"),
        (IMAGE[:0], r"empty tensor of shape \(0, 3, 12, 12\).*Pass at least one sample"),
        ({"pixel_values": IMAGE[..., :0]}, r"empty tensor of shape \(1, 3, 12, 0\)"),
    ],
)
def test_inputs_that_are_refused(inputs, message):
    for function in (lambda *args: fxlean.prune(args[0], 0.5, args[1]), fxlean.compact):
        with pytest.raises(fxlean.ArgumentError, match=message):
            function(named(), inputs)
