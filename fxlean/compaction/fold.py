"""Batch norms folded into the convolutions before them, where nothing is to be trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..channels.calls import BatchNorm, Convolution, read_call
from ..tracing.tracer import Piece, Trace
from .cut import replace_modules
from .walk import owners_of

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)  # and nothing else


def is_frozen(model: nn.Module) -> bool:
    """Whether nothing is to be trained: evaluation mode, and no parameter requires gradients."""
    modes = any(module.training for module in model.modules())
    return not modes and not any(parameter.requires_grad for parameter in model.parameters())


def fold(model: nn.Module, trace: Trace) -> bool:
    """Fold batch norms into convolutions that only they read, in place; whether there were any."""
    owners = owners_of(model, trace)
    pairs = [pair for piece in trace.pieces for pair in _pairs(piece, owners)]
    uses = Counter(name for pair in pairs for name in pair)
    folded: dict[nn.Module, nn.Module] = {}
    for names in pairs:
        conv, norm = (cast(Any, model.get_submodule(name)) for name in names)
        rest = without_norm(norm)
        if any(uses[name] > 1 for name in names) or rest is None:
            continue
        fused = fuse_conv_bn_eval(conv, norm, conv.transposed)
        folded |= {conv: fused, norm: rest.eval()}
    replace_modules(model, folded)
    return bool(folded)


def _pairs(piece: Piece, owners: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Names of convolutions and the batch norms behind them, each of which is called once."""
    named = piece.state_nodes.items()
    layers = {node: owners.get(name, "") for node, name in named if len(node.users) == 1}
    for node in piece.graph.graph.nodes:
        norm = read_call(node)
        if isinstance(norm, BatchNorm) and len(norm.data.users) == 1:
            before = read_call(norm.data)
            if isinstance(before, Convolution) and not (before.transposed and before.groups > 1):
                names = layers.get(before.weight, ""), layers.get(norm.mean, "")
                if all(names):
                    yield names


def without_norm(norm: nn.Module) -> nn.Module | None:
    """What a batch norm does besides: nothing, or the activation of a subclass; None if unknown."""
    if type(norm) in NORMS:
        return nn.Identity()
    # The check depends on a shape, and symbols have none.
    vars(norm)["_check_input_dim"] = lambda _: None
    try:
        rest = fx.symbolic_trace(norm)
    except Exception:  # Python that depends on values
        return None
    finally:
        del vars(norm)["_check_input_dim"]
    calls = [node for node in rest.graph.nodes if node.target is F.batch_norm]
    if len(calls) != 1:
        return None
    calls[0].replace_all_uses_with(calls[0].args[0])
    rest.graph.eliminate_dead_code()
    rest.delete_all_unused_submodules()
    rest.recompile()
    return rest
