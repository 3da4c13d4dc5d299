"""The rules of compaction: how each operator relates the slots of what it reads and writes.

They are stricter than those of `rules.py`: an operator is listed here only if the same Python
code still works, and does the same, on a value with fewer channels. Everything else pins what
it reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..channels.rules.positions import REDUCTIONS, WINDOWS
from ..channels.rules.table import POINTWISE
from ..channels.rules.weighted import BATCH_NORMS
from ..channels.site import argument_of
from ..channels.weights import Constants
from .slots import Call, Slots, Value, joined

aten = torch.ops.aten
SAME = frozenset({aten.alias, aten.clone, aten.contiguous, aten.detach, aten._to_copy})
POOLINGS = frozenset(operator for operators in WINDOWS.values() for operator in operators) | {
    aten.avg_pool1d,
    aten.avg_pool2d,
    aten.avg_pool3d,
}
ORDINARY = (1.37, -0.61)  # two numbers at which no function is zero by accident


@dataclass(frozen=True, eq=False)
class Step:
    """One call of an operator in a traced graph.

    Attributes:
        node: the call.
        env: the values of the nodes before; None for one without channels.
        slots: of the model; rules add to them.
        constants: what depends on parameters only.
        layers: the module, by name, that owns a parameter or buffer.
        names: the parameter or buffer behind a placeholder.
        reshape: whether reshapes are taken to follow the number of channels.
    """

    node: Any
    env: Mapping[fx.Node, Value | None]
    slots: Slots
    constants: Constants
    layers: Mapping[str, str]
    names: Mapping[fx.Node, str]
    reshape: bool

    @property
    def packet(self) -> Any:
        """The operator, without its overload."""
        return getattr(self.node.target, "overloadpacket", self.node.target)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of all results."""
        value = self.node.meta.get("val")
        values = value if isinstance(value, tuple | list) else [value]
        return [tuple(item.shape) if isinstance(item, Tensor) else () for item in values]

    def argument(self, *names: str) -> Any:
        """An argument by any of its names in the schema, or its default; None if there is none."""
        return argument_of(self.node, *names)

    def values(self) -> list[Value]:
        """The values with channels that the operator reads."""
        found = (self.env.get(node) for node in self.node.all_input_nodes)
        return [value for value in found if value is not None]

    def constant(self, argument: Any) -> Any:
        """The value of an argument that depends on parameters only."""
        return self.constants.value(argument) if isinstance(argument, fx.Node) else argument


def rule_of(step: Step) -> Callable[[Step], Any]:
    """The rule of an operator: from the table, else pointwise by torch's tag, else a barrier."""
    rule = RULES.get(step.packet)
    if rule is not None:
        return rule
    return _pointwise if torch.Tag.pointwise in getattr(step.node.target, "tags", ()) else barrier


def barrier(step: Step) -> Any:
    """Nothing is known: whatever goes in must be whole, and so is what comes out."""
    pin(step)
    results = tuple(fresh(step.slots, shape) for shape in step.shapes)
    return results if isinstance(step.node.meta.get("val"), tuple | list) else results[0]


def fresh(slots: Slots, shape: Sequence[int]) -> Value | None:
    """A value of new slots that cannot be removed; None if it has no channels."""
    return slots.fresh(shape[1]) if len(shape) > 1 else None


def pin(step: Step) -> None:
    """Pin all that an operator reads; a layer whose parameters it reads must stay as it is."""
    for value in step.values():
        for part in value if isinstance(value, tuple) else (value,):
            if part is not None:
                step.slots.pin(part.slots)
    for node in step.node.all_input_nodes:
        step.slots.refused |= _behind(step, node)


def _behind(step: Step, node: fx.Node) -> set[str]:
    """The layers whose parameters a constant is made of."""
    if node in step.names:
        return {step.layers[name] for name in (step.names[node],) if name in step.layers}
    if node in step.env:
        return set()
    return {layer for arg in node.all_input_nodes for layer in _behind(step, arg)}


def _layer(step: Step, *arguments: fx.Node | None) -> str | None:
    """The layer that all of these parameters belong to, if there is one."""
    found = {step.layers.get(step.names.get(node, "")) for node in arguments if node is not None}
    return found.pop() if len(found) == 1 else None


