"""Which weights are pruned: all that can be, less those that are ignored or make the output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..channels.graph import ChannelGraph, Layer
from ..channels.walk import Wired
from ..channels.weights import Weight
from ..channels.wiring import Block, Wiring
from ..tracing.arguments import public_name

COMPUTED = (
    "its weight is a buffer, or computed so that zeroing a parameter zeroes no kernel, as by "
    "weight standardisation; a layer that has the computed weight as its parameter can be pruned"
)
NORMED = (
    "its weight is divided by a norm of the whole, as by spectral norm; it can be pruned once "
    "remove_parametrizations or remove_spectral_norm of torch.nn.utils has made it plain"
)
CONFLICT = "its parameter is used in two different ways"
IGNORED = "ignored"
LINEAR = "linear (include_linear=True includes it)"
OUTPUT = "produces the model's output (prune_outputs=True includes it)"
UNREACHED = "not reached by the forward pass in eval mode"
UNTRACED = "in no part of the model that was traced"
UNUSED = "called, but no output depends on it in eval mode"


@dataclass(frozen=True, eq=False)
class Network:
    """What pruning knows of a model: its graph, and what in the model the graph stands for.

    Attributes:
        graph: channels and edges; lengths of weights are still zero.
        weights: the weight of each of `graph.layers`.
        blocks: every application of a weight, prunable or not.
        biases: (parameter, flat index, channel), see `Wiring`.
        used: parameters and buffers that the traced graphs read.
        opaque_ops: operators without a rule, with how often they occurred.
        skipped: layers and parts that are left alone, and why.
    """

    graph: ChannelGraph
    weights: tuple[Weight, ...]
    blocks: Sequence[Block]
    biases: Sequence[tuple[str, Tensor, Tensor]]
    used: frozenset[str]
    opaque_ops: Mapping[str, int]
    skipped: Mapping[str, str]


def find_prunable(
    model: nn.Module,
    wired: Wired,
    ignored: frozenset[str],
    *,
    prune_outputs: bool,
    include_linear: bool,
) -> Network:
    """Number the kernels of every weight that may be pruned.

    Args:
        model: for the masks that are already on it.
        wired: its wiring.
        ignored: names of parameters to leave alone.
        prune_outputs: whether to prune the layers that make the model's output.
        include_linear: whether to prune linear layers.
    """
    wiring = wired.wiring
    protected = frozenset() if prune_outputs else _output_blocks(wiring, wired.results)
    numbers: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    skipped = dict(wired.left_out)
    for number, block in enumerate(wiring.blocks):
        if block.weight.columns is None or include_linear:
            numbers[_identity(number, block.weight)].append(number)
        else:
            skipped[block.weight.layer_name] = LINEAR
    conflicts = _conflicts([wiring.blocks[group[0]].weight for group in numbers.values()])
    buffers = dict(model.named_buffers())
    prunable: dict[int, Layer] = {}
    weights, pruned, start = [], [], 0
    for group in numbers.values():
        block = wiring.blocks[group[0]]
        weight = block.weight
        name = weight.layer_name
        reason = _reason(weight, ignored, conflicts, not protected.isdisjoint(group))
        if reason is not None:
            skipped[name] = reason
            continue
        layer = Layer(name, block.call().parameter, start, block.rows, block.columns)
        start += block.rows * block.columns
        prunable |= dict.fromkeys(group, layer)
        weights.append(weight)
        pruned.append(_pruned_before(buffers, weight))
    skipped |= _unread(model, wired)
    graph = wiring.finish(wired.outputs, prunable, torch.cat([torch.zeros(0).bool(), *pruned]))
    return Network(
        graph,
        tuple(weights),
        wiring.blocks,
        wiring.biases,
        wired.used,
        wiring.opaque_ops,
        skipped,
    )


def _identity(number: int, weight: Weight) -> tuple[Any, ...]:
    """Equal for applications of the same kernels in the same way."""
    if weight.origin is None:
        return (number,)
    index, columns = weight.origin.index, weight.columns
    return (
        weight.origin.parameter,
        None if index is None else index.numpy().tobytes(),
        None if columns is None else columns.numpy().tobytes(),
        weight.transposed,
        weight.groups,
    )


def _conflicts(weights: Iterable[Weight]) -> set[str]:
    """Parameters of which two different weights use the same elements."""
    uses: defaultdict[str, list[Weight]] = defaultdict(list)
    for weight in weights:
        if weight.origin is not None:
            uses[weight.origin.parameter].append(weight)
    conflicts = set()
    for parameter, users in uses.items():
        if len(users) > 1:
            flat = [w.origin.flat_index(w.value.shape).reshape(-1) for w in users if w.origin]
            every = torch.cat(flat).numpy()
            if len(np.unique(every)) < len(every):
                conflicts.add(parameter)
    return conflicts


def _reason(
    weight: Weight, ignored: frozenset[str], conflicts: set[str], makes_output: bool
) -> str | None:
    if weight.origin is None:
        if weight.name in ignored:
            return IGNORED
        return NORMED if weight.normed else COMPUTED
    if weight.origin.parameter in ignored:
        return IGNORED
    if weight.origin.parameter in conflicts:
        return CONFLICT
    return OUTPUT if makes_output else None


def _output_blocks(wiring: Wiring, results: Tensor) -> frozenset[int]:
    """Applications that make the results directly, or through one join.

    What other layers read as well, such as the features of an encoder, is no mere output.
    """
    sources_of = wiring.rows()
    firsts = np.array([block.first for block in wiring.blocks], dtype=np.int64)
    found, seen = set(), set()
    read = wiring.is_read()
    stack = [(int(channel), 0) for channel in results if not read[channel]]
    while stack:
        channel, joins = stack.pop()
        if (channel, joins) in seen:
            continue
        seen.add((channel, joins))
        number = int(np.searchsorted(firsts, channel, side="right")) - 1
        if number >= 0 and channel < firsts[number] + wiring.blocks[number].rows:
            found.add(number)
            continue
        sources = sources_of(channel)
        joins += len(sources) > 1
        if joins <= 1:
            stack += [(int(source), joins) for source in sources]
    return frozenset(found)


def _pruned_before(buffers: Mapping[str, Tensor], weight: Weight) -> Tensor:
    """True for kernels that masks of `torch.nn.utils.prune` have removed already."""
    alive = torch.ones(weight.value.shape, dtype=torch.bool, device=weight.value.device)
    for origin in (weight.origin, weight.scale):
        name = origin.parameter if origin else ""
        mask = buffers.get(f"{public_name(name)}_mask") if name.endswith("_orig") else None
        if origin is None or mask is None:
            continue
        index = origin.index
        effective = mask if index is None else mask.flatten()[index.to(mask.device)]
        alive &= effective.reshape(alive.shape) != 0
    return ~per_kernel(weight.kernels(alive), weight).reshape(-1).cpu()


def per_kernel(elements: Tensor, weight: Weight) -> Tensor:
    """Whether any element of each kernel is True; from kernels of shape (out, in, *size)."""
    if weight.columns is None:
        return elements.flatten(2).any(2)
    columns = weight.columns.to(elements.device)
    counts = torch.zeros(len(elements), int(columns.max()) + 1, device=elements.device)
    return counts.index_add_(1, columns, elements.float()) > 0


def _unread(model: nn.Module, wired: Wired) -> dict[str, str]:
    """Convolutions that no traced graph reads, and why."""

    def reason(name: str) -> str:
        if wired.left_out:
            return UNTRACED
        return UNUSED if name in wired.called else UNREACHED

    return {
        name: reason(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd)
        and (own := [f"{name}.{key}" for key, _ in module.named_parameters()])
        and wired.used.isdisjoint(own)
    }
