"""Layer modules for the convolutions, linear layers and batch norms of an exported graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..cut import narrow

aten = torch.ops.aten
CONVOLUTIONS: dict[Any, type[nn.Module]] = {
    aten.conv1d: nn.Conv1d,
    aten.conv2d: nn.Conv2d,
    aten.conv3d: nn.Conv3d,
    aten.conv_transpose1d: nn.ConvTranspose1d,
    aten.conv_transpose2d: nn.ConvTranspose2d,
    aten.conv_transpose3d: nn.ConvTranspose3d,
}
_BATCH_NORMS = frozenset({aten.batch_norm, aten._native_batch_norm_legit_no_training})
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass(frozen=True, eq=False)
class Layer:
    """One call of a layer in an exported graph.

    Attributes:
        data: the node that it reads.
        module: the layer as a module.
        alive: shape (rows, columns), True where the weight is not zero; (rows, 1) if diagonal.
        constant: shape (rows,), True where the result is not zero though what it reads is.
        diagonal: whether every result depends on its own channel alone.
    """

    data: fx.Node
    module: nn.Module
    alive: Tensor
    constant: Tensor
    diagonal: bool

    def zero_rows(self, source: Tensor) -> Tensor:
        """Which results are always zero, from which source channels are."""
        read = self.alive[:, 0] & ~source if self.diagonal else (self.alive & ~source).any(1)
        return ~(read | self.constant)

    def columns(self, rows: Tensor, source: Tensor) -> Tensor:
        """The source channels to read for these rows; at least one."""
        if self.diagonal:
            return rows
        read = self.alive[rows].any(0) & ~source
        read[0] |= not read.any()
        return read

    def cut(self, rows: Tensor, columns: Tensor) -> nn.Module:
        """The module with these rows and columns alone."""
        narrow(self.module, rows, columns, len(rows) if self.diagonal else 1)
        return self.module


def layers_of(graph: fx.Graph, value: Callable[[fx.Node], Any]) -> dict[fx.Node, Layer]:
    """The layers of a graph whose weights are used only once; `value` gives constants."""
    found: dict[fx.Node, Layer] = {}
    weights: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        layer = None
        if packet in CONVOLUTIONS:
            layer = _convolution(node, CONVOLUTIONS[packet], value)
        elif packet is aten.linear and node.meta["val"].dim() == 2:
            layer = _linear(node, value)
        elif packet in _BATCH_NORMS:
            layer = _batch_norm(node, value)
        if layer is not None:
            found[node] = layer
            weights.setdefault(weight_of(node), []).append(node)
    return {node: layer for node, layer in found.items() if len(weights[weight_of(node)]) == 1}


def weight_of(node: Any) -> fx.Node:
    """The weight of a layer, or the running mean of a batch norm without one."""
    weight: fx.Node = node.args[1] or node.args[3]
    return weight


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, with defaults."""
    call: Any = node
    schema = call.target._schema.arguments
    found = {argument.name: argument.default_value for argument in schema}
    found.update(zip(found, call.args, strict=False))
    found.update(call.kwargs)
    return found


def _convolution(
    node: fx.Node, kind: type[nn.Module], value: Callable[[fx.Node], Any]
) -> Layer | None:
    arguments = arguments_of(node)
    weight, bias = value(arguments["weight"]), value(arguments["bias"])
    if weight is None or (bias is None and arguments["bias"] is not None):
        return None
    groups, transposed = arguments["groups"], "transpose" in str(node.target)
    rows, width = (weight.shape[1] * groups, weight.shape[0]) if transposed else weight.shape[:2]
    options = {name: _several(arguments[name]) for name in ("stride", "padding", "dilation")}
    if transposed:
        options["output_padding"] = _several(arguments["output_padding"])
    if groups > 1 and (transposed or width > 1 or groups != rows):
        return None
    module = kind(
        width if transposed else width * groups,
        rows,
        tuple(weight.shape[2:]),
        groups=groups,
        bias=bias is not None,
        device="meta",
        **options,
    )
    alive = weight.flatten(2).ne(0).any(2).cpu()
    if transposed:
        alive = alive.T
    return _filled(arguments["input"], module, alive, weight, bias, diagonal=groups > 1)


def _linear(node: fx.Node, value: Callable[[fx.Node], Any]) -> Layer | None:
    arguments = arguments_of(node)
    weight, bias = value(arguments["weight"]), value(arguments["bias"])
    if weight is None or (bias is None and arguments["bias"] is not None):
        return None
    rows, columns = weight.shape
    module = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    return _filled(arguments["input"], module, weight.ne(0).cpu(), weight, bias, diagonal=False)


def _filled(
    data: fx.Node,
    module: nn.Module,
    alive: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    diagonal: bool,
) -> Layer:
    """The layer with its weights."""
    module.weight = _parameter(weight)
    constant = torch.zeros(len(alive), dtype=torch.bool)
    if bias is not None:
        module.bias = _parameter(bias)
        constant = bias.ne(0).cpu()
    return Layer(data, module, alive, constant, diagonal)


def _parameter(tensor: Tensor) -> nn.Parameter:
    """A parameter of these values, trained if what they come from is."""
    return nn.Parameter(tensor.detach().clone(), tensor.requires_grad)


def _batch_norm(node: fx.Node, value: Callable[[fx.Node], Any]) -> Layer | None:
    arguments = arguments_of(node)
    names = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, variance = (value(arguments[name]) for name in names)
    rank, affine = arguments["input"].meta["val"].dim(), arguments["weight"] is not None
    if mean is None or rank not in NORMS or (affine and (weight is None or bias is None)):
        return None
    options = {name: arguments[name] for name in ("eps", "momentum")}
    module = NORMS[rank](len(mean), **options, affine=affine, device="meta")
    if affine:
        module.weight, module.bias = _parameter(weight), _parameter(bias)
    else:
        weight, bias = torch.ones_like(mean), torch.zeros_like(mean)
    for name, tensor in (("running_mean", mean), ("running_var", variance)):
        module._buffers[name] = tensor.detach().clone()
    module._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.int64, device=mean.device)
    deviation = (variance + arguments["eps"]).sqrt()
    constant = (bias - mean * weight / deviation).ne(0) & (weight.ne(0) | bias.ne(0))
    alive = weight.ne(0).cpu()[:, None]
    return Layer(arguments["input"], module, alive, constant.cpu(), diagonal=True)


def _several(sizes: Any) -> Any:
    """Sizes as a module takes them: one number for all axes, a string, or a tuple."""
    if not isinstance(sizes, list | tuple):
        return sizes
    return sizes[0] if len(sizes) == 1 else tuple(sizes)
