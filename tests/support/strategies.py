"""Random small networks for hypothesis: `networks()` draws a model with its example input.

A network is a list of steps over a growing list of values. Value 0 is the input, and step i
makes value i + 1 from values before it. A failing network prints as the expression that builds
it, so it can be pasted into a test of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.blocks import Apply, cat, shuffle
from tests.support.zoo import randomise_norms

Shape = tuple[int, ...]
Options = dict[str, Any]
LARGEST_SIDE, LARGEST_WIDTH = 12, 12


def part(x: Tensor, pieces: int, index: int) -> Tensor:
    return x.chunk(pieces, dim=1)[index]


def conv(
    inputs: int,
    *,
    out: int,
    kernel: int = 3,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = False,
) -> nn.Conv2d:
    padding = kernel // 2 * dilation
    return nn.Conv2d(inputs, out, kernel, stride, padding, dilation, groups, bias)


def transposed(inputs: int, *, out: int, groups: int = 1, bias: bool = False) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, out, 2, stride=2, groups=groups, bias=bias)


# What each step runs, given the channels of its first value and the options of the step.
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "conv": conv,
    "transposed": transposed,
    "batch_norm": nn.BatchNorm2d,
    "relu": lambda channels: nn.ReLU(),
    "gelu": lambda channels: nn.GELU(),
    "sigmoid": lambda channels: nn.Sigmoid(),
    "add": lambda channels: Apply(torch.add),
    "mul": lambda channels: Apply(torch.mul),
    "cat": lambda channels: Apply(cat),
    "part": lambda channels, **options: Apply(part, **options),
    "shuffle": lambda channels, **options: Apply(shuffle, **options),
    "max_pool": lambda channels: nn.MaxPool2d(2),
    "avg_pool": lambda channels: nn.AvgPool2d(2),
    "mean": lambda channels: nn.AdaptiveAvgPool2d(1),
    "upsample": lambda channels: nn.Upsample(scale_factor=2),
    "pad": lambda channels, *, mode: Apply(F.pad, (1, 1, 1, 1), mode=mode),
}


@dataclass(frozen=True)
class Step:
    """Run `op` on the values numbered `reads`."""

    op: str
    reads: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def __repr__(self) -> str:
        options = [f"{key}={value!r}" for key, value in self.options]
        return f"step({', '.join([repr(self.op), *map(repr, self.reads), *options])})"


def step(op: str, *reads: int, **options: Any) -> Step:
    """`Step` as one writes it: `step("conv", 0, out=4)`; `again` repeats the layer of a step."""
    return Step(op, reads, tuple(options.items()))


class RandomNet(nn.Module):
    """Runs the `steps` that the last value needs; the weights follow from `seed`."""

    def __init__(
        self,
        inputs: int,
        steps: list[Step],
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ):
        super().__init__()
        self.inputs, self.steps, self.seed, self.dtype = inputs, list(steps), seed, dtype
        self.layers = nn.ModuleList()
        shapes: list[Shape] = [(1, inputs, 8, 8)]
        for current in steps:
            layer = make_layer(current, shapes, self.layers)
            self.layers.append(layer)
            shapes.append(shape_after(layer, current, shapes))
        self.layers.to_empty(device="cpu").to(dtype)
        self.initialise()
        self.eval()

    @torch.no_grad()
    def initialise(self) -> None:
        """Weights around 0 with norms on both sides of 1, and random batch norms."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for parameter in self.parameters():
                parameter.normal_(0, 0.4)
            randomise_norms(self)

    def forward(self, x):
        values = {0: x}
        for made in self.needed():
            values[made] = self.layers[made - 1](*[values[i] for i in self.steps[made - 1].reads])
        return values[len(self.steps)]

    def needed(self) -> list[int]:
        """The numbers of the values that the last one depends on, itself included."""
        found = {len(self.steps)}
        for made in range(len(self.steps), 0, -1):
            if made in found:
                found |= set(self.steps[made - 1].reads)
        return sorted(found - {0})

    def __repr__(self) -> str:
        steps = "".join(f"    {current!r},\n" for current in self.steps)
        dtype = "" if self.dtype == torch.float64 else f", dtype={self.dtype}"
        return f"RandomNet({self.inputs}, [\n{steps}], seed={self.seed}{dtype})"


def make_layer(current: Step, shapes: list[Shape], layers: nn.ModuleList) -> nn.Module:
    """The module of a step, on the meta device: without memory, until it is initialised."""
    options = dict(current.options)
    if current.op == "again":
        return layers[options["layer"]]
    with torch.device("meta"):
        return LAYERS[current.op](shapes[current.reads[0]][1], **options).eval()


def shape_after(layer: nn.Module, current: Step, shapes: list[Shape]) -> Shape:
    inputs = [torch.empty(shapes[i], device="meta") for i in current.reads]
    return tuple(layer(*inputs).shape)


