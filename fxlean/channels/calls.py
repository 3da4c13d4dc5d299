"""One reader of operators: what a node's arguments mean, and when its result vanishes.

`read_call` turns a node into a convolution, a linear layer or a batch norm, in graphs traced by
`make_fx` and in exported ones alike. What such a call computes with, its weight and the like, are
nodes; whoever asks knows their values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..tracing.inputs import batch_size
from ..tracing.tracer import Trace

aten = torch.ops.aten
CONVOLUTIONS = frozenset(
    {
        aten.conv1d,
        aten.conv2d,
        aten.conv3d,
        aten.conv_transpose1d,
        aten.conv_transpose2d,
        aten.conv_transpose3d,
        aten.convolution,
    }
)
TRANSPOSED = frozenset({aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d})
BATCH_NORMS = frozenset(
    {
        aten._batch_norm_no_update,
        aten._batch_norm_with_update,
        aten._native_batch_norm_legit,
        aten._native_batch_norm_legit_no_training,
        aten.batch_norm,
        aten.cudnn_batch_norm,
        aten.miopen_batch_norm,
        aten.native_batch_norm,
    }
)
ORDINARY = (0.0, 2.37, -1.61)  # numbers at which hardly a function is zero by accident


def operator_of(target: Any) -> Any:
    """The operator of a node or of its target, without its overload."""
    target = target.target if isinstance(target, fx.Node) else target
    return getattr(target, "overloadpacket", target)


def argument(node: Any, *names: str, default: Any = None) -> Any:
    """An argument by any of its names in the operator's schema; else the schema's default.

    Where the schema has none of the names, `default`.
    """
    for position, parameter in enumerate(node.target._schema.arguments):
        if parameter.name in names:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(parameter.name, parameter.default_value)
    return default


@dataclass(frozen=True, eq=False)
class Convolution:
    """One call of a convolution: of `data` with `weight`, and `bias` if there is one.

    The weight has shape (out, in / groups, *size), or (in, out / groups, *size) if transposed.
    Sizes are as many as there are spatial axes, or one for all; `padding` may be a word.
    """

    node: fx.Node
    data: Any
    weight: Any
    bias: Any
    transposed: bool
    groups: int
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]

    @property
    def positions(self) -> int:
        """How often each kernel is used, in all samples.

        Once for every position of the result; a transposed convolution, once for every position
        of what it reads.
        """
        shape = (self.data if self.transposed else self.node).meta["val"].shape
        return int(shape[0] * shape[2:].numel())


@dataclass(frozen=True, eq=False)
class Linear:
    """One product of `data` with `weight`, and `bias` if there is one.

    The weight has shape (out, in), or (in, out) if transposed.
    """

    node: fx.Node
    data: Any
    weight: Any
    bias: Any
    transposed: bool
    groups = 1

    @property
    def positions(self) -> int:
        """How often each entry of the weight is used, in all samples."""
        return int(self.node.meta["val"].shape[:-1].numel())


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """One call of a batch norm; `weight`, `bias`, `mean` and `variance` may be None."""

    node: fx.Node
    data: Any
    weight: Any
    bias: Any
    mean: Any
    variance: Any
    training: bool
    momentum: float
    eps: float

    @property
    def parameters(self) -> tuple[Any, ...]:
        """All that it computes with but its data, None where there is none."""
        return (self.weight, self.bias, self.mean, self.variance)

    def affine(self, value: Callable[[Any], Any], channels: int) -> tuple[Tensor, Tensor]:
        """What it does to a channel `x`, as `scale * x + shift`: (scale, shift), float64, CPU.

        Args:
            value: from the nodes of its parameters to their values.
            channels: how many it normalises.

        With statistics of the batch only its own weight and bias are known.
        """

        def numbers(node: Any, default: float) -> Tensor:
            if node is None:
                return torch.full((channels,), default, dtype=torch.float64, device="cpu")
            found: Tensor = value(node).detach().double().cpu()
            return found

        scale, shift = numbers(self.weight, 1.0), numbers(self.bias, 0.0)
        if not self.by_statistics:
            return scale, shift
        scale = scale / (numbers(self.variance, 1.0) + self.eps).sqrt()
        return scale, shift - numbers(self.mean, 0.0) * scale

    @property
    def samples(self) -> int:
        """How many samples lie side by side along the channels, as torch writes instance norms."""
        for node in self.parameters:
            if node is not None and operator_of(node) is aten.repeat:
                return int(node.args[1][0])
        return 1

    @property
    def by_statistics(self) -> bool:
        """Whether it normalises by running statistics, not by those of the batch."""
        return not self.training and self.mean is not None and self.variance is not None


Call = Convolution | Linear | BatchNorm


def read_call(node: fx.Node) -> Call | None:
    """A node as a convolution, a linear layer or a batch norm; None if it is none of them."""
    operator = operator_of(node)
    if operator in CONVOLUTIONS:
        return _convolution(node, operator in TRANSPOSED)
    if operator is aten.linear:
        data, weight, bias = _operands(node)
        return Linear(node, data, weight, bias, transposed=False)
    if operator in (aten.mm, aten.addmm):
        return _product(node)
    return _batch_norm(node) if operator in BATCH_NORMS else None


def samples_of(trace: Trace) -> int:
    """On how many samples a model was traced.

    Those of its arguments, if convolutions get as many times something; without convolutions,
    linear layers. Else, as for an image without a batch dimension, one.
    """
    count = batch_size(trace.arguments)
    calls = [read_call(node) for piece in trace.pieces for node in piece.graph.graph.nodes]
    sizes = [call.data.meta["val"].shape[0] for call in calls if isinstance(call, Convolution)] or [
        call.positions for call in calls if isinstance(call, Linear)
    ]
    return count if any(size % count == 0 for size in sizes) else 1


def _operands(node: fx.Node) -> tuple[Any, Any, Any]:
    return argument(node, "input"), argument(node, "weight"), argument(node, "bias")


def _convolution(node: fx.Node, transposed: bool) -> Convolution:
    data, weight, bias = _operands(node)
    padding = argument(node, "padding")
    return Convolution(
        node,
        data,
        weight,
        bias,
        transposed=argument(node, "transposed", default=transposed),
        groups=argument(node, "groups"),
        stride=tuple(argument(node, "stride")),
        padding=padding if isinstance(padding, str) else tuple(padding),
        dilation=tuple(argument(node, "dilation")),
        output_padding=tuple(argument(node, "output_padding", default=(0,))),
    )


def _product(node: fx.Node) -> Linear:
    """A matrix product; the weight of a linear layer is flipped before it."""
    added = operator_of(node) is aten.addmm
    weight = argument(node, "mat2")
    flipped = isinstance(weight, fx.Node) and operator_of(weight) is aten.t
    return Linear(
        node,
        data=argument(node, "mat1" if added else "self"),
        weight=weight.args[0] if flipped else weight,
        bias=argument(node, "self") if added else None,
        transposed=not flipped,
    )


def _batch_norm(node: fx.Node) -> BatchNorm:
    data, weight, bias = _operands(node)
    return BatchNorm(
        node,
        data,
        weight,
        bias,
        mean=argument(node, "running_mean"),
        variance=argument(node, "running_var"),
        training=argument(node, "training", default=False),
        momentum=argument(node, "momentum", "exponential_average_factor"),
        eps=argument(node, "eps", "epsilon"),
    )


def as_kernels(tensor: Tensor, transposed: bool, groups: int = 1) -> Tensor:
    """A tensor in the layout of a weight as (out, in of the group, *size)."""
    if not transposed:
        return tensor
    size = tensor.shape[2:]
    split = tensor.reshape(groups, -1, tensor.shape[1], *size)
    return split.transpose(1, 2).reshape(-1, split.shape[1], *size)


def nonzero_kernels(call: Convolution | Linear, weight: Tensor) -> Tensor:
    """Which kernels of a call's weight are not zero, shape (out, in of the group), on the CPU."""
    kernels = as_kernels(weight.detach(), call.transposed, call.groups)
    return kernels.reshape(*kernels.shape[:2], -1).ne(0).any(2).cpu()


