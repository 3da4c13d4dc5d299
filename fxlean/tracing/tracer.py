"""From a model and example inputs to an ATen-level graph, with the model left as it was found.

The model runs once for real, so that its caches fill and Python takes its true way, and then
with fake tensors. Every convolution becomes `aten.convolution`, every shape a constant, and every
in-place write a pure operator.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import ArgumentError, PruneWarning, TraceError, first_line, some, warn
from .arguments import check_traceable
from .functions import functions_as_code, multiply_by_matrices, products_by_matrices
from .hooks import only_hooks
from .inputs import Arguments
from .leaves import replaced, strangers_in, tensors_in
from .rehearsal import Call, Dependent, Rehearsal, fill_caches, rehearsed
from .sandbox import LOCK, evaluating
from .witness import Witness, holders, is_symbolic


@dataclass(frozen=True)
class Piece:
    """The traced graph of a model, or of one of its submodules.

    Attributes:
        module: name of the submodule, "" for the whole model.
        graph: the graph module; all of its placeholders but the first `len(state)` are inputs.
        state: names of the parameters and buffers behind the first placeholders.
        inputs, outputs: the tensors of the real run in graph order, for one of several pieces;
            they show which pieces feed which.
    """

    module: str
    graph: torch.fx.GraphModule
    state: tuple[str, ...]
    inputs: tuple[object, ...] = ()
    outputs: tuple[object, ...] = ()

    @property
    def state_nodes(self) -> dict[torch.fx.Node, str]:
        """The placeholders of parameters and buffers, with their names."""
        return dict(zip(self._placeholders, self.state, strict=False))

    @property
    def input_nodes(self) -> list[torch.fx.Node]:
        """The placeholders of the inputs."""
        return self._placeholders[len(self.state) :]

    @property
    def output_nodes(self) -> list[torch.fx.Node]:
        """The nodes whose values the graph returns."""
        (node,) = self.graph.graph.find_nodes(op="output")
        returned: Any = node.args[0]
        return list(returned)

    @property
    def _placeholders(self) -> list[torch.fx.Node]:
        return [node for node in self.graph.graph.nodes if node.op == "placeholder"]


@dataclass(frozen=True)
class Trace:
    """What was traced of a model.

    Attributes:
        pieces: one graph, or one for each submodule that could be traced.
        called: names of the modules that the forward pass calls.
        arguments: on which the model was traced.
        results: the tensors that the model returned in the real run.
        left_out: what could not be traced, and why.
    """

    pieces: tuple[Piece, ...]
    called: frozenset[str]
    arguments: Arguments
    results: tuple[Tensor, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)


def trace_model(model: nn.Module, example_inputs: Any = None) -> Trace:
    """The model as ATen graphs: one if it traces as a whole, else one a submodule.

    Args:
        model: any module; it is left exactly as found.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or
            None to try common sizes.

    Raises:
        ArgumentError: the model rejects the example inputs that it was given, or has or returns
            tensors that cannot be traced.
        TraceError: no inputs that were tried fit, or nothing of the model can be traced.

    Warns:
        PruneWarning: it was traced in parts, or something outside of it holds traced tensors.
    """
    check_traceable(model)
    with LOCK:
        rehearsal = rehearsed(model, example_inputs)
        result = rehearsal.calls[""].result
        _check_result(model, result)
        witness = Witness()
        try:
            piece = _trace(model, "", rehearsal, witness)
        except Exception as err:  # whatever Python makes of tensors without values
            _forget(err)
            trace = _trace_children(model, rehearsal, err, witness)
            _warn_of_parts(model, trace)
        else:
            called = frozenset(rehearsal.calls)
            trace = Trace((piece,), called, rehearsal.arguments, tuple(tensors_in(result)))
        _warn_of_survivors(model, witness)
    return trace


def _check_result(model: nn.Module, result: Any) -> None:
    strangers = strangers_in(result)
    if strangers:
        raise ArgumentError(
            f"{type(model).__name__} returns tensors in {some(strangers)}, where no trace sees "
            "them. Return them in tuples, lists, mappings, named tuples or dataclasses, or prune a "
            "submodule, with example_inputs of its own."
        )


def _trace(model: nn.Module, name: str, rehearsal: Rehearsal, witness: Witness) -> Piece:
    """One module as a graph of pure ATen operators.

    Raises whatever the module raises.
    """
    call = rehearsal.calls[name]
    for tree in (call.args, call.kwargs, call.result):
        if strangers_in(tree):
            raise TraceError(
                f"{name or type(model).__name__} takes or returns a {some(strangers_in(tree))}, "
                "which holds tensors that cannot be seen"
            )
    # What a hook keeps may be read later on, so that it takes part after all; and what the model
    # itself keeps may be made only where tensors have values.
    ways = [(rehearsal.hooks, False), (None, False), (None, True)]
    if not rehearsal.onlookers:
        del ways[1]
    failures: list[Exception] = []
    for hooks, cached in ways:
        try:
            return _graph(model, name, rehearsal, witness, hooks, cached=cached)
        except Exception as err:  # whatever Python makes of tensors without values
            _forget(err)
            failures.append(err)
    raise failures[0]


def _graph(
    model: nn.Module,
    name: str,
    rehearsal: Rehearsal,
    witness: Witness,
    hooks: frozenset[int] | None,
    *,
    cached: bool,
) -> Piece:
    """One module as a graph, with these hooks (None for all), on empty or on filled caches."""
    call = rehearsal.calls[name]
    module = model.get_submodule(name)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    values, tensors = list(state.values()), tensors_in((call.args, call.kwargs))

    def run(*fakes: Tensor) -> list[Tensor]:
        filled = iter(fakes[len(state) :])
        args, kwargs = replaced((call.args, call.kwargs), lambda _: next(filled))
        named = dict(zip(state, fakes, strict=False))
        return tensors_in(torch.func.functional_call(module, named, args, kwargs))

    def seen(*fakes: Tensor) -> list[Tensor]:
        with witness.of(values), products_by_matrices():
            result: list[Tensor] = torch.func.functionalize(run)(*fakes)
            return result

    kept = nullcontext() if hooks is None else only_hooks(model, hooks)
    with evaluating(model), kept, functions_as_code():
        dependent = fill_caches(model, name, call) if cached else rehearsal.dependent
        graph = _pure(seen, values + tensors)
        if any(_writes(node.target) for node in graph.graph.nodes):
            # Some composite operators, such as circular padding, come apart too late.
            again = torch.func.functionalize(torch.fx.Interpreter(graph).run)
            graph = _pure(again, values + tensors)
        placeholders = graph.graph.find_nodes(op="placeholder")
        multiply_by_matrices(graph, placeholders[len(state) :])
    if any(is_symbolic(node.meta.get("val")) for node in graph.graph.nodes):
        raise TraceError("it has values or sizes that depend on the inputs")
    if not _is_faithful(graph, call, dependent):
        raise TraceError("it does not compute the same in every call")
    prefix = f"{name}." if name else ""
    return Piece(name, graph, tuple(prefix + key for key in state))


def _pure(function: Callable[..., Any], arguments: Sequence[Tensor]) -> torch.fx.GraphModule:
    """A function without in-place writes as a graph of ATen operators."""
    traced = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)
    graph: torch.fx.GraphModule = traced(*arguments)
    graph.graph.eliminate_dead_code()
    return graph


def _writes(target: Any) -> bool:
    """Whether an operator writes into its arguments."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _is_faithful(graph: torch.fx.GraphModule, call: Call, dependent: Dependent) -> bool:
    """Whether a graph returns what the real run did, and holds no tensor that is left from it."""
    nodes = list(graph.graph.nodes)
    constants = [getattr(graph, str(node.target), None) for node in nodes if node.op == "get_attr"]
    if any(isinstance(c, Tensor) and c in dependent for c in constants):
        return False
    returned = [node.meta["val"] for node in nodes[-1].args[0]]
    expected = tensors_in(call.result)
    return [tensor.shape for tensor in returned] == [tensor.shape for tensor in expected]


