"""The smallest network for each wiring, made of `tests/blocks.py`: `make("residual")`.

Channel counts differ from layer to layer and from the spatial size, so that a mix-up shows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import weight_norm

from tests.support.blocks import (
    Apply,
    Combine,
    DenseInPlace,
    ExpandedGate,
    Fourier,
    FrozenNorm,
    Functional,
    GatedCell,
    Halves,
    InPlace,
    MultiHead,
    Nested,
    Outputs,
    Selective,
    Stacked,
    StackedWeights,
    StandardisedConv2d,
    TwoInputs,
    UNet,
    append_coordinates,
    between,
    cat,
    conv,
    conv_bn,
    conv_bn_relu,
    conv_next_block,
    distances,
    low_pass,
    padded_shortcut,
    pre_activation,
    pre_pruned,
    product_gate,
    residual,
    self_attention,
    shared_inputs,
    shared_sequence,
    shuffle,
    squeeze_excite,
)


@dataclass(frozen=True)
class Case:
    """How to build a network, and the shapes of its example inputs."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = ((2, 3, 8, 8),)


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network called `name` in eval mode and its example inputs, the same in every run."""
    case = ZOO[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        model = case.build().to(dtype).eval()
        randomise_norms(model)
        inputs = tuple(torch.randn(shape, dtype=dtype) for shape in case.shapes)
    # The computed weight of a pruned layer is an attribute that only a forward pass brings up to
    # date; one without gradients, because deepcopy refuses the result of an operation with them.
    with torch.no_grad():
        model(*inputs)
    return model, inputs


@torch.no_grad()
def randomise_norms(model: nn.Module) -> None:
    """Draws the weights, biases and statistics of all norm layers, so that none is 0 or 1."""
    for module in model.modules():
        if not isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm)):
            continue
        if module.weight is not None:
            module.weight.uniform_(0.5, 1.5).mul_(torch.randn_like(module.weight).sign())
        if module.bias is not None:
            module.bias.normal_(0, 0.3)
        for name, statistic in module.named_buffers():
            if name == "running_mean":
                statistic.normal_(0, 0.3)
            elif name == "running_var":
                statistic.uniform_(0.5, 2)


ZOO: dict[str, Case] = {
    "plain": Case(lambda: between(conv_bn_relu(4, 6), outputs=6)),
    "frozen_norm": Case(
        lambda: between(
            nn.Sequential(conv(4, 6), FrozenNorm(6), nn.ReLU()), conv_bn_relu(6, 5), outputs=5
        )
    ),
    "no_norm": Case(
        lambda: nn.Sequential(
            conv(3, 4, bias=True), nn.ReLU(), conv(4, 6, bias=True), nn.ReLU(), conv(6, 2, 1)
        )
    ),
    "scalar_slopes": Case(
        lambda: nn.Sequential(
            *(conv(3, 6, bias=True), nn.PReLU(), conv(6, 5, bias=True), nn.PReLU()),
            conv(5, 2, 1),
        )
    ),
    "norm_without_affine": Case(
        lambda: between(conv(4, 6), nn.BatchNorm2d(6, affine=False), nn.ReLU(), outputs=6)
    ),
    "strided": Case(
        lambda: between(conv_bn_relu(4, 6, stride=2), conv_bn_relu(6, 5, stride=2), outputs=5)
    ),
    "dilated": Case(
        lambda: between(conv_bn_relu(4, 6, dilation=2), conv_bn_relu(6, 5, dilation=3), outputs=5)
    ),
    "grouped": Case(lambda: between(conv_bn_relu(4, 6, groups=2), outputs=6)),
    "depthwise": Case(
        lambda: between(conv_bn_relu(4, 4, groups=4), conv_bn_relu(4, 6, 1), outputs=6)
    ),
    "transposed": Case(
        lambda: between(
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2, bias=False),
        )
    ),
    "stacked": Case(lambda: between(Stacked(4, 6, 0), Stacked(6, 5, -1), outputs=5)),
    "selective": Case(lambda: between(Selective(4, 6), outputs=6)),
    "halves": Case(lambda: between(conv_bn(4, 12), Halves(), outputs=6)),
    "fourier": Case(lambda: between(Fourier(4), conv_bn_relu(4, 4))),
    "low_pass": Case(lambda: between(Apply(low_pass), conv_bn_relu(4, 4))),
    "residual": Case(lambda: between(residual(conv_bn(4, 4)), residual(conv_bn(4, 4)))),
    "residual_downsample": Case(
        lambda: between(
            residual(conv_bn(4, 6, stride=2), conv_bn(4, 6, 1, stride=2)),
            residual(conv_bn(6, 6)),
            outputs=6,
        )
    ),
    "residual_padded": Case(
        lambda: between(residual(conv_bn(4, 6, stride=2), Apply(padded_shortcut)), outputs=6)
    ),
    "pre_activation": Case(
        lambda: between(
            pre_activation(conv(4, 5), conv(5, 4)),
            pre_activation(conv(4, 4), conv(4, 4)),
            nn.BatchNorm2d(4),
            nn.ReLU(),
        )
    ),
    "concat": Case(
        lambda: between(
            Combine(cat, nn.Identity(), conv_bn_relu(4, 3)),
            Combine(cat, conv_bn_relu(7, 2), nn.Identity()),
            outputs=9,
        )
    ),
    "dense_in_place": Case(DenseInPlace),
    "channel_shuffle": Case(
        lambda: between(
            conv_bn_relu(4, 6, groups=2), Apply(shuffle, 2), conv_bn_relu(6, 6, groups=3), outputs=6
        )
    ),
    "split": Case(
        lambda: between(
            Combine(
                cat,
                Apply(torch.narrow, 1, 0, 2),
                nn.Sequential(Apply(torch.narrow, 1, 2, 4), conv_bn_relu(4, 3)),
            ),
            Apply(torch.flip, (1,)),
            conv_bn_relu(5, 4),
            inputs=6,
        )
    ),
    "product_gate": Case(lambda: between(conv_bn(4, 6), Apply(product_gate), outputs=3)),
    "expanded_gate": Case(lambda: between(conv_bn_relu(4, 6), ExpandedGate(6), outputs=6)),
    "squeeze_excite": Case(lambda: between(conv_bn_relu(4, 6), squeeze_excite(6), outputs=6)),
    "swish_gate": Case(
        lambda: between(
            conv_bn(4, 6), Combine(torch.mul, nn.Identity(), nn.Sigmoid()), nn.SiLU(), outputs=6
        )
    ),
    "shared_sequence": Case(shared_sequence),
    "gated_cell": Case(GatedCell),
    "shared_inputs": Case(shared_inputs, shapes=((2, 3, 8, 8), (2, 3, 8, 8))),
    "two_inputs": Case(
        lambda: TwoInputs(conv_bn_relu(3, 5, stride=2), conv_bn_relu(1, 3)),
        shapes=((2, 3, 8, 8), (2, 1, 4, 4)),
    ),
    "two_outputs": Case(Outputs),
    "dict_output": Case(lambda: Outputs(("near", "deep"))),
    "one_dimensional": Case(
        lambda: nn.Sequential(
            nn.Conv1d(3, 4, 5, padding=2, bias=False),
            nn.BatchNorm1d(4),
            nn.ReLU(),
            nn.Conv1d(4, 6, 3, stride=2),
            nn.ReLU(),
            nn.Conv1d(6, 2, 1),
        ),
        shapes=((2, 3, 16),),
    ),
    "three_dimensional": Case(
        lambda: nn.Sequential(
            nn.Conv3d(2, 4, 3, padding=1, bias=False),
            nn.BatchNorm3d(4),
            nn.ReLU(),
            nn.Conv3d(4, 5, (1, 3, 3), stride=(1, 2, 2)),
            nn.ReLU(),
            nn.Conv3d(5, 3, 1),
        ),
        shapes=((2, 2, 4, 8, 8),),
    ),
    "functional": Case(Functional),
    "stacked_weights": Case(StackedWeights),
    "weight_norm": Case(
        lambda: nn.Sequential(
            weight_norm(conv(3, 4, bias=True)), nn.ReLU(), weight_norm(conv(4, 6)), conv(6, 2, 1)
        )
    ),
    "weight_standardised": Case(
        lambda: between(StandardisedConv2d(4, 6, 3, padding=1), nn.ReLU(), outputs=6)
    ),
    "pre_pruned": Case(pre_pruned),
    "group_norm": Case(lambda: between(conv(4, 6), nn.GroupNorm(2, 6), nn.ReLU(), outputs=6)),
    "instance_norm": Case(
        lambda: between(
            conv(4, 6),
            nn.InstanceNorm2d(6, affine=True),
            nn.ReLU(),
            conv(6, 5),
            nn.InstanceNorm2d(5, affine=True, track_running_stats=True),
            outputs=5,
        )
    ),
    "channels_last_block": Case(lambda: between(conv_next_block(4), conv_next_block(4))),
    "pixel_shuffle": Case(
        lambda: nn.Sequential(
            conv(3, 4, bias=True),
            nn.ReLU(),
            conv(4, 12),
            nn.PixelShuffle(2),
            conv(3, 5),
            nn.PixelUnshuffle(2),
            conv(20, 2, 1),
        )
    ),
    "u_net": Case(UNet),
    "classifier": Case(
        lambda: nn.Sequential(
            conv_bn_relu(3, 4, stride=2),
            conv_bn_relu(4, 6),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(6 * 4, 5),
            nn.ReLU(),
            nn.Linear(5, 10),
        )
    ),
    "average_pool": Case(
        lambda: between(
            nn.AvgPool2d(3, stride=2, padding=1), conv_bn_relu(4, 6), nn.AvgPool2d(2), outputs=6
        )
    ),
    "coordinates": Case(
        lambda: nn.Sequential(
            Apply(append_coordinates),
            conv_bn_relu(5, 4),
            Apply(append_coordinates),
            conv_bn_relu(6, 4),
            conv(4, 2, 1),
        )
    ),
    "in_place": Case(InPlace),
    "nested": Case(Nested),
    "self_attention": Case(
        lambda: between(conv_bn_relu(4, 6), Apply(self_attention), conv_bn_relu(6, 4))
    ),
    "multi_head": Case(lambda: between(conv_bn_relu(4, 6), MultiHead(6), conv_bn_relu(6, 4))),
    "opaque": Case(lambda: between(conv_bn_relu(4, 6), Apply(distances), conv_bn_relu(6, 4))),
}
