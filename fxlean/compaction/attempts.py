"""`compact`: a pruned model as an ordinary, smaller and faster one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from ..errors import CompactionError, CompactionWarning
from ..nn import RefreshMasks
from ..tracing.arguments import check_model, unwrapped
from ..tracing.inputs import Arguments, call
from ..tracing.leaves import replaced, tensors_in
from ..tracing.sandbox import evaluating, on_cpu, running
from ..tracing.tracer import Trace, trace_model
from .cut import part_of, shrink
from .exported.writer import rewritten
from .fold import fold, is_frozen
from .plan import choose_slots, layers_of
from .slots import Slots
from .walk import walk

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@torch.inference_mode(False)
def compact(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """An ordinary model that computes the same with only what pruning has left.

    Channels are removed for good wherever everything that shares their place is dead; elsewhere
    a layer reads just the channels that it still uses. Masks become permanent. The result can
    be trained, saved, compiled and exported like the original, whose code it runs. In a model
    with nothing to train (`model.eval().requires_grad_(False)`), batch norms are folded into the
    convolutions before them.

    Args:
        model: pruned by `prune`, or by anything else that sets weights to zero; not changed.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments
            that the model accepts; if left out, common sizes are tried.

    Returns:
        A new model, in the same mode (training or not) and on the same device.

    Raises:
        ArgumentError: the model rejects the example inputs, or cannot be traced without any.
        CompactionError: the outputs differ, by more than rounding.

    >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
    >>> with torch.no_grad():
    ...     for parameter in model[0].parameters():
    ...         parameter[2:] = 0
    >>> compact(model)[0]
    Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1))
    """
    check_model(model)
    model = unwrapped(model)
    bare = _copy(model)
    remove_masks(bare)
    trace = trace_model(bare, example_inputs)
    inputs = _check_inputs(trace.arguments)
    expected = _outputs(model, inputs)
    problem = ""
    for attempt in _attempts(bare, trace, inputs[0]):
        problem = _difference(attempt, inputs, expected)
        if not problem and (_trains(attempt, inputs[0]) or not _trains(bare, inputs[0])):
            # Within its one group that is left, a layer can be cut further.
            again = _grouped(attempt) < _grouped(bare)
            return compact(attempt, inputs[0]) if again else attempt
    raise CompactionError(
        f"{type(model).__name__} without masks differs from the masked model: {problem}. "
        "Compact it in eval mode, on example_inputs for which its outputs are the same every time."
    )


def _grouped(model: nn.Module) -> int:
    """How many layers compute in groups."""
    return sum(getattr(module, "groups", 1) > 1 for module in model.modules())


def _attempts(bare: nn.Module, trace: Trace, arguments: Arguments) -> Iterator[nn.Module]:
    """Ever more careful candidates, down to the model without masks."""
    if is_frozen(bare):
        folded = _copy(bare)
        if fold(folded, trace):
            yield from _cut(folded, trace_model(folded, arguments), arguments)
    yield from _cut(bare, trace, arguments)
    yield bare


def _cut(bare: nn.Module, trace: Trace, arguments: Arguments) -> Iterator[nn.Module]:
    """Candidates with fewer channels, the smallest first."""
    slots = walk(bare, trace, reshape=True)
    if slots.strangers:
        try:
            candidate = _rewritten(bare, arguments)
        except Exception as err:
            warnings.warn(
                f"{slots.strangers} pruned convolutions have weights that belong to no layer, and "
                f"the model cannot be rewritten ({type(err).__name__}: {str(err)[:200]}): they "
                "keep their size. Make them nn.Conv2d modules, or the model exportable.",
                CompactionWarning,
                stacklevel=4,
            )
        else:
            yield candidate
    yield _compacted(bare, slots, pinned=False)
    slots = walk(bare, trace, reshape=False)
    for pinned in (False, True):
        yield _compacted(bare, slots, pinned=pinned)


def _rewritten(bare: nn.Module, arguments: Arguments) -> nn.Module:
    """The model as a graph of small layers, tried on inputs of another size as well."""
    model = _copy(bare)
    # Export takes a size of 1 for a constant, so it gets larger inputs where they are accepted.
    larger = replaced(arguments, _doubled)
    try:
        expected = _outputs(model, [larger])
    except Exception:
        larger, expected = arguments, _outputs(model, [arguments])
    with evaluating(model):
        result = rewritten(model, larger)
    problem = _difference(result, [larger], expected)
    if problem:
        raise CompactionError(f"on inputs of another size: {problem}")
    return result.train(bare.training)


def _doubled(leaf: Tensor) -> Tensor:
    """Twice the size in all dimensions but the channels."""
    return leaf.repeat([1 if dim == 1 else 2 for dim in range(leaf.dim())])


@on_cpu()
def _compacted(bare: nn.Module, slots: Slots, *, pinned: bool) -> nn.Module:
    """A copy of a model with every layer cut to size.

    Args:
        bare: the model, without masks.
        slots: of its values.
        pinned: whether values keep all their channels, so that layers only change inside.
    """
    layers = layers_of(slots)
    kept = slots.solve(pinned=True) if pinned else choose_slots(slots, layers)
    result = _copy(bare)
    for name, calls in layers.items():
        module = result.get_submodule(name)
        smaller = shrink(module, part_of(calls, kept))
        if smaller is not module:
            _replace(result, module, smaller)
    return result


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, everywhere."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old and parent is not new:
                parent._modules[name] = new


def remove_masks(model: nn.Module) -> None:
    """Make the masks of `torch.nn.utils.prune` permanent, in place."""
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
            elif isinstance(hook, RefreshMasks):
                del module._forward_pre_hooks[number]


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy; computed weights, which deepcopy refuses, are detached in it."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _check_inputs(given: Arguments) -> list[Arguments]:
    """The arguments on which outputs are compared: as given, and of random numbers."""
    generator = torch.Generator().manual_seed(0)

    def noise(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return leaf
        return torch.randn(leaf.shape, generator=generator, device="cpu").to(leaf)

    return [given, replaced(given, noise)]


def _outputs(model: nn.Module, inputs: list[Arguments]) -> list[list[Tensor]]:
    """The tensors that the model returns, for each of the inputs."""
    with running(model):
        return [tensors_in(call(model, copy.deepcopy(arguments))) for arguments in inputs]


def _difference(
    model: nn.Module,
    inputs: list[Arguments],
    expected: list[list[Tensor]],
) -> str:
    """What is wrong with a candidate, or an empty string."""
    try:
        found = _outputs(model, inputs)
    except Exception as err:
        return f"{type(err).__name__}: {err}"
    for results, references in zip(found, expected, strict=True):
        for result, reference in zip(results, references, strict=True):
            error = relative_error(result, reference)
            if not error <= TOLERANCE.get(reference.dtype, 0.0):
                return f"outputs differ by {error:.1e} of the largest"
    return ""


def relative_error(result: Tensor, reference: Tensor) -> float:
    """The largest difference over the largest absolute value of the reference; NaN equals NaN."""
    if result.shape != reference.shape:
        return float("inf")
    wide = torch.float64 if reference.is_floating_point() else reference.dtype
    result, reference = result.to(wide).nan_to_num(), reference.to(wide).nan_to_num()
    if torch.equal(result, reference):
        return 0.0
    if not reference.is_floating_point():
        return float("inf")
    return ((result - reference).abs().max() / reference.abs().max()).item()


def _trains(model: nn.Module, arguments: Arguments) -> bool:
    """Whether the model runs in training mode."""
    with evaluating(model):
        model.train()
        try:
            call(model, copy.deepcopy(arguments))
        except Exception:
            return False
    return True