def _convolution(step: Step) -> Value | None:
    """Any convolution, but for transposed ones in groups."""
    weight, bias, groups = step.argument("weight"), step.argument("bias"), step.argument("groups")
    layer, transposed = _layer(step, weight, bias), step.argument("transposed")
    if layer is None and weight not in step.env:
        step.slots.strangers += not step.constant(weight).flatten(2).any(2).all()
    if layer is None or step.env.get(step.argument("input")) is None or (transposed and groups > 1):
        return None
    alive = step.constant(weight).flatten(2).ne(0).any(2).cpu()
    alive = alive.T if transposed else alive
    data = step.argument("input")
    # A transposed convolution uses a kernel once for every position of what it reads.
    positions = data.meta["val"].shape[2:] if transposed else torch.Size(step.shapes[0][2:])
    work = positions.numel() * weight.meta["val"].shape[2:].numel()
    return _connect(step, layer, data, alive, bias, groups, work)


def _linear(step: Step) -> Value | None:
    """The product of a matrix with the weight of a linear layer."""
    added = step.packet is aten.addmm
    data, weight = step.argument("mat1" if added else "self"), step.argument("mat2")
    bias = step.argument("self") if added else None
    if step.env.get(data) is None or getattr(weight.target, "overloadpacket", None) is not aten.t:
        return None
    weight = weight.args[0]
    layer = _layer(step, weight, bias)
    if layer is None:
        return None
    return _connect(step, layer, data, step.constant(weight).ne(0).cpu(), bias, 1, 1)


def _connect(
    step: Step,
    layer: str,
    data: fx.Node,
    alive: Tensor,
    bias: fx.Node | None,
    groups: int,
    work: int,
) -> Value:
    """The result of a layer whose weights that are not zero are `alive`."""
    source, rows = step.env[data], len(alive)
    assert source is not None
    read = (alive.reshape(groups, -1, alive.shape[1]) & ~source.zero.reshape(groups, 1, -1)).any(2)
    zero = ~read.reshape(-1)
    if bias is not None:
        constant = step.constant(bias).ne(0).cpu()
        zero &= ~constant
        alive = alive if groups == 1 else alive | constant[:, None]
    result = Value(step.slots.new(rows), zero)
    if groups > 1:
        step.slots.link_groups(source.slots, groups)
        step.slots.link_groups(result.slots, groups)
    _record(step, layer, data, result, alive, groups, work)
    return result


def _batch_norm(step: Step) -> tuple[Value | None, ...] | None:
    """A batch norm with statistics of its own."""
    arguments = [step.argument(name) for name in ("weight", "bias", "running_mean", "running_var")]
    weight, bias, mean, variance = arguments
    layer, source = _layer(step, *arguments), step.env.get(step.argument("input"))
    if layer is None or source is None or mean is None:
        return None
    ones = torch.ones(len(source.slots))
    scale, shift = (ones if node is None else step.constant(node).cpu() for node in (weight, bias))
    shift = shift * 0 if bias is None else shift
    alive = (scale != 0) | (shift != 0)
    deviation = (step.constant(variance) + step.argument("eps", "epsilon")).sqrt().cpu()
    at_zero = shift - step.constant(mean).cpu() * scale / deviation
    result = Value(step.slots.new(len(alive)), ~alive | (source.zero & (at_zero == 0)))
    _record(step, layer, step.argument("input"), result, alive[:, None], len(alive), 0)
    return (result, *[None] * (len(step.shapes) - 1))


def _record(
    step: Step, layer: str, data: fx.Node, result: Value, alive: Tensor, groups: int, work: int
) -> None:
    source = step.env[data]
    assert source is not None
    size = (data.meta["val"].shape[2:].numel(), torch.Size(step.shapes[0][2:]).numel())
    step.slots.calls.append(Call(layer, source, result, alive, groups, size, work))


def _pointwise(step: Step) -> Value | None:
    """A function of every element, of one value or of several with the same channels."""
    rank, channels = len(step.shapes[0]), step.shapes[0][1]
    nodes = [node for node in step.node.all_input_nodes if step.env.get(node) is not None]
    for node in step.node.all_input_nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue
        if node not in nodes and value.dim() >= rank - 1 and value.shape[1 - rank] != 1:
            return None
        if node in nodes and value.dim() != rank:
            return None
    full = [node for node in nodes if node.meta["val"].shape[1] == channels]
    for node in nodes:
        if node not in full:
            step.slots.pin(step.env[node].slots)  # type: ignore[union-attr]
    zeros = torch.stack([step.env[node].zero.expand(channels) for node in nodes])  # type: ignore
    values = [step.env[node] for node in full]
    return joined(step.slots, values, _zeros(step, nodes, zeros))  # type: ignore[arg-type]