def _trace_children(
    model: nn.Module, rehearsal: Rehearsal, failure: Exception, witness: Witness
) -> Trace:
    """The largest submodules that trace, after the model as a whole has failed to."""
    calls = rehearsal.calls
    pieces: list[Piece] = []
    left_out = {type(model).__name__: f"does not trace as a whole: {first_line(failure)}"}

    def descend(name: str) -> None:
        module = model.get_submodule(name)
        if not any(parameter.dim() >= 2 for parameter in module.parameters()):
            return
        if name and name in calls:
            try:
                piece = _trace(model, name, rehearsal, witness)
            except Exception as err:  # as for the whole
                _forget(err)
                left_out[name] = f"does not trace as a whole: {first_line(err)}"
            else:
                inputs = tuple(tensors_in((calls[name].args, calls[name].kwargs)))
                outputs = tuple(tensors_in(calls[name].result))
                pieces.append(replace(piece, inputs=inputs, outputs=outputs))
                return
        for child, _ in module.named_children():
            descend(f"{name}.{child}" if name else child)

    descend("")
    if not pieces:
        raise TraceError(
            f"neither {type(model).__name__} nor any of its submodules can be traced: "
            f"{first_line(failure)}. Prune a submodule that is free of data-dependent Python, "
            "with example_inputs of its own."
        ) from failure
    results = tuple(tensors_in(calls[""].result))
    return Trace(tuple(pieces), frozenset(calls), rehearsal.arguments, results, left_out)


def _warn_of_parts(model: nn.Module, trace: Trace) -> None:
    (name, reason), *others = trace.left_out.items()
    more = f" Nor do {some([other for other, _ in others])}." if others else ""
    warn(
        f"{name} {reason}. So its parts were traced one by one ({some(_names(trace))}), and what "
        f"Python does between them is not seen.{more} Masks are safe, but may differ from those "
        "of the whole: pass tensors through forward without looking at their values.",
        PruneWarning,
    )


def _names(trace: Trace) -> list[str]:
    return [piece.module for piece in trace.pieces]


def _warn_of_survivors(model: nn.Module, witness: Witness) -> None:
    alive = witness.survivors()
    if alive:
        shapes = list(dict.fromkeys(str(tuple(tensor.shape)) for tensor in alive))
        found = holders()
        where = f"in {some(found)}" if found else "outside of its modules"
        warn(
            f"{type(model).__name__} has kept tensors of the trace, which have no values, {where} "
            f"(shapes: {some(shapes)}). The masks are right, but clear what keeps them before "
            "you run the model.",
            PruneWarning,
        )


def _forget(err: BaseException | None) -> None:
    """Let go of the tensors in the frames of an error, and keep where it happened."""
    while err is not None:
        traceback.clear_frames(err.__traceback__)
        err = err.__cause__ or err.__context__
