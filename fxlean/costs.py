"""What a model costs: parameters and multiply-accumulates, layer by layer.

A masked model counts twice: as large as it is, and what would be left of it without the kernels
that are zero. A compacted one can be shown beside the model that it was made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from .channels.calls import Convolution, Linear, nonzero_kernels, read_call, samples_of
from .channels.rules.movements import moves
from .channels.weights import Constants, layer_name
from .errors import ArgumentError
from .pictures import bars, html_table
from .tracing.arguments import check_model, unwrapped
from .tracing.tracer import Piece, Trace, trace_model

COUNTS = {"kernels": "kernels", "parameters": "parameters", "macs": "MACs"}  # and their headings


@dataclass(frozen=True)
class LayerCost:
    """The cost of one weight of a model.

    Attributes:
        name: of the layer.
        kernels, kernels_left: slices from an input channel to an output channel, in all and
            those that are not zero.
        parameters, parameters_left: elements of these kernels.
        macs, macs_left: multiply-accumulates for one sample. Products of two values that depend on
            the inputs, as in attention, are no layer's.
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
        layers: every convolution and linear layer on which an output depends; one that `before`
            has as well has the same name here. What runs for nothing is not counted.
        parameters: elements of all parameters of the model.
        parameters_left: parameters without those that are zero or masked.
        before: what the model is compared with, if anything.
    """

    layers: tuple[LayerCost, ...]
    parameters: int
    parameters_left: int
    before: Report | None = None

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
        rows = [asdict(row) for row in self.layers]
        before = None if self.before is None else self.before.to_dict()
        return asdict(self) | {"layers": rows, "before": before} | totals | left

    def __repr__(self) -> str:
        return (
            f"Report({self.parameters:,} parameters, {self.parameters_left:,} of them not zero; "
            f"{self.macs:,} MACs in {len(self.layers)} layers)"
        )

    def plot(self) -> Any:
        """A matplotlib figure: parameters and multiply-accumulates of each layer, and what is left.

        With `before`, its layers stand behind those of now.
        """
        rows, suffix = self._rows(), "_left" if self.before is None else ""
        panels = {
            title: (
                [_count(old, name) for _, old, _ in rows],
                [_count(new, f"{name}{suffix}") for _, _, new in rows],
            )
            for name, title in COUNTS.items()
            if name != "kernels"
        }
        return bars([name for name, _, _ in rows], panels)

    def _rows(self) -> list[tuple[str, LayerCost | None, LayerCost | None]]:
        """Name, cost before and cost now of each layer."""
        old = {row.name: row for row in (self.before or self).layers}
        new = {row.name: row for row in self.layers}
        return [(name, old.get(name), new.get(name)) for name in old | new]

    def _repr_html_(self) -> str:
        marks = ("", " left") if self.before is None else (" before", " now")
        heading = [f"{title}{mark}" for title in COUNTS.values() for mark in marks]
        first, suffix = (self, "_left") if self.before is None else (self.before, "")
        cells = []
        for name, old, new in [*self._rows(), ("all", first, self)]:
            pairs = zip(_numbers(old), _numbers(new, suffix), strict=True)
            cells.append((name, *(cell for pair in pairs for cell in pair)))
        return html_table(("layer", *heading), cells)

    def __str__(self) -> str:
        first, suffix = (self, "_left") if self.before is None else (self.before, "")
        rows = self._rows()
        width = max(len(name) for name in ("layer", *(name for name, _, _ in rows)))
        titles = COUNTS.values()
        if self.before is None:
            lines = [_line("layer", titles, ["left"] * 3, width)]
        else:
            lines = [_line("", [""] * 3, titles, width)]
            lines += [_line("layer", ["before"] * 3, ["now"] * 3, width)]
        lines += [
            _line(name, _numbers(old), _numbers(new, suffix), width) for name, old, new in rows
        ]
        total = _line("all", _numbers(first), _numbers(self, suffix), width)
        lines += ["-" * len(total), total]
        if self.before is not None:
            parameters = self.parameters / max(1, self.before.parameters)
            macs = self.macs / max(1, self.before.macs)
            lines += ["", f"left: {parameters:.1%} of the parameters, {macs:.1%} of the MACs"]
        return "\n".join(lines)


def report(
    model: nn.Module, example_inputs: Any = None, *, before: nn.Module | None = None
) -> Report:
    """What a model costs: kernels, parameters and multiply-accumulates, and how much is not zero.

    Call it on a pruned model to see what `compact` can gain at best, and on the compacted model,
    with the one before it, to see what it gained.

    Args:
        model: any model; it is not changed.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments;
            its spatial size is that of the counted multiply-accumulates. If left out, common
            sizes are tried.
        before: a model to compare with, layer by layer, such as the one that `model` was
            compacted from. It counts as large as it is, whatever its masks; not changed either.

    Raises:
        ArgumentError, TraceError: as for `trace`, for both models.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 2, 1, bias=False))
    >>> print(report(model, torch.zeros(1, 3, 10, 10)))
    layer        kernels           left     parameters           left           MACs           left
    0                 12             12            108            108          6,912          6,912
    1                  8              8              8              8            512            512
    -----------------------------------------------------------------------------------------------
    all               20             20            116            116          7,424          7,424

    >>> small = nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), nn.Conv2d(2, 2, 1, bias=False))
    >>> print(report(small, torch.zeros(1, 3, 10, 10), before=model))
                                kernels                    parameters                          MACs
    layer         before            now         before            now         before            now
    0                 12              6            108             54          6,912          3,456
    1                  8              4              8              4            512            256
    -----------------------------------------------------------------------------------------------
    all               20             10            116             58          7,424          3,712
    <BLANKLINE>
    left: 50.0% of the parameters, 50.0% of the MACs
    """
    if before is not None and not isinstance(before, nn.Module):
        raise ArgumentError(
            f"before is a {type(before).__name__}. Pass the torch.nn.Module to compare with."
        )
    check_model(model)
    model = unwrapped(model)
    earlier = None if before is None else report(before, example_inputs)
    layers = layer_costs(model, trace_model(model, example_inputs))
    if earlier is not None:
        layers = _named_as(earlier.layers, layers)
    return Report(layers, *_parameters(model), earlier)


def layer_costs(model: nn.Module, traced: Trace) -> tuple[LayerCost, ...]:
    """The cost of every layer, in the order of the first calls."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    costs: dict[str, LayerCost] = {}
    samples = samples_of(traced)
    for piece in traced.pieces:
        for cost in _piece_costs(piece, tensors, samples):
            known = costs.get(cost.name)
            costs[cost.name] = cost if known is None else _again(known, cost)
    return tuple(costs.values())


