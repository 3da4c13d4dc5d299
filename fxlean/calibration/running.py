"""A traced graph run on real values, node by node."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..channels.rules.movements import moves
from ..channels.walk import Wired, wire
from ..channels.weights import Constants, Origin
from ..tracing.inputs import Arguments
from ..tracing.leaves import replaced, tensors_in
from ..tracing.sandbox import same_random_states
from ..tracing.tracer import Piece, Trace, trace_model

Known = dict[Any, tuple[Trace, Wired]]  # by the shapes of the inputs


def traced(model: nn.Module, batch: Arguments, known: Known) -> tuple[Trace, Wired]:
    """The graphs of a model for a batch, with their wiring; once for each form of batch.

    A model that traces only in parts runs for real to find what its parts read, so it is traced for
    every batch.
    """
    form = tuple((tensor.shape, tensor.dtype) for tensor in tensors_in(batch))
    if form in known:
        return known[form]
    trace = trace_model(model, batch)
    wired = wire(model, trace)
    remember_trace(known, trace, wired)
    return trace, wired


def remember_trace(known: Known, trace: Trace, wired: Wired) -> None:
    """Keep a trace for batches of the same form, if it is that of a whole model."""
    piece = trace.pieces[0]
    if not piece.inputs:
        values = [node.meta["val"] for node in piece.input_nodes]
        known[tuple((value.shape, value.dtype) for value in values)] = trace, wired


class Running:
    """One traced graph on one batch; values are forgotten after their last use.

    Random numbers are the same in every graph of one architecture, and in every run.

    Attributes:
        nodes: the calls that depend on the inputs or draw random numbers, and the output, in order.
        values: what has been computed and is still needed, by node.
    """

    def __init__(self, model: nn.Module, piece: Piece, inputs: Sequence[Any]) -> None:
        """`inputs` are the tensors that the graph takes, in order; it may write into copies."""
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._model, self._piece = model, piece
        self._state = {node: (name, tensors[name]) for node, name in piece.state_nodes.items()}
        copies = replaced(list(inputs), Tensor.clone)
        self.values: dict[fx.Node, Any] = dict(zip(piece.input_nodes, copies, strict=True))
        varying = set(piece.input_nodes)
        self.nodes: list[fx.Node] = []
        self._last: dict[fx.Node, fx.Node] = {}
        self._draws: dict[fx.Node, int] = {}
        for node in piece.graph.graph.nodes:
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                self._draws[node] = len(self._draws)
            read = not varying.isdisjoint(node.all_input_nodes)
            if node in self._draws or node.op == "output" or read:
                varying.add(node)
                self.nodes.append(node)
                self._last |= dict.fromkeys(node.all_input_nodes, node)
        self.refresh()

    def forked(self) -> Running:
        """The same graph, run as far, to be run on by itself."""
        fork = copy.copy(self)
        fork.values = dict(self.values)
        return fork

    def readers(self) -> dict[str, set[fx.Node]]:
        """For every parameter and buffer, the calls in `nodes` that read what is made of it."""
        behind = {node: {name} for node, (name, _) in self._state.items()}
        found: defaultdict[str, set[fx.Node]] = defaultdict(set)
        runs = set(self.nodes)
        for node in self._piece.graph.graph.nodes:
            names = set().union(*(behind.get(arg, set()) for arg in node.all_input_nodes))
            if node in runs:
                for name in names:
                    found[name].add(node)
            elif names:
                behind[node] = names
        return found

    def origin(self, node: fx.Node) -> Origin | None:
        """The parameter elements behind a node that depends on parameters only."""
        return self._constants.origin(node)

    def refresh(self) -> None:
        """Forget what was computed of parameters, after they have changed."""
        self._constants = Constants(self._piece.graph, self._state, moves)

    def value(self, node: fx.Node) -> Any:
        """The value of a node that has run, or that depends on parameters only."""
        return self.values[node] if node in self.values else self._constants.value(node)

    def compute(self, node: fx.Node) -> Any:
        """The value that a node would get now, which is not kept."""
        with torch.no_grad(), self._drawing(node):
            args = fx.map_arg(node.args, self.value)
            if node.op == "output":
                return args[0]
            return node.target(*args, **fx.map_arg(node.kwargs, self.value))  # type: ignore

    @contextmanager
    def _drawing(self, node: fx.Node) -> Iterator[None]:
        """With a seed of its own for a node that draws random numbers."""
        if node not in self._draws:
            yield
            return
        with same_random_states(self._model):
            torch.manual_seed(self._draws[node])
            yield

    def step(self, node: fx.Node) -> Any:
        """Run the next node; returns its value."""
        value = self.compute(node)
        self.keep(node, value)
        return value

    def keep(self, node: fx.Node, value: Any) -> None:
        """Go past the next node with this value."""
        if node in self._last:
            self.values[node] = value
        for used in node.all_input_nodes:
            if self._last.get(used) is node:
                self.values.pop(used, None)
