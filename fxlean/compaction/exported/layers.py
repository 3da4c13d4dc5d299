"""Layer modules for the convolutions, linear layers and batch norms of an exported graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...channels.calls import BatchNorm, Call, Convolution, Linear, nonzero_kernels, read_call
from ...channels.weights import Constants
from ..cut import narrow

CONVOLUTIONS: dict[int, tuple[type[nn.Module], type[nn.Module]]] = {  # by spatial dimensions
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}
BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass(frozen=True, eq=False)
class ExportedLayer:
    """One call of a layer in an exported graph, and a module that does the same.

    Attributes:
        call: what it reads, and what with.
        module: the layer as a module.
        nonzero: shape (rows, columns), True where the weight is not zero; (rows, 1) if diagonal.
        constant: shape (rows,), True where the result is not zero though what it reads is.
        diagonal: whether every result depends on its own channel alone.
    """

    call: Call
    module: nn.Module
    nonzero: Tensor
    constant: Tensor
    diagonal: bool

    def zero_rows(self, source: Tensor) -> Tensor:
        """Which results are always zero, from which source channels are."""
        read = self.nonzero[:, 0] & ~source if self.diagonal else (self.nonzero & ~source).any(1)
        return ~(read | self.constant)

    def columns(self, rows: Tensor, source: Tensor) -> Tensor:
        """The source channels to read for these rows; at least one."""
        if self.diagonal:
            return rows
        read = self.nonzero[rows].any(0) & ~source
        read[0] |= not read.any()
        return read

    def cut(self, rows: Tensor, columns: Tensor) -> nn.Module:
        """The module with these rows and columns alone."""
        narrow(self.module, rows, columns, len(rows) if self.diagonal else 1)
        return self.module


def layers_of(graph: fx.Graph, constants: Constants) -> dict[fx.Node, ExportedLayer]:
    """The layers of a graph whose weights are constant, and used only once."""
    found: dict[fx.Node, ExportedLayer] = {}
    users: dict[fx.Node, int] = {}
    for node in graph.nodes:
        call = read_call(node)
        layer = None if call is None else _layer(call, constants)
        if layer is not None:
            found[node] = layer
            users[key_of(layer.call)] = users.get(key_of(layer.call), 0) + 1
    return {node: layer for node, layer in found.items() if users[key_of(layer.call)] == 1}


def key_of(call: Call) -> fx.Node:
    """The weight of a layer, or the running mean of a batch norm without one."""
    key: fx.Node = call.mean if isinstance(call, BatchNorm) and not call.weight else call.weight
    return key


def _layer(call: Call, constants: Constants) -> ExportedLayer | None:
    parameters = call.parameters if isinstance(call, BatchNorm) else (call.weight, call.bias)
    if not all(constants.holds(node) for node in parameters if node is not None):
        return None
    if isinstance(call, BatchNorm):
        return _batch_norm(call, constants)
    if isinstance(call, Convolution):
        return _convolution(call, constants)
    return _linear(call, constants) if call.node.meta["val"].dim() == 2 else None


def _convolution(call: Convolution, constants: Constants) -> ExportedLayer | None:
    """A convolution without groups, or a depthwise one of as many channels as it reads."""
    weight = constants.value(call.weight)
    nonzero = nonzero_kernels(call, weight)
    rows, width = nonzero.shape
    if call.groups > 1 and (call.transposed or width > 1 or call.groups != rows):
        return None
    options = {name: _several(getattr(call, name)) for name in ("stride", "padding", "dilation")}
    if call.transposed:
        options["output_padding"] = _several(call.output_padding)
    kind = CONVOLUTIONS[weight.dim() - 2][call.transposed]
    size, bias = tuple(weight.shape[2:]), call.bias is not None
    module = kind(
        width * call.groups, rows, size, groups=call.groups, bias=bias, device="meta", **options
    )
    return _filled(call, module, nonzero, constants, diagonal=call.groups > 1)


def _linear(call: Linear, constants: Constants) -> ExportedLayer:
    nonzero = nonzero_kernels(call, constants.value(call.weight))
    rows, columns = nonzero.shape
    module = nn.Linear(columns, rows, bias=call.bias is not None, device="meta")
    layer = _filled(call, module, nonzero, constants, diagonal=False)
    if call.transposed:
        flipped = module.weight.detach().t().contiguous()
        module.weight = nn.Parameter(flipped, module.weight.requires_grad)
    return layer


def _filled(
    call: Convolution | Linear,
    module: nn.Module,
    nonzero: Tensor,
    constants: Constants,
    *,
    diagonal: bool,
) -> ExportedLayer:
    """The layer with its weights."""
    module.weight = _parameter(call.weight, constants)
    constant = torch.zeros(len(nonzero), dtype=torch.bool)
    if call.bias is not None:
        module.bias = _parameter(call.bias, constants)
        constant = module.bias.detach().ne(0).cpu()
    return ExportedLayer(call, module, nonzero, constant, diagonal)


def _parameter(node: fx.Node, constants: Constants) -> nn.Parameter:
    """A parameter of a node's values, trained if what they come from is."""
    return nn.Parameter(constants.value(node).detach().clone(), constants.is_trained(node))


def _batch_norm(call: BatchNorm, constants: Constants) -> ExportedLayer | None:
    """A batch norm by running statistics, with weight and bias or without both."""
    rank, parts = call.data.meta["val"].dim(), (call.weight, call.bias)
    if not call.by_statistics or rank not in BATCH_NORMS or (None in parts and any(parts)):
        return None
    mean, variance = (constants.value(node) for node in (call.mean, call.variance))
    affine = call.weight is not None
    module = BATCH_NORMS[rank](
        len(mean), eps=call.eps, momentum=call.momentum, affine=affine, device="meta"
    )
    if affine:
        module.weight, module.bias = (_parameter(node, constants) for node in parts)
    for name, tensor in (("running_mean", mean), ("running_var", variance)):
        module._buffers[name] = tensor.detach().clone()
    module._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.int64, device=mean.device)
    scale, shift = call.affine(constants.value, len(mean))
    return ExportedLayer(call, module, (scale != 0)[:, None], shift != 0, diagonal=True)


def _several(sizes: Any) -> Any:
    """Sizes as a module takes them: one number for all axes, a string, or a tuple."""
    return sizes[0] if not isinstance(sizes, str) and len(sizes) == 1 else sizes
