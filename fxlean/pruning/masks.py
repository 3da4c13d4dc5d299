"""From a keep mask over kernels to masks of `torch.nn.utils.prune` on the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..channels.weights import Weight
from ..compaction.verify import outputs
from ..errors import ArgumentError
from ..masking import put_mask, refresh_from
from ..tracing.inputs import Arguments
from ..tracing.leaves import tensors_in
from ..tracing.sandbox import on_cpu
from ..tracing.tracer import Trace
from .prunable import Network


@on_cpu()
def parameter_masks(
    model: nn.Module,
    network: Network,
    keep: NDArray[np.bool_],
    zero: NDArray[np.bool_],
    maskable: NDArray[np.bool_],
) -> dict[str, Tensor]:
    """Masks by parameter name, True where an element survives.

    Which parameters have one does not depend on what is kept, so that neither names nor the state
    of optimizers change from one call to the next.

    Args:
        model: whose parameters they are.
        network: what pruning knows of it.
        keep: shape (kernels,), True for kernels that survive.
        zero: shape (channels,), True for channels whose biases and batch norms are dropped.
        maskable: shape (channels,), True for channels that are zero if no kernel is kept.
    """
    parameters = dict(model.named_parameters())
    masks: dict[str, Tensor] = {}

    def mask_of(name: str) -> Tensor:
        if name not in masks:
            masks[name] = torch.ones(parameters[name].shape, dtype=torch.bool)
        return masks[name]

    for layer, weight in zip(network.graph.layers, network.weights, strict=True):
        kept = torch.from_numpy(keep[layer.kernels].reshape(layer.rows, layer.columns))
        assert weight.origin is not None
        mask = mask_of(weight.origin.parameter)
        _mask_kernels(mask, weight, kept)
        if weight.scale is not None:
            _mask_scales(mask, mask_of(weight.scale.parameter), weight)
    dead, ever_dead = torch.from_numpy(zero), torch.from_numpy(maskable | zero)
    for name, index, ids in network.biases:
        if ever_dead[ids].any():
            mask_of(name).view(-1)[index[dead[ids]]] = False
    return masks


def _mask_kernels(mask: Tensor, weight: Weight, kept: Tensor) -> None:
    """Write False into the elements of the parameter that make up the pruned kernels."""
    assert weight.origin is not None
    if weight.columns is not None:
        kept = kept[:, weight.columns]
    if weight.origin.index is None and not weight.transposed:
        mask[~kept] = False
    else:
        index = weight.kernels(weight.origin.flat_index(weight.value.shape))
        mask.view(-1)[index[~kept].reshape(-1)] = False


def _mask_scales(mask: Tensor, scale_mask: Tensor, weight: Weight) -> None:
    """Where nothing is left to divide by, mask the scale in place of the elements."""
    assert weight.origin is not None
    assert weight.scale is not None
    index = weight.origin.flat_index(weight.value.shape).reshape(-1)
    scales = weight.scale.flat_index(weight.value.shape).reshape(-1)
    left = torch.zeros(scale_mask.numel()).index_add_(0, scales, mask.view(-1)[index].float())
    scale_mask.view(-1)[left == 0] = False
    mask.view(-1)[index[left[scales] == 0]] = True


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor], called: frozenset[str]) -> None:
    """Put masks on the model, combined with those that are there.

    Args:
        model: modified in place.
        masks: by parameter name, True where an element survives.
        called: names of the modules that the forward pass calls; only their hooks run.
    """
    parameters = dict(model.named_parameters())
    holders: dict[int, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((path, name))
    # Without gradients the masked weights can be deep-copied; the next forward pass renews them.
    with torch.no_grad():
        for key in [key for key in parameters if key in masks]:  # names in the same order always
            for path, name in holders[id(parameters[key])]:
                put_mask(model.get_submodule(path), name, masks[key])
                if path not in called:
                    _refresh_from_caller(model, path, called)


def check_outputs(model: nn.Module, trace: Trace) -> None:
    """Reject masks with which a model returns no numbers any more, on what it was traced on."""
    if not _is_finite(trace.results):
        return
    (found,) = outputs(model, [trace.arguments])
    if not _is_finite(found):
        raise ArgumentError(
            f"with these masks {type(model).__name__} returns NaN or infinity, as "
            f"{_first_undefined(model, trace.arguments)} does where a channel is zero. Add a small "
            "number to what it divides by or takes the logarithm of, or ignore the layers before."
        )


def _first_undefined(model: nn.Module, arguments: Arguments) -> str:
    """The first module, from the inside, that makes NaN or infinity of numbers."""
    found: list[str] = []

    def look(name: str, _: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if _is_finite(args) and not _is_finite(result):
            found.append(name)

    handles = [
        module.register_forward_hook(partial(look, name)) for name, module in model.named_modules()
    ]
    try:
        outputs(model, [arguments])
    finally:
        for handle in handles:
            handle.remove()
    return next(filter(None, found), type(model).__name__)


def _is_finite(tree: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors_in(tree))


def _refresh_from_caller(model: nn.Module, path: str, called: frozenset[str]) -> None:
    """Let the closest module that is called apply the masks of one that is not."""
    caller = next(parent for parent in _parents(path) if parent in called or parent == "")
    refresh_from(model.get_submodule(caller), path[len(caller) :].lstrip("."))


def _parents(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path