def _named_as(before: Sequence[LayerCost], layers: Sequence[LayerCost]) -> tuple[LayerCost, ...]:
    """The layers, under the names that they have in `before`.

    A name that is new belongs to a layer of `before` that is not found under its own: inside of
    a module that has taken its place, or in a rewritten graph, where dots become underscores.
    """
    known, names = {row.name for row in before}, {row.name for row in layers}
    missing = {row.name.replace(".", "_"): row.name for row in before if row.name not in names}

    def renamed(row: LayerCost) -> LayerCost:
        outside = row.name.rpartition(".")[0].replace(".", "_")
        places = [] if row.name in known else [row.name, outside]
        found = next((place for place in places if place in missing), None)
        return row if found is None else replace(row, name=missing.pop(found))

    return tuple(renamed(row) for row in layers)


def _piece_costs(piece: Piece, tensors: Mapping[str, Tensor], samples: int) -> Iterator[LayerCost]:
    """The cost of every convolution and product with a weight, in the order of the calls."""
    state = {node: (name, tensors[name]) for node, name in piece.state_nodes.items()}
    constants = Constants(piece.graph, state, moves)
    dependent = set(piece.input_nodes)
    for node in piece.graph.graph.nodes:
        if dependent.isdisjoint(node.all_input_nodes):
            continue
        dependent.add(node)
        call = read_call(node)
        if isinstance(call, Convolution | Linear) and call.weight not in dependent:
            yield _cost(call, constants, samples)


def _cost(call: Convolution | Linear, constants: Constants, samples: int) -> LayerCost:
    """The cost of one call."""
    weight = constants.value(call.weight)
    nonzero = nonzero_kernels(call, weight)
    kernels, left, area = nonzero.numel(), int(nonzero.sum()), weight.shape[2:].numel()
    uses = area * call.positions // samples
    return LayerCost(
        layer_name(constants.name(call.weight)),
        *(kernels, left),
        *(kernels * area, left * area),
        *(kernels * uses, left * uses),
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


def _count(cost: LayerCost | None, name: str) -> int:
    """One of the counts of a layer, 0 where it is not there."""
    return 0 if cost is None else int(getattr(cost, name))


def _numbers(cost: LayerCost | Report | None, suffix: str = "") -> list[str]:
    """Kernels, parameters and MACs, or dashes for a layer that is not there."""
    if cost is None:
        return ["-"] * 3
    return [f"{getattr(cost, count + suffix):,}" for count in COUNTS]


def _line(name: str, first: Iterable[str], second: Iterable[str], width: int) -> str:
    """A line of a table: a name, and pairs of columns."""
    pairs = zip(first, second, strict=True)
    return f"{name:<{width}}" + "".join(f"{left:>15}{right:>15}" for left, right in pairs)
