"""From a model and example inputs to an ATen-level graph, with the model left as it was found.

Every convolution becomes `aten.convolution`, every shape a constant, and every in-place write a
pure operator. Nothing is computed: the tensors are fake.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from .errors import ArgumentError, TraceError

SIZES = {
    1: ((1024,), (128,), (4096,), (16,), (16384,)),
    2: tuple((n, n) for n in (64, 224, 28, 32, 128, 256, 299, 96, 16, 8, 160, 192, 240, 384, 512)),
    3: (*((n, n, n) for n in (32, 64, 16, 96, 128)), (16, 112, 112), (16, 224, 224)),
}


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
        candidates = list(_guesses(model))
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
            f"{type(model).__name__} rejects the example inputs {_describe(candidates[0])}: "
            f"{_first_line(failure)}. Pass example_inputs that model(*example_inputs) accepts."
        ) from failure
    tried = ", ".join(_describe(arguments) for arguments in candidates)
    raise TraceError(
        f"{type(model).__name__} accepts none of the inputs tried ({tried}); the last failed "
        f"with: {_first_line(failure)}. Pass example_inputs=, a tensor or a tuple of arguments."
    ) from failure


def as_arguments(example_inputs: Any) -> tuple[Any, ...]:
    """Example inputs as a tuple of positional arguments."""
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(arguments)):
        raise ArgumentError(
            f"example_inputs holds no tensor but {type(example_inputs).__name__}. Pass a tensor, "
            "or a tuple of the positional arguments of the model."
        )
    return arguments


def _guesses(model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Inputs of common sizes for a model whose first convolution says channels and dimensions."""
    firsts = _first_convolutions(model)
    signature = inspect.signature(model.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in signature if p.kind in positional and p.default is p.empty]
    for sizes in zip(*(SIZES[weight.dim() - 2] for weight, _ in firsts), strict=False):
        for size, (weight, channels) in zip(sizes, firsts, strict=True):
            image = torch.zeros((1, channels, *size), dtype=weight.dtype, device=weight.device)
            yield (image,) * max(1, len(needed))


def _first_convolutions(model: nn.Module) -> list[tuple[Tensor, int]]:
    """Weight and number of input channels of what may be the first convolution.

    The first convolution module, in order of registration, and the first parameter outside of
    such modules that could be a kernel: a functional convolution, or just a position embedding.
    """
    modules, parameters = [], []
    for module in model.modules():
        weight, channels = getattr(module, "weight", None), getattr(module, "in_channels", None)
        if isinstance(weight, Tensor) and 3 <= weight.dim() <= 5 and isinstance(channels, int):
            modules.append((weight, channels))
            continue
        own = [p for p in module.parameters(recurse=False) if 3 <= p.dim() <= 5]
        parameters += [(parameter, parameter.shape[1]) for parameter in own]
    if not modules and not parameters:
        raise ArgumentError(
            f"{type(model).__name__} has no parameter that could be a convolution kernel (3 to 5 "
            "dimensions), so there is nothing to prune and no input shape to infer. If its "
            "convolutions are elsewhere, pass example_inputs=."
        )
    return modules[:1] + parameters[:1]


@contextmanager
def untouched(model: nn.Module, *, always: bool = True) -> Iterator[None]:
    """Put back attributes, parameters, buffers, hooks, training flags and RNG state on leaving.

    With `always=False` only if the block raises. Values that the block writes into tensors in
    place are put back for buffers, not for parameters and masks, which no forward pass writes.
    """
    modules = [(module, _shallow(module.__dict__)) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for module, _ in modules for buffer in _written(module)]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    done = False
    with torch.random.fork_rng(list(devices), enabled=always):
        try:
            yield
            done = not always
        finally:
            if not done:
                for module, saved in modules:
                    _restore(module.__dict__, saved)
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.data.copy_(value)


def _written(module: nn.Module) -> list[Tensor]:
    """The module's own buffers that a forward pass may write."""
    masked = [key.removesuffix("_orig") for key in module._parameters if key.endswith("_orig")]
    masks = {f"{name}_mask" for name in masked}
    named = module.named_buffers(recurse=False)
    return [buffer for name, buffer in named if not buffer.is_meta and name not in masks]


def _shallow(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Every attribute with, for containers, a copy of what it holds."""
    return {
        key: (value, value.copy() if isinstance(value, dict | list | set) else None)
        for key, value in attributes.items()
    }


def _restore(attributes: dict[str, Any], saved: dict[str, tuple[Any, Any]]) -> None:
    attributes.clear()
    for key, (value, content) in saved.items():
        if isinstance(value, list):
            value[:] = content
        elif isinstance(value, dict | set):
            value.clear()
            value.update(content)
        attributes[key] = value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode without gradients, silent, and everything as before afterwards."""
    log = logging.getLogger("torch._subclasses.fake_tensor")  # prints whatever does not fit
    silent = log.disabled
    with untouched(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in model.modules():
            module.training = False
        log.disabled = True
        try:
            yield
        finally:
            log.disabled = silent


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


def _describe(arguments: tuple[Any, ...]) -> str:
    leaves = pytree.tree_leaves(arguments)
    return " + ".join(str(tuple(leaf.shape)) for leaf in leaves if isinstance(leaf, Tensor))


def _first_line(err: BaseException) -> str:
    lines = str(err).strip().splitlines()
    return f"{type(err).__name__}: {lines[0][:300]}" if lines else type(err).__name__