def _zeros(step: Step, nodes: Sequence[fx.Node], zeros: Tensor) -> Tensor:
    """Where the result is zero, from where the operands are, shape (operands, channels)."""
    always = [_vanishes(step, {node: 0.0}) for node in nodes]
    together = _vanishes(step, dict.fromkeys(nodes, 0.0))
    result = zeros.all(0) & together
    for zero, vanishes in zip(zeros, always, strict=True):
        result = result | (zero & vanishes)
    return result


def _vanishes(step: Step, fixed: Mapping[fx.Node, float]) -> bool:
    """Whether the operator gives zero where some operands are fixed, whatever the others are."""
    for ordinary in ORDINARY:

        def lookup(node: fx.Node, ordinary: float = ordinary) -> Any:
            if node not in step.env:
                return step.constants.value(node)
            number = fixed.get(node, ordinary)
            return torch.tensor(number).to(node.meta["val"].dtype)

        args = fx.map_arg(step.node.args, lookup)
        kwargs = fx.map_arg(step.node.kwargs, lookup)
        with torch.no_grad():
            result = step.node.target(*args, **kwargs)
        if not bool((result == 0).all()):
            return False
    return True


def _same(step: Step) -> Any:
    """One value, channel by channel, with zero left as it is."""
    (value,) = step.values() if len(step.values()) == 1 else (None,)
    several = isinstance(step.node.meta["val"], tuple | list)
    return (value,) * len(step.shapes) if several and value is not None else value


def _padding(step: Step) -> Value | None:
    """Padding of other dimensions than the channels."""
    rank = len(step.shapes[0])
    if len(step.argument("pad")) > 2 * (rank - 2):
        return None
    (value,) = step.values()
    return Value(value.slots, value.zero & (step.argument("value") == 0))


def _reduction(step: Step) -> Value | None:
    """A mean, sum or maximum over other dimensions than batch and channels."""
    names = [argument.name for argument in step.node.target._schema.arguments]
    dims = step.argument("dim") if "dim" in names else None
    if dims is None or step.packet not in REDUCTIONS or len(step.shapes) > 1:
        return None
    rank = step.node.all_input_nodes[0].meta["val"].dim()
    dims = [dims] if isinstance(dims, int) else dims
    if not dims or any(dim % rank < 2 for dim in dims):
        return None
    (value,) = step.values()
    zeros = step.node.target(torch.zeros((2,) * rank), *step.node.args[1:], **step.node.kwargs)
    return Value(value.slots, value.zero & bool((zeros == 0).all()))


def _concatenation(step: Step) -> Value | None:
    """Values one behind the other, along the channels or along another dimension."""
    nodes = step.argument("tensors")
    values = [value for value in (step.env.get(node) for node in nodes) if value is not None]
    if len(values) < len(nodes):
        return None
    if step.argument("dim") % len(step.shapes[0]) != 1:
        zero = torch.stack([value.zero for value in values]).all(0)
        return joined(step.slots, values, zero)
    slots = torch.cat([value.slots for value in values])
    return Value(slots, torch.cat([value.zero for value in values]))


def _cut(step: Step) -> Value | None:
    """A slice of another dimension than the channels."""
    (value,) = step.values()
    rank = step.argument("self").meta["val"].dim()
    if tuple(step.argument("self").meta["val"].shape) == step.shapes[0]:
        return value
    return value if step.argument("dim") % rank != 1 and len(step.shapes) == 1 else None


def _reshaped(step: Step) -> Value | None:
    """A view that leaves the channels in place, or has their pixels one after the other."""
    (value,) = step.values()
    before, after = tuple(step.argument("self").meta["val"].shape), step.shapes[0]
    if before == after:
        return value
    if not step.reshape or len(after) < 2 or before[0] != after[0]:
        return None
    if before[1] == after[1]:
        return value
    pixels = torch.Size(before[2:]).numel()
    if after[1] != before[1] * pixels:
        return None
    return Value(value.slots.repeat_interleave(pixels), value.zero.repeat_interleave(pixels))


RULES: dict[Any, Callable[[Step], Any]] = {
    **dict.fromkeys(SAME | POOLINGS, _same),
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(BATCH_NORMS, _batch_norm),
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.squeeze, aten.unsqueeze), _reshaped),
    aten.addmm: _linear,
    aten.cat: _concatenation,
    aten.constant_pad_nd: _padding,
    aten.convolution: _convolution,
    aten.mm: _linear,
    aten.slice: _cut,
}