class Drawn(NamedTuple):
    """A drawn network and its example inputs."""

    model: RandomNet
    inputs: tuple[Tensor, ...]

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(x.shape)) for x in self.inputs)
        return f"{self.model!r} on {shapes}"


@st.composite
def networks(
    draw: st.DrawFn,
    max_steps: int = 8,
    ops: tuple[str, ...] = (*LAYERS, "again", "add", "cat", "conv"),
    dtype: torch.dtype = torch.float64,
) -> Drawn:
    """Networks from a first convolution, up to `max_steps` steps and a last 1x1 convolution.

    Every step reads at least one value behind the first convolution, so that there is always
    something to prune. `ops` limits the steps to some of `LAYERS` and "again"; those named twice
    are drawn more often.
    """
    inputs = draw(st.integers(1, 3))
    steps: list[Step] = []
    shapes: list[Shape] = [(1, inputs, 8, 8)]
    layers = nn.ModuleList()

    def append(new: Step) -> None:
        layers.append(make_layer(new, shapes, layers))
        steps.append(new)
        shapes.append(shape_after(layers[-1], new, shapes))

    append(step("conv", 0, **draw(conv_options(inputs))))
    for _ in range(draw(st.integers(0, max_steps))):
        append(draw(next_steps(steps, shapes, ops)))
    append(step("conv", len(steps), out=draw(st.integers(1, 2)), kernel=1, bias=True))
    model = RandomNet(inputs, steps, draw(st.integers(0, 999)), dtype)
    batch = draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(model.seed)
    return Drawn(model, (torch.randn(batch, *shapes[0][1:], generator=generator, dtype=dtype),))


def divisors(*numbers: int) -> st.SearchStrategy[int]:
    common = range(1, min(numbers) + 1)
    return st.sampled_from([d for d in common if all(number % d == 0 for number in numbers)])


@st.composite
def conv_options(draw: st.DrawFn, inputs: int, kernels: tuple[int, ...] = (3, 1, 2)) -> Options:
    """Options of "conv": mostly plain ones, and only those that differ from the default."""
    out = draw(st.integers(1, 6))
    options: Options = {"kernel": draw(st.sampled_from(kernels))}
    options["stride"], options["dilation"] = draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    options["groups"] = draw(divisors(inputs, out))
    options["bias"] = draw(st.booleans())
    defaults = {"kernel": 3, "stride": 1, "dilation": 1, "groups": 1, "bias": False}
    changed = {key: value for key, value in options.items() if value != defaults[key]}
    return {"out": out, **changed}


@st.composite
def next_steps(
    draw: st.DrawFn, steps: list[Step], shapes: list[Shape], ops: tuple[str, ...]
) -> Step:
    """One more step, chosen from those of `ops` that the values so far allow."""
    latest = len(shapes) - 1
    first = draw(st.just(latest) | st.integers(1, latest))
    _, channels, side, _ = shapes[first]
    like = [
        i for i, shape in enumerate(shapes) if shape[1:] in {shapes[first][1:], (channels, 1, 1)}
    ]
    beside = [
        i
        for i, shape in enumerate(shapes)
        if shape[2:] == shapes[first][2:] and shape[1] + channels <= LARGEST_WIDTH
    ]
    same_input = [
        i
        for i, made in enumerate(steps)
        if made.op == "conv" and shapes[made.reads[0]][1] == channels
    ]
    allowed = {
        "transposed": side * 2 <= LARGEST_SIDE,
        "upsample": side * 2 <= LARGEST_SIDE,
        "pad": 2 <= side <= LARGEST_SIDE - 2,
        "max_pool": side >= 2,
        "avg_pool": side >= 2,
        "cat": bool(beside),
        "part": channels >= 2,
        "shuffle": channels >= 4,
        "again": bool(same_input),
    }
    op = draw(st.sampled_from([op for op in ops if allowed.get(op, True)]))
    match op:
        case "conv":
            return step(op, first, **draw(conv_options(channels)))
        case "transposed":
            out = draw(st.integers(1, 6))
            return step(op, first, out=out, groups=draw(divisors(channels, out)))
        case "add" | "mul":
            return step(op, first, draw(st.sampled_from(like)))
        case "cat":
            return step(op, first, draw(st.sampled_from(beside)))
        case "part":
            pieces = draw(st.integers(2, channels))
            pieces = -(-channels // -(-channels // pieces))
            return step(op, first, pieces=pieces, index=draw(st.integers(0, pieces - 1)))
        case "shuffle":
            return step(op, first, groups=draw(divisors(channels)))
        case "pad":
            return step(op, first, mode=draw(st.sampled_from(["constant", "reflect"])))
        case "again":
            return step(op, first, layer=draw(st.sampled_from(same_input)))
    return step(op, first)
