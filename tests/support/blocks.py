"""The blocks and networks that `tests/zoo.py` combines."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune


class Apply(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Tensor], *args, **options):
        super().__init__()
        self.function, self.args, self.options = function, args, options

    def forward(self, *inputs):
        return self.function(*inputs, *self.args, **self.options)

    def extra_repr(self):
        return ", ".join([self.function.__name__, *map(repr, self.args)])


class Combine(nn.Module):
    """A function of the outputs of several branches, which all read the same input."""

    def __init__(self, function: Callable[..., Tensor], *branches: nn.Module):
        super().__init__()
        self.function, self.branches = function, nn.ModuleList(branches)

    def forward(self, x):
        return self.function(*[branch(x) for branch in self.branches])


def conv(inputs: int, outputs: int, size: int = 3, *, dilation: int = 1, **options) -> nn.Conv2d:
    """A convolution that keeps the size, without bias unless asked; norms on both sides of 1."""
    padding = size // 2 * dilation
    options = {"bias": False, "padding": padding, "dilation": dilation, **options}
    layer = nn.Conv2d(inputs, outputs, size, **options)
    nn.init.normal_(layer.weight, std=0.3 if size > 1 else 0.8)
    return layer


def conv_bn(inputs: int, outputs: int, size: int = 3, **options) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, size, **options), nn.BatchNorm2d(outputs))


def conv_bn_relu(inputs: int, outputs: int, size: int = 3, **options) -> nn.Sequential:
    return conv_bn(inputs, outputs, size, **options).append(nn.ReLU())


def between(*body: nn.Module, inputs: int = 4, outputs: int = 4) -> nn.Sequential:
    """`body` between a first and a last convolution, so that its own kernels can be pruned."""
    return nn.Sequential(conv_bn_relu(3, inputs), *body, conv(outputs, 2, 1, bias=True))


def add(*values: Tensor) -> Tensor:
    return F.relu(sum(values[1:], start=values[0]))


def cat(*values: Tensor) -> Tensor:
    return torch.cat(values, dim=1)


def residual(body: nn.Module, shortcut: nn.Module | None = None) -> Combine:
    return Combine(add, body, shortcut or nn.Identity())


def pre_activation(*convs: nn.Conv2d) -> Combine:
    body = nn.Sequential()
    for layer in convs:
        body.extend([nn.BatchNorm2d(layer.in_channels), nn.ReLU(), layer])
    return Combine(torch.add, body, nn.Identity())


def padded_shortcut(x: Tensor) -> Tensor:
    """The parameter-free shortcut of He et al. (2016), option A: 4 to 6 channels."""
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))


def shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, *size = x.shape
    x = x.view(batch, groups, channels // groups, *size).transpose(1, 2)
    return x.reshape(batch, channels, *size)


def product_gate(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=1)
    return first * second


def append_coordinates(x: Tensor) -> Tensor:
    """`x` with two more channels: the vertical and horizontal position of each pixel."""
    axes = [torch.linspace(-1, 1, length, dtype=x.dtype, device=x.device) for length in x.shape[2:]]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return torch.cat([x, positions.expand(len(x), -1, -1, -1)], dim=1)


def self_attention(x: Tensor) -> Tensor:
    """Every position reads all positions, weighted by the similarity of their channels."""
    tokens = x.flatten(2).transpose(1, 2)
    tokens = F.scaled_dot_product_attention(tokens, tokens, tokens)
    return x + tokens.transpose(1, 2).reshape(x.shape)


class MultiHead(nn.Module):
    """Attention by the module of torch, with two heads, which runs as one fused operator."""

    def __init__(self, channels: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, 2, batch_first=True)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        tokens, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return x + tokens.transpose(1, 2).reshape(x.shape)


class FrozenNorm(nn.Module):
    """A batch norm of four buffers, computed by hand, as backbones of detectors have it."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("weight", torch.rand(channels) + 0.5)
        self.register_buffer("bias", torch.randn(channels) * 0.3)
        self.register_buffer("running_mean", torch.randn(channels) * 0.3)
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = (
            self.weight.reshape(1, -1, 1, 1)
            * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        )
        shift = self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale
        return x * scale + shift


