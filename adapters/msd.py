"""The mixed-scale dense (MS-D) network, and its channel graph written by hand.

Source: Pelt and Sethian (2018), "A mixed-scale dense convolutional neural network for image
analysis", PNAS 115(2). Every layer reads the input and all layers before it, with 3x3 kernels
of a dilation that changes from layer to layer; a 1x1 layer reads everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fxlean.channels.graph import Kind

from .draft import ByHand, Draft, alive, effective

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
FINAL_LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
PADDING_BACKWARD = {
    1: torch.ops.aten.reflection_pad1d_backward,
    2: torch.ops.aten.reflection_pad2d_backward,
    3: torch.ops.aten.reflection_pad3d_backward,
}


class MSD(nn.Module):
    """Input (n, in_channels, *image) to output (n, out_channels, *image).

    In training mode the dense layers run as `DenseLayers`, which is several times as fast and
    equal up to rounding; in eval mode they are the convolutions that they stand for.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the result, such as classes.
        depth: number of dense layers.
        width: channels of a dense layer.
        dilations: one for each layer, repeated cyclically.
        dims: spatial dimensions, 1 to 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        depth: int,
        width: int = 1,
        dilations: Sequence[int] = tuple(range(1, 11)),
        dims: int = 2,
    ) -> None:
        super().__init__()
        self.in_channels, self.depth, self.width, self.dims = in_channels, depth, width, dims
        self.dilations = [dilations[number % len(dilations)] for number in range(depth)]
        taps = 3**dims
        # A variance of 2 over the number of values that meet in the output.
        scale = (2 / (taps * (in_channels + width * (depth - 1)) + out_channels)) ** 0.5
        for number in range(depth):
            shape = (width, in_channels + number * width, *[3] * dims)
            self.register_parameter(f"weight{number}", nn.Parameter(scale * torch.randn(shape)))
        self.bias = nn.Parameter(torch.zeros(depth * width))
        self.final = FINAL_LAYERS[dims](in_channels + depth * width, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.fast(x)
        biases = self.bias.split(self.width)
        features = x
        for weight, bias, dilation in zip(self._weights(), biases, self.dilations, strict=True):
            padded = F.pad(features, [dilation] * 2 * self.dims, mode="reflect")
            layer = CONVOLUTIONS[self.dims](padded, weight, bias, dilation=dilation)
            features = torch.cat([features, F.relu(layer)], dim=1)
        result: Tensor = self.final(features)
        return result

    def fast(self, x: Tensor) -> Tensor:
        """What `forward` gives in training mode."""
        features = DenseLayers.apply(x, self.bias, self.dilations, *self._weights())
        result: Tensor = self.final(features)
        return result

    def _weights(self) -> list[Tensor]:
        return [getattr(self, f"weight{number}") for number in range(self.depth)]


class DenseLayers(torch.autograd.Function):
    """The input and all dense layers of an `MSD`, in one buffer that is never copied.

    A 3x3 convolution with one output channel is a matrix product that mixes the channels into
    nine maps, one for each tap, followed by the sum of the nine maps, each shifted by its tap.
    The product reads the buffer once, in place; padding and shifting touch nine maps instead
    of all channels. Padding may follow the product because it acts on each channel alike.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor, dilations: Sequence[int], *weights: Tensor
    ) -> Tensor:
        count, size = x.shape[1], x.shape[2:]
        width = len(weights[0])
        # Channels first: then all channels so far are one contiguous matrix.
        features = x.new_empty(count + len(bias), len(x), *size)
        features[:count] = x.transpose(0, 1)
        matrix = features.flatten(1)
        for number, (weight, dilation) in enumerate(zip(weights, dilations, strict=True)):
            maps = torch.mm(_as_matrix(weight), matrix[:count])
            maps = maps.view(-1, len(x), *size)
            padded = F.pad(maps, [dilation] * 2 * len(size), mode="reflect")
            layer = features[count : count + width]
            torch.sum(_shifted(padded, size, dilation), dim=_taps(size), out=layer)
            shift = bias[number * width : (number + 1) * width]
            layer.add_(shift.view(-1, 1, *[1] * len(size))).relu_()
            count += width
        ctx.save_for_backward(features, *weights)
        ctx.dilations = dilations
        return features.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, *weights = ctx.saved_tensors
        width = len(weights[0])
        gradient = gradient.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        matrix, matrix_gradient = features.flatten(1), gradient.flatten(1)
        of_weights: list[Tensor] = []
        of_biases: list[Tensor] = []
        for weight, dilation in zip(reversed(weights), reversed(ctx.dilations), strict=True):
            count = weight.shape[1]
            layer = slice(count, count + width)
            inner = gradient[layer] * (features[layer] > 0)
            of_biases.append(inner.flatten(1).sum(1))
            maps = _unpadded(inner, dilation)
            of_weight = torch.mm(maps, matrix[:count].t())
            of_weights.append(of_weight.view(width, -1, count).mT.reshape(weight.shape))
            matrix_gradient[:count].addmm_(_as_matrix(weight).t(), maps)
        of_input = gradient[: weights[0].shape[1]].transpose(0, 1)
        return of_input, torch.cat(of_biases[::-1]), None, *of_weights[::-1]


def _as_matrix(weight: Tensor) -> Tensor:
    """Shape (out * taps, in)."""
    return weight.flatten(2).mT.reshape(-1, weight.shape[1])


def _taps(size: Sequence[int]) -> tuple[int, ...]:
    """The dimensions of `_shifted` that count the taps."""
    return tuple(range(1, 1 + len(size)))


def _shifted(padded: Tensor, size: Sequence[int], dilation: int) -> Tensor:
    """A view (out, 3, 3, n, *size) of maps (out * taps, n, *padded), each shifted by its tap."""
    assert padded.is_contiguous()
    one_map, one_image, *steps = padded.stride()
    taps = 3 ** len(size)
    # One tap further along an axis: 3, 9, ... maps on, and `dilation` positions on in the map.
    further = [
        3 ** (len(size) - 1 - axis) * one_map + dilation * step for axis, step in enumerate(steps)
    ]
    return padded.as_strided(
        (len(padded) // taps, *[3] * len(size), padded.shape[1], *size),
        (taps * one_map, *further, one_image, *steps),
    )


def _unpadded(inner: Tensor, dilation: int) -> Tensor:
    """The adjoint of padding and shifting: from (out, n, *size) to (out * taps, n * size)."""
    size = inner.shape[2:]
    taps = 3 ** len(size)
    around = [extent + 2 * dilation for extent in size]
    padded = inner.new_zeros(len(inner) * taps, inner.shape[1], *around)
    shifted = _shifted(padded, size, dilation)
    shifted.copy_(inner.view(len(inner), *[1] * len(size), *inner.shape[1:]).expand_as(shifted))
    like = inner.new_empty(1).expand(len(padded), inner.shape[1], *size)
    maps: Tensor = PADDING_BACKWARD[len(size)](padded, like, [dilation] * 2 * len(size))
    return maps.reshape(len(padded), -1)


def msd_graph(model: MSD, order: str = "spectral", *, fold: bool = True) -> ByHand:
    """The channel graph of an `MSD`, read off its `forward`."""
    draft = Draft(order, fold)
    channels = [draft.channel(Kind.LIVE) for _ in range(model.in_channels)]
    for number in range(model.depth):
        name = f"weight{number}"
        dilation = model.dilations[number]
        lengths = draft.lengths(effective(model, name), dilation=dilation)
        kernel = draft.layer(name, name, alive(model, name))
        layer = []
        for out in range(model.width):
            layer.append(draft.channel(Kind.SUM, list(channels), lengths[out], kernel))
            kernel += len(channels)
        channels += layer
    draft.constants("bias", channels[model.in_channels :])
    # The final layer makes the output, so its kernels are not pruned.
    lengths = draft.lengths(effective(model.final, "weight"))
    return draft.finish([draft.channel(Kind.LIVE, channels, row) for row in lengths])
