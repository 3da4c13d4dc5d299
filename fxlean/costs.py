"""What a model costs: parameters and multiply-accumulates, layer by layer.

A masked model counts twice: as large as it is, and what would be left of it without the kernels
that are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from .movements import moves
from .prunable import layer_name
from .tracing import Piece, trace_model
from .weights import Constants
from .wiring import Weight

aten = torch.ops.aten
WEIGHTS: dict[Any, int] = {
    aten.convolution: 1,
    aten.mm: 1,
    aten.addmm: 2,
}  # which argument is the weight


@dataclass(frozen=True)
class LayerCost:
    """The cost of one weight of a model.

    Attributes:
        name: of the layer.
        kernels, kernels_left: slices from an input channel to an output channel, in all and
            those that are not zero.
        parameters, parameters_left: elements of these kernels.
        macs, macs_left: multiply-accumulates for one sample.
    """

    name: str
    kernels: int
    kernels_left: int
    parameters: int
    parameters_left: int
    macs: int
    macs_left: int


@dataclass(frozen=True)
class Report:
    """What a model costs, layer by layer; printing it shows a table.

    Attributes:
        layers: every convolution and linear layer that the forward pass reaches.
        parameters: elements of all parameters of the model.
        parameters_left: parameters without those that are zero or masked.
    """

    layers: tuple[LayerCost, ...]
    parameters: int
    parameters_left: int

    @property
    def kernels(self) -> int:
        """Number of kernels of all layers."""
        return sum(layer.kernels for layer in self.layers)

    @property
    def kernels_left(self) -> int:
        """Number of kernels that are not zero."""
        return sum(layer.kernels_left for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample, with the model as it is."""
        return sum(layer.macs for layer in self.layers)

    @property
    def macs_left(self) -> int:
        """Multiply-accumulates for one sample of the kernels that are not zero."""
        return sum(layer.macs_left for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for `json.dumps`."""
        totals = {name: getattr(self, name) for name in ("kernels", "macs")}
        left = {f"{name}_left": getattr(self, f"{name}_left") for name in totals}
        return asdict(self) | {"layers": [asdict(row) for row in self.layers]} | totals | left

    def __str__(self) -> str:
        width = max(len("layer"), *(len(row.name) for row in self.layers)) if self.layers else 5
        heads = "".join(f"{head:>15}{'left':>15}" for head in ("kernels", "parameters", "MACs"))
        lines = [f"{'layer':<{width}}{heads}"]
        lines += [_row(row, row.name, width) for row in self.layers]
        lines += ["-" * len(lines[0]), _row(self, "all", width)]
        return "\n".join(lines)


def report(model: nn.Module, example_inputs: Any = None) -> Report:
    """What a model costs: kernels, parameters and multiply-accumulates, and how much is not zero.

    Call it on a pruned model to see what `compact` can gain at best, and on the compacted model
    to see what it gained.

    Args:
        model: any model; it is not changed.
        example_inputs: a tensor or a tuple of positional arguments; its spatial size is that of
            the counted multiply-accumulates. If left out, common sizes are tried.

    Raises:
        ArgumentError, TraceError: as for `trace`.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 2, 1, bias=False))
    >>> print(report(model, torch.zeros(1, 3, 10, 10)))
    layer        kernels           left     parameters           left           MACs           left
    0                 12             12            108            108          6,912          6,912
    1                  8              8              8              8            512            512
    -----------------------------------------------------------------------------------------------
    all               20             20            116            116          7,424          7,424
    """
    traced = trace_model(model, example_inputs)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    costs: dict[str, LayerCost] = {}
    for piece in traced.pieces:
        for cost in _piece_costs(piece, tensors):
            known = costs.get(cost.name)
            costs[cost.name] = cost if known is None else _again(known, cost)
    return Report(tuple(costs.values()), *_parameters(model))


def _piece_costs(piece: Piece, tensors: Mapping[str, Tensor]) -> Iterator[LayerCost]:
    """The cost of every convolution and product with a weight, in the order of the calls."""
    nodes = list(piece.graph.graph.nodes)
    inputs = piece.input_nodes
    state = {node: (name, tensors[name]) for node, name in piece.state_nodes.items()}
    constants = Constants(piece.graph, state, moves)
    shapes = [node.meta["val"].shape for node in inputs if node.meta["val"].dim()]
    batch = int(shapes[0][0]) if shapes else 1
    dependent = set(inputs)
    for node in nodes:
        if dependent.isdisjoint(node.all_input_nodes):
            continue
        dependent.add(node)
        place = WEIGHTS.get(getattr(node.target, "overloadpacket", None))
        if place is not None and node.args[place] not in dependent:
            yield _cost(node, node.args[place], constants, batch)


def _cost(node: fx.Node, weight: Any, constants: Constants, batch: int) -> LayerCost:
    """The cost of one call."""
    value = constants.value(weight)
    convolution = node.target.overloadpacket is aten.convolution  # type: ignore[union-attr]
    # A transposed convolution uses each kernel once for every position of what it reads.
    shown = node.args[0] if convolution and node.args[6] else node
    shape = shown.meta["val"].shape  # type: ignore[union-attr]
    positions = shape[2:].numel() if convolution else shape[:-1].numel() // batch
    area = value.shape[2:].numel()
    alive = int(value.reshape(*value.shape[:2], -1).ne(0).any(2).sum())
    kernels = value.shape[0] * value.shape[1]
    return LayerCost(
        layer_name(Weight(constants.name(weight), value)),
        *(kernels, alive),
        *(kernels * area, alive * area),
        *(kernels * area * positions, alive * area * positions),
    )


def _again(known: LayerCost, cost: LayerCost) -> LayerCost:
    """The cost of a layer that is called once more, or of another part of the same parameter."""
    macs, left = known.macs + cost.macs, known.macs_left + cost.macs_left
    return replace(known, macs=macs, macs_left=left)


def _parameters(model: nn.Module) -> tuple[int, int]:
    """Elements of all parameters, and those that are neither zero nor masked."""
    masks = dict(model.named_buffers())
    total = left = 0
    for name, parameter in model.named_parameters():
        alive = parameter.detach() != 0
        mask = masks.get(f"{name.removesuffix('_orig')}_mask")
        if name.endswith("_orig") and mask is not None:
            alive &= mask != 0
        total += parameter.numel()
        left += int(alive.sum())
    return total, left


def _row(cost: LayerCost | Report, name: str, width: int) -> str:
    numbers = [
        value
        for field in ("kernels", "parameters", "macs")
        for value in (getattr(cost, field), getattr(cost, f"{field}_left"))
    ]
    return f"{name:<{width}}" + "".join(f"{number:>15,}" for number in numbers)
