"""Batch norms folded into the convolutions before them, where nothing is to be trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..channels.calls import BatchNorm, Convolution, read_call
from ..tracing.tracer import Piece, Trace
from .walk import owners_of

# Not their subclasses, whose forward may do more.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def is_frozen(model: nn.Module) -> bool:
    """Whether nothing is to be trained: evaluation mode, and no parameter requires gradients."""
    modes = any(module.training for module in model.modules())
    return not modes and not any(parameter.requires_grad for parameter in model.parameters())


def fold(model: nn.Module, trace: Trace) -> bool:
    """Fold batch norms into convolutions that only they read, in place; whether there were any."""
    owners = owners_of(model, trace)
    pairs = [pair for piece in trace.pieces for pair in _pairs(piece, owners)]
    uses = Counter(name for pair in pairs for name in pair)
    found = False
    for names in pairs:
        conv, norm = (cast(Any, model.get_submodule(name)) for name in names)
        transposed = type(conv) in TRANSPOSED and conv.groups == 1
        if (
            all(uses[name] == 1 for name in names)
            and (type(conv) in CONVOLUTIONS or transposed)
            and type(norm) in NORMS
        ):
            fused = fuse_conv_bn_eval(conv, norm, transposed)
            for name, module in zip(names, (fused, nn.Identity().eval()), strict=True):
                model.set_submodule(name, module)
            found = True
    return found


def _pairs(piece: Piece, owners: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Names of convolutions and the batch norms behind them, each of which is called once."""
    named = piece.state_nodes.items()
    layers = {node: owners.get(name, "") for node, name in named if len(node.users) == 1}
    for node in piece.graph.graph.nodes:
        norm = read_call(node)
        if isinstance(norm, BatchNorm) and len(norm.data.users) == 1:
            before = read_call(norm.data)
            if isinstance(before, Convolution):
                names = layers.get(before.weight, ""), layers.get(norm.mean, "")
                if all(names):
                    yield names