class Stacked(nn.Module):
    """Two convolutions, stacked along a new dimension, and added up along it."""

    def __init__(self, inputs: int, outputs: int, dim: int):
        super().__init__()
        self.branches = nn.ModuleList([conv_bn_relu(inputs, outputs) for _ in range(2)])
        self.dim = dim

    def forward(self, x):
        return torch.stack([branch(x) for branch in self.branches], self.dim).sum(self.dim)


class Selective(nn.Module):
    """Two branches, stacked and weighed against each other, channel by channel."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.branches = nn.ModuleList([conv_bn_relu(inputs, outputs) for _ in range(2)])
        self.choose = nn.Conv2d(outputs, 2 * outputs, 1)

    def forward(self, x):
        y = torch.stack([branch(x) for branch in self.branches], 1)
        votes = self.choose(y.sum(1).mean((2, 3), keepdim=True))
        shares = votes.reshape(len(x), 2, -1, 1, 1).softmax(1)
        return (y * shares).sum(1)


class Halves(nn.Module):
    """A gate and what it gates, which are two halves of the channels, by a view of both."""

    def forward(self, x):
        gate, value = x.view(x.shape[0], 2, -1, *x.shape[2:]).unbind(1)
        return gate.sigmoid() * value


class Fourier(nn.Module):
    """A convolution of the real and imaginary parts of a spectrum: fast Fourier convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.mix = conv_bn(2 * channels, 2 * channels, 1)

    def forward(self, x):
        spectrum = torch.fft.rfft2(x, norm="ortho")
        real, imag = self.mix(torch.cat([spectrum.real, spectrum.imag], 1)).relu().chunk(2, 1)
        return torch.fft.irfft2(torch.complex(real, imag), s=x.shape[-2:], norm="ortho")


def low_pass(x: Tensor) -> Tensor:
    """The lowest frequencies, copied into a spectrum of zeros."""
    spectrum = torch.fft.rfft2(x)
    low = torch.zeros_like(spectrum)
    low[..., :3, :3] = spectrum[..., :3, :3]
    return torch.fft.irfft2(low, s=x.shape[-2:])


def beside_zeros(x: Tensor) -> Tensor:
    """With as many channels of zeros, such as a first iterate."""
    return torch.cat([torch.zeros_like(x), x], 1)


def distances(x: Tensor) -> Tensor:
    """Distances between rows: an operator without a rule."""
    return x + torch.cdist(x, x).mean(-1, keepdim=True)


class DenseInPlace(nn.Module):
    """Mixed-scale dense network: every layer reads all earlier ones from one shared buffer."""

    def __init__(self, inputs: int = 3, depth: int = 4):
        super().__init__()
        self.inputs, self.depth = inputs, depth
        for i in range(depth):
            setattr(self, f"weight{i}", nn.Parameter(torch.randn(1, inputs + i, 3, 3) * 0.4))
        self.bias = nn.Parameter(torch.randn(depth) * 0.3)
        self.last = nn.Conv2d(inputs + depth, 2, 1)

    def forward(self, x):
        batch, _, height, width = x.shape
        result = x.new_zeros(batch, self.inputs + self.depth, height, width)
        result[:, : self.inputs] = x
        for i in range(self.depth):
            dilation, end = i % 3 + 1, self.inputs + i
            padded = F.pad(result[:, :end], [dilation] * 4, mode="reflect")
            weight, bias = getattr(self, f"weight{i}"), self.bias[i : i + 1]
            result[:, end : end + 1] = F.conv2d(padded, weight, bias, dilation=dilation).relu()
        return self.last(result)


