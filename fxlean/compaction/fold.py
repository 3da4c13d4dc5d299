"""Batch norms folded into the convolutions before them, where nothing is to be trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..channels.rules.weighted import BATCH_NORMS
from ..tracing.tracer import Piece, Trace
from .walk import owners_of

aten = torch.ops.aten
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
    calls = Counter(name for pair in pairs for name in pair)
    found = False
    for names in pairs:
        conv, norm = (cast(Any, model.get_submodule(name)) for name in names)
        transposed = type(conv) in TRANSPOSED and conv.groups == 1
        if (
            all(calls[name] == 1 for name in names)
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
        if getattr(node.target, "overloadpacket", None) in BATCH_NORMS:
            data, mean = node.args[0], node.args[3]
            is_convolution = getattr(data.target, "overloadpacket", None) is aten.convolution
            if is_convolution and len(data.users) == 1:
                names = layers.get(data.args[1], ""), layers.get(mean, "")
                if all(names):
                    yield names
