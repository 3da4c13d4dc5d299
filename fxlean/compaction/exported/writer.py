"""The new graph of a model that is exported: each operator for the channels that are needed."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.utils import _pytree as pytree

from ...channels.calls import operator_of
from ...channels.rules.movements import moves
from ...channels.weights import Constants, attribute
from ...nn import PaddedCat
from ...tracing.inputs import Arguments
from ...tracing.sandbox import on_cpu
from .layers import ExportedLayer, key_of, layers_of
from .needs import DROPPED, Channels, Made, follow, needed

aten = torch.ops.aten


def rewritten(model: nn.Module, arguments: Arguments) -> nn.Module:
    """A graph of small layers that computes what the model does in eval mode.

    Args:
        model: in eval mode, without masks.
        arguments: that it accepts; batch and spatial sizes are free in the result.

    Raises whatever `torch.export` raises.
    """
    args, kwargs = ((), arguments) if isinstance(arguments, dict) else (arguments, {})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = export(
            model,
            args,
            kwargs,
            dynamic_shapes=pytree.tree_map(_free, arguments),
            strict=False,  # the default, but not of torch 2.6
        ).run_decompositions({})
        source = program.module()
    assert isinstance(source, fx.GraphModule)
    return _with_small_layers(model, source)


@on_cpu()
def _with_small_layers(model: nn.Module, source: fx.GraphModule) -> nn.Module:
    """The exported graph of a model, written anew."""
    source.graph.eliminate_dead_code()
    layers = layers_of(source.graph, Constants(source, {}, moves))
    channels = follow(source.graph, layers)
    need = needed(source.graph, channels)
    root = nn.Module()
    root.add_module("padded_cat", PaddedCat())
    writer = _Writer(dict(model.named_modules()), source, root, channels, need)
    for node in source.graph.nodes:
        writer.write(node)
    writer.graph.set_codegen(source.graph._codegen)
    draft = fx.GraphModule(root, writer.graph)
    draft.graph.eliminate_dead_code()
    return fx.GraphModule(draft, draft.graph, type(model).__name__)


def _free(leaf: Any) -> Any:
    """Every dimension but the channels may vary."""
    if not isinstance(leaf, Tensor):
        return None
    return {dim: Dim.AUTO for dim in range(leaf.dim()) if dim != 1}


@dataclass(eq=False)
class _Writer:
    """Writes the new graph, node by node.

    Attributes:
        modules: those of the model before it was exported, by name.
        source: the exported model.
        root: where layers and parameters of the new graph go.
        channels, need: what every value consists of, and which channels are needed.
        graph: the new graph.
        nodes: the new node for each old one.
    """

    modules: dict[str, nn.Module]
    source: fx.GraphModule
    root: nn.Module
    channels: Channels
    need: Tensor
    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def write(self, node: fx.Node) -> None:
        """Write what a node of the old graph becomes, if anything."""
        made = self.channels.made.get(node)
        if node.op == "get_attr":
            return
        if node.op in ("placeholder", "output"):
            self._copy(node)
        elif node.op == "call_module" or operator_of(node) in DROPPED:
            return
        elif made is not None:
            wanted = self.need[made.first : made.first + made.count]
            if wanted.any():
                self._made(node, made, wanted)
        elif not len(self.channels.of.get(node, ())):
            self._copy(node)

    def _made(self, node: fx.Node, made: Made, wanted: Tensor) -> None:
        if made.layer is not None:
            layer, numbers = made.layer, made.reads[made.layer.call.data]
            columns = layer.columns(wanted, self.channels.zeros(numbers))
            data = self._gather(numbers[columns])
            name = self._register(layer, layer.cut(wanted, columns))
            self.nodes[node] = self.graph.call_module(name, (data,))
        elif operator_of(node) is aten.pad:
            self.nodes[node] = self._pad(node, made, wanted)
        elif made.reads:
            given = {arg: self._gather(numbers[wanted]) for arg, numbers in made.reads.items()}
            self.nodes[node] = self.graph.node_copy(
                node, lambda arg: given[arg] if arg in given else self._whole(arg)
            )
        else:
            self._copy(node)

    def _pad(self, node: Any, made: Made, wanted: Tensor) -> fx.Node:
        """A node with the wanted channels of a padded value."""
        parts = self._parts(made.reads[node.args[0]][wanted])
        options = fx.map_arg(node.args[1:], self._whole)
        if len(parts) == 1:
            return self.graph.call_function(node.target, (*parts, *options), node.kwargs)
        return self.graph.call_module("padded_cat", (parts, *options), node.kwargs)

    def _copy(self, node: Any) -> None:
        if operator_of(node) is aten.sym_size:
            source, dim = node.args
            data = self._gather(self.channels.of[source][:1])
            self.nodes[node] = self.graph.call_function(node.target, (data, dim))
        else:
            self.nodes[node] = self.graph.node_copy(node, self._whole)

    def _whole(self, node: fx.Node) -> fx.Node:
        """The new node of an operand with all its channels."""
        numbers = self.channels.of.get(node, ())
        if node.op == "get_attr" and node not in self.nodes:
            self.nodes[node] = self._parameter(node)
        return self._gather(numbers) if len(numbers) else self.nodes[node]

    def _gather(self, numbers: Tensor) -> fx.Node:
        """A node with these channels, from wherever they are made."""
        parts = self._parts(numbers)
        return parts[0] if len(parts) == 1 else self.graph.call_function(torch.cat, (parts, 1))

    def _parts(self, numbers: Tensor) -> list[fx.Node]:
        """Nodes that have these channels when they are put side by side."""
        makers = [self.channels.maker[number] for number in numbers.tolist()]
        parts, start = [], 0
        for maker, run in groupby(makers):
            count = len(list(run))
            parts.append(self._pick(maker, numbers[start : start + count]))
            start += count
        return parts

    def _pick(self, maker: fx.Node, numbers: Tensor) -> fx.Node:
        """A node with these channels of one maker."""
        made, node = self.channels.made[maker], self.nodes[maker]
        if made.layer is None and not made.reads:
            places, count = (numbers - made.first).tolist(), made.count
        else:
            wanted = self.need[made.first : made.first + made.count]
            order = wanted.cumsum(0) - 1
            places, count = order[numbers - made.first].tolist(), int(wanted.sum())
        if places == list(range(count)):
            return node
        if places == list(range(places[0], places[0] + len(places))):
            return self.graph.call_function(torch.narrow, (node, 1, places[0], len(places)))
        name = f"places_{len(self.root._buffers)}"
        device = maker.meta["val"].device
        self.root.register_buffer(name, torch.tensor(places, device=device))
        index = self.graph.get_attr(name)
        return self.graph.call_function(torch.index_select, (node, 1, index))

    def _parameter(self, node: fx.Node) -> fx.Node:
        """A parameter or buffer that an operator reads which is no layer."""
        name = str(node.target).replace(".", "_")
        tensor = attribute(self.source, str(node.target))
        if isinstance(tensor, nn.Parameter):
            self.root.register_parameter(name, nn.Parameter(tensor.detach(), tensor.requires_grad))
        else:
            self.root.register_buffer(name, tensor)
        return self.graph.get_attr(name)

    def _register(self, layer: ExportedLayer, module: nn.Module) -> str:
        """Add a layer under the name of its weight."""
        weight = key_of(layer.call)
        while weight.op != "get_attr":
            weight = weight.all_input_nodes[0]
        owner = str(weight.target).removesuffix(".weight").removesuffix(".running_mean")
        original = self.modules.get(owner)
        if isinstance(original, nn.modules.batchnorm._BatchNorm):
            # The exported graph does not say how running statistics are averaged.
            module.momentum = original.momentum  # type: ignore[assignment]
            module._buffers["num_batches_tracked"] = copy.deepcopy(original.num_batches_tracked)
        path = owner.replace(".", "_")
        name, number = f"{path}_layer" if hasattr(self.root, path) else path, 1
        while hasattr(self.root, name):
            number += 1
            name = f"{path}_{number}"
        self.root.add_module(name, module)
        return name
