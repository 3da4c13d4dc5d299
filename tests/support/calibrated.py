"""A network to be repaired, and batches for it and for others."""

import torch
from torch import nn

from tests.support.blocks import conv, conv_bn_relu, residual
from tests.support.zoo import randomise_norms


def batches_like(inputs, count=3, samples=8):
    """Batches of random values, each of so many samples, in the shapes of some inputs."""
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(
            torch.randn(samples, *x.shape[1:], generator=generator, dtype=x.dtype) for x in inputs
        )
        for _ in range(count)
    ]


def residual_network():
    """Two residual blocks with batch norms, and images."""
    torch.manual_seed(0)
    blocks = [residual(nn.Sequential(conv_bn_relu(8, 8), *conv_bn_relu(8, 8)[:2])) for _ in "ab"]
    model = nn.Sequential(conv_bn_relu(3, 8), *blocks, conv(8, 2, 1, bias=True)).eval()
    randomise_norms(model)
    return model, torch.randn(32, 3, 8, 8)
