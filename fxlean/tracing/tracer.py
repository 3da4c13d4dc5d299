"""From a model and example inputs to an ATen-level graph, with the model left as it was found.

Every convolution becomes `aten.convolution`, every shape a constant, and every in-place write a
pure operator. Nothing is computed: the tensors are fake.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ..errors import ArgumentError, TraceError
from .inputs import as_arguments, describe, guesses
from .sandbox import evaluating


@dataclass(frozen=True)
class Piece:
    """The traced graph of a model, or of one of its submodules.

    Attributes:
        module: name of the submodule, "" for the whole model.
        graph: the graph module; all of its placeholders but the first `len(state)` are inputs.
        state: names of the parameters and buffers behind the first placeholders.
        inputs, outputs: the tensors of a real run, if there was one, in graph order; they show
            which pieces feed which.
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
    def batch(self) -> int:
        """Number of samples: the leading size of the first input that has dimensions."""
        shapes = [node.meta["val"].shape for node in self.input_nodes]
        return next((int(shape[0]) for shape in shapes if shape), 1)

    @property
    def _placeholders(self) -> list[torch.fx.Node]:
        return [node for node in self.graph.graph.nodes if node.op == "placeholder"]


@dataclass(frozen=True)
class Trace:
    """What was traced of a model.

    Attributes:
        pieces: one graph, or one for each submodule that could be traced.
        called: names of the modules that the forward pass calls.
        results: the tensors that the model returned in the real run, if there was one.
        left_out: what could not be traced, and why.
    """

    pieces: tuple[Piece, ...]
    called: frozenset[str]
    results: tuple[object, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)


def trace_model(model: nn.Module, example_inputs: Any = None) -> Trace:
    """The model as ATen graphs: one if it traces as a whole, else one a submodule.

    Args:
        model: any module; it is left exactly as found.
        example_inputs: a tensor, a tuple of positional arguments, or None to try common sizes.

    Raises:
        ArgumentError: the model rejects the example inputs that it was given.
        TraceError: no inputs that were tried fit, or nothing of the model can be traced.
    """
    if example_inputs is not None:
        candidates = [as_arguments(example_inputs)]
    else:
        candidates = list(guesses(model))
    failure: Exception | None = None
    for arguments in candidates:
        try:
            piece, called = _trace(model, "", arguments)
            return Trace((piece,), called)
        except Exception as err:
            failure = err
        try:
            calls = _record_calls(model, arguments)
        except Exception as err:
            failure = err
            continue
        return _trace_children(model, calls, failure)
    assert failure is not None
    if example_inputs is not None:
        raise ArgumentError(
            f"{type(model).__name__} rejects the example inputs {describe(candidates[0])}: "
            f"{_first_line(failure)}. Pass example_inputs that model(*example_inputs) accepts."
        ) from failure
    tried = ", ".join(describe(arguments) for arguments in candidates)
    raise TraceError(
        f"{type(model).__name__} accepts none of the inputs tried ({tried}); the last failed "
        f"with: {_first_line(failure)}. Pass example_inputs=, a tensor or a tuple of arguments."
    ) from failure


def _trace(model: nn.Module, name: str, arguments: tuple[Any, ...]) -> tuple[Piece, frozenset[str]]:
    """One module as a graph of pure ATen operators, and the names of the modules it calls.

    Raises whatever the module raises.
    """
    module = model.get_submodule(name)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    leaves, spec = pytree.tree_flatten(arguments)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def run(values: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
        filled = iter(inputs)
        merged = [next(filled) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        positional = pytree.tree_unflatten(merged, spec)
        named = dict(zip(state, values, strict=True))
        result = torch.func.functional_call(module, named, positional)
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]

    called: set[str] = set()
    with evaluating(model):
        for path, child in model.named_modules():
            child.register_forward_pre_hook(lambda *_, path=path: called.add(path))
        graph = _pure(run, list(state.values()), tensors)
        if any(_writes(node.target) for node in graph.graph.nodes):
            # Some composite operators, such as circular padding, come apart too late.
            graph = _pure(torch.fx.Interpreter(graph).run, *state.values(), *tensors)
    prefix = f"{name}." if name else ""
    return Piece(name, graph, tuple(prefix + key for key in state)), frozenset(called)


def _pure(function: Callable[..., Any], *arguments: Any) -> torch.fx.GraphModule:
    """A function as a graph of ATen operators, without in-place writes."""
    pure = torch.func.functionalize(function)
    traced = make_fx(pure, tracing_mode="fake", _allow_non_fake_inputs=True)
    graph: torch.fx.GraphModule = traced(*arguments)
    graph.graph.eliminate_dead_code()
    return graph


def _writes(target: Any) -> bool:
    """Whether an operator writes into its arguments."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


@dataclass(frozen=True)
class _Call:
    """Arguments and result of the first call of a submodule in a real run."""

    arguments: tuple[Any, ...]
    result: Any


def _record_calls(model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, _Call]:
    """The first call of every submodule, from running the model once for real."""
    calls: dict[str, _Call] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if not kwargs:
                calls.setdefault(name, _Call(args, out))

        return record

    with evaluating(model):
        for name, module in model.named_modules():
            module.register_forward_hook(recorder(name), with_kwargs=True)
        model(*arguments)
    return calls


def _trace_children(model: nn.Module, calls: dict[str, _Call], failure: Exception) -> Trace:
    """The largest submodules that trace, after the model as a whole has failed to."""
    pieces: list[Piece] = []
    left_out = {type(model).__name__: f"does not trace as a whole: {_first_line(failure)}"}

    def descend(name: str) -> None:
        module = model.get_submodule(name)
        if not any(parameter.dim() >= 2 for parameter in module.parameters()):
            return
        if name and name in calls:
            try:
                piece, _ = _trace(model, name, calls[name].arguments)
            except Exception as err:
                left_out[name] = f"does not trace as a whole: {_first_line(err)}"
            else:
                inputs = _tensors(calls[name].arguments)
                outputs = _tensors(calls[name].result)
                pieces.append(Piece(name, piece.graph, piece.state, inputs, outputs))
                return
        for child, _ in module.named_children():
            descend(f"{name}.{child}" if name else child)

    descend("")
    if not pieces:
        raise TraceError(
            f"neither {type(model).__name__} nor any of its submodules can be traced: "
            f"{_first_line(failure)}. Prune a submodule that is free of data-dependent Python, "
            "with example_inputs of its own."
        ) from failure
    results = _tensors(calls[""].result) if "" in calls else ()
    return Trace(tuple(pieces), frozenset(calls), results, left_out)


def _tensors(tree: Any) -> tuple[object, ...]:
    return tuple(leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _first_line(err: BaseException) -> str:
    lines = str(err).strip().splitlines()
    return f"{type(err).__name__}: {lines[0][:300]}" if lines else type(err).__name__