class Functional(nn.Module):
    """Convolutions as functions of raw parameters."""

    def __init__(self):
        super().__init__()
        self.weight1 = nn.Parameter(torch.randn(4, 3, 3, 3) * 0.3)
        self.weight2 = nn.Parameter(torch.randn(6, 4, 3, 3) * 0.3)
        self.weight3 = nn.Parameter(torch.randn(2, 6, 1, 1))
        self.bias1 = nn.Parameter(torch.randn(4) * 0.3)

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.weight1, self.bias1, padding=1))
        x = F.relu(torch.conv2d(x, self.weight2, stride=2, padding=1))
        return F.conv2d(x, self.weight3)


class StackedWeights(nn.Module):
    """One large parameter that holds the weights of three layers."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 4, 4, 3, 3) * 0.3)
        self.first, self.last = conv(3, 4), conv(4, 2, 1)

    def forward(self, x):
        x = self.first(x)
        for i in range(3):
            x = F.relu(F.conv2d(x, self.weights[i], padding=1))
        return self.last(x)


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose filters are standardised on every call (Qiao et al., 2019)."""

    def forward(self, input):
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-5)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding)


class LayerScale(nn.Module):
    """A learned factor per channel, which is the last axis."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(channels))

    def forward(self, x):
        return x * self.gamma


class UNet(nn.Module):
    """Two levels; one decoder upsamples by interpolation, the other by transposed convolution."""

    def __init__(self):
        super().__init__()
        self.encoder1, self.encoder2 = conv_bn_relu(3, 4), conv_bn_relu(4, 6)
        self.bottom, self.pool = conv_bn_relu(6, 7), nn.MaxPool2d(2)
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.decoder2 = conv_bn_relu(7 + 6, 5)
        self.transposed = nn.ConvTranspose2d(5, 3, 2, stride=2)
        self.decoder1, self.last = conv_bn_relu(3 + 4, 4), conv(4, 2, 1, bias=True)

    def forward(self, x):
        skip1 = self.encoder1(x)
        skip2 = self.encoder2(self.pool(skip1))
        x = self.upsample(self.bottom(self.pool(skip2)))
        x = self.transposed(self.decoder2(torch.cat([x, skip2], dim=1)))
        return self.last(self.decoder1(torch.cat([skip1, x], dim=1)))


class TwoInputs(nn.Module):
    """Two inputs, each through its branch; the branches may be one and the same module."""

    def __init__(self, left: nn.Module, right: nn.Module):
        super().__init__()
        self.left, self.right, self.last = left, right, conv(8, 2, 1)

    def forward(self, x, y):
        return self.last(torch.cat([self.left(x), self.right(y)], dim=1))


class Outputs(nn.Module):
    """Two heads on one body; returns a tuple, or a dict if the outputs have names."""

    def __init__(self, names: tuple[str, str] | None = None):
        super().__init__()
        self.names, self.body = names, nn.Sequential(conv_bn_relu(3, 4), conv_bn_relu(4, 6))
        self.near, self.deep = conv(6, 2, 1), nn.Sequential(conv_bn_relu(6, 5), conv(5, 1, 1))

    def forward(self, x):
        x = self.body(x)
        outputs = self.near(x), self.deep(x)
        return dict(zip(self.names, outputs, strict=True)) if self.names else outputs


class InPlace(nn.Module):
    """Operators that overwrite their input, also where another name still refers to it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = conv_bn(3, 4), conv_bn(4, 4), conv(4, 2, 1)

    def forward(self, x):
        x = self.first(x).relu_()
        y = self.second(x)
        y += x
        y[:, 1:3].mul_(0.5)
        return self.last(F.relu_(y)).clamp_(-1)