def run(node: fx.Node, lookup: Callable[[fx.Node], Any]) -> Any:
    """The result of a node's operator on other values of its arguments."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lookup)
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def vanishes(
    node: fx.Node,
    zero: Collection[fx.Node],
    operands: Sequence[fx.Node],
    constant: Callable[[fx.Node], Any],
) -> bool:
    """Whether an element-wise function is zero where some operands are, whatever the others are.

    Zero divided by zero counts as zero. The operator is asked: it is run on a few numbers.

    Args:
        node: the call.
        zero: the operands that are zero.
        operands: all that depend on the model's inputs.
        constant: the value of any other argument.
    """
    choices = [(0.0,) if operand in zero else ORDINARY for operand in operands]
    return not any(
        sample(node, dict(zip(operands, values, strict=True)), constant).nan_to_num(0.0).any()
        for values in itertools.product(*choices)
    )


def sample(
    node: fx.Node, values: dict[fx.Node, float], constant: Callable[[fx.Node], Any]
) -> Tensor:
    """The result for one number in place of each operand; the first of several, as float64.

    Complex results are given by their magnitude.
    """
    constants = {arg: constant(arg) for arg in node.all_input_nodes if arg not in values}
    devices = [value.device for value in constants.values() if isinstance(value, Tensor)]
    device = devices[0] if devices else torch.device("cpu")

    def lookup(arg: fx.Node) -> Any:
        if arg in constants:
            return constants[arg]
        return torch.tensor(values[arg], device="cpu").to(device, arg.meta["val"].dtype)

    return as_numbers(run(node, lookup))


def as_numbers(result: Any) -> Tensor:
    """A result, or the first of several, as float64 on the CPU; complex ones by magnitude."""
    tensor = torch.as_tensor(result[0] if isinstance(result, tuple | list) else result).cpu()
    return (tensor.abs() if tensor.is_complex() else tensor).double()