class Nested(nn.Module):
    """Modules in lists, dicts and sequences of each other."""

    def __init__(self):
        super().__init__()
        stage = nn.ModuleList([conv_bn_relu(4, 4), nn.ModuleDict({"a": conv_bn_relu(4, 4)})])
        self.parts = nn.ModuleDict({"stem": conv_bn_relu(3, 4), "stage": stage})
        self.heads = nn.Sequential(nn.Sequential(nn.Sequential(conv(4, 2, 1))))

    def forward(self, x):
        x = self.parts["stem"](x)
        for block in self.parts["stage"]:
            x = x + (block["a"] if isinstance(block, nn.ModuleDict) else block)(x)
        return self.heads(x)


def shared_sequence() -> nn.Module:
    block = conv_bn(4, 4)
    return between(block, nn.ReLU(), block, nn.ReLU())


class GatedCell(nn.Module):
    """Two steps of a recurrent cell, whose gates are halves of one convolution, from zeros on."""

    def __init__(self):
        super().__init__()
        self.read, self.gates, self.last = conv(3, 4), conv(8, 8), conv(4, 2, 1)

    def forward(self, x):
        x = self.read(x)
        state = torch.zeros_like(x)
        for _ in range(2):
            gate, new = self.gates(torch.cat([x, state], 1)).chunk(2, 1)
            state = gate.sigmoid() * state + new.tanh()
        return self.last(state)


def shared_inputs() -> nn.Module:
    block = conv_bn_relu(3, 4)
    return TwoInputs(block, block)


def pre_pruned() -> nn.Module:
    """Half of the kernels of two layers are pruned, in the way of `torch.nn.utils.prune`."""
    layers = conv(4, 6), conv(6, 5)
    for layer in layers:
        kept = torch.rand(layer.weight.shape[:2]) < 0.5
        kept[0, 0] = True
        mask = kept[:, :, None, None].expand_as(layer.weight)
        prune.custom_from_mask(layer, "weight", mask.to(layer.weight.dtype))
    first, second = layers
    return between(first, nn.BatchNorm2d(6), nn.ReLU(), second, nn.ReLU(), outputs=5)


def conv_next_block(channels: int) -> nn.Module:
    return residual(
        nn.Sequential(
            conv(channels, channels, groups=channels, bias=True),
            Apply(torch.permute, (0, 2, 3, 1)),
            nn.LayerNorm(channels),
            nn.Linear(channels, 2 * channels),
            nn.GELU(),
            nn.Linear(2 * channels, channels),
            LayerScale(channels),
            Apply(torch.permute, (0, 3, 1, 2)),
        )
    )


class ExpandedGate(nn.Module):
    """A gate made by linear layers, and expanded to the size of what it is multiplied with."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(channels, 3), nn.Linear(3, channels)

    def forward(self, x):
        samples, channels, *_ = x.shape
        gate = torch.sigmoid(self.second(torch.tanh(self.first(x.mean((2, 3))))))
        return x * gate.view(samples, channels, 1, 1).expand_as(x)


def squeeze_excite(channels: int) -> nn.Module:
    gate = nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        conv(channels, 2, 1, bias=True),
        nn.ReLU(),
        conv(2, channels, 1, bias=True),
        nn.Sigmoid(),
    )
    return Combine(torch.mul, nn.Identity(), gate)


def anchors(y, strides):
    """A factor for every place, from one stride for each half of the rows."""
    rows = y.shape[2] // 2
    return torch.cat([y.new_full((1, 1, rows, y.shape[3]), stride) for stride in strides], 2)


class Anchored(nn.Module):
    """Keeps something from call to call, as YOLO's head does, and makes it from plain tensors."""

    def __init__(self, make=anchors):
        super().__init__()
        self.first, self.second, self.last = conv_bn_relu(3, 8), conv(8, 6), conv(6, 2, 1)
        self.strides, self.kept, self.shape = torch.tensor([0.5, 2.0]), None, None
        self.make = make

    def forward(self, x):
        y = self.first(x)
        if self.shape != y.shape:
            self.kept, self.shape = self.make(y, self.strides), y.shape
        return self.last(self.second(y * self.kept).relu())
