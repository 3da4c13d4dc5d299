"""`compact`: a pruned model as an ordinary, smaller and faster one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..checkpoint.layout import note_dense
from ..errors import CompactionError, CompactionWarning, warn
from ..masking import without_masks
from ..tracing.arguments import check_model, unwrapped
from ..tracing.inputs import Arguments
from ..tracing.leaves import replaced
from ..tracing.sandbox import copied, evaluating, on_cpu, ordinary, paused_collection
from ..tracing.tracer import Trace, trace_model
from .cut import count_groups, narrow_tensor, part_of, replace_modules, shell, shrink
from .exported.writer import rewritten
from .fold import fold, is_frozen
from .plan import choose_slots, layers_of
from .rules import FOLLOW
from .slots import Slots
from .solve import solve
from .verify import Check, outputs
from .walk import slots_of


@ordinary()
@paused_collection()
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

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
    >>> with torch.no_grad():
    ...     for parameter in model[0].parameters():
    ...         parameter[2:] = 0
    >>> compact(model)[0]
    Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1))
    """
    check_model(model)
    model = unwrapped(model)
    dense = without_masks(model)
    bare = _Bare(dense, trace_model(dense, example_inputs))
    check = Check(model, dense, bare.trace.arguments)
    while True:
        smaller, problems = _smallest(bare, check)
        if _grouped(smaller) >= _grouped(bare.model):
            if _size(smaller) == _size(dense):
                _explain(bare, problems)
            note_dense(dense, smaller)
            return smaller
        # Within its one group that is left, a layer can be cut further.
        bare = _Bare(smaller, trace_model(smaller, check.arguments))


@dataclass
class _Bare:
    """A model without masks, and its trace."""

    model: nn.Module
    trace: Trace

    @cached_property
    def slots(self) -> Slots:
        """With all operators taken to follow the number of channels that can."""
        return slots_of(self.model, self.trace, FOLLOW[0])


def _grouped(model: nn.Module) -> int:
    """How many layers compute in groups."""
    return sum(getattr(module, "groups", 1) > 1 for module in model.modules())


def _smallest(bare: _Bare, check: Check) -> tuple[nn.Module, list[str]]:
    """The smallest candidate that computes the same, and what was wrong with smaller ones."""
    problems: list[str] = []
    for attempt in _attempts(bare):
        problem = check.problem(attempt)
        if not problem:
            return attempt, problems
        problems.append(problem)
    raise CompactionError(
        f"{type(bare.model).__name__} without masks differs from the masked model: {problems[-1]}. "
        "Compact it in eval mode, on example_inputs for which its outputs are the same every time."
    )


def _size(model: nn.Module) -> int:
    """Number of elements of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def _explain(bare: _Bare, problems: list[str]) -> None:
    """Say why a model with pruned kernels keeps its size."""
    name, applications = type(bare.model).__name__, bare.slots.applications
    dead = sum(int(a.result.zero.sum()) for a in applications)
    if problems:
        reason = (
            f"for what was cut out of it does not compute the same: {problems[0]}. Where sizes are "
            "written into the code, compute them from shapes; leave out what is computed and not "
            "used."
        )
    elif dead:
        reason = (
            f"for its {dead:,} dead channels share their places with live ones, through additions, "
            "groups, or operators that need all channels, or are too few for layers to get faster. "
            "Prune further."
        )
    else:
        reason = (
            "for every channel still carries something: pruning has taken single kernels, and all "
            "of no channel. Prune whole channels (granularity='channel'), or further."
        )
    if problems or not all(bool(a.nonzero.all()) for a in applications):
        warn(f"{name} keeps its size, {reason}", CompactionWarning)


def _attempts(bare: _Bare) -> Iterator[nn.Module]:
    """Ever more careful candidates, down to the model without masks."""
    if is_frozen(bare.model):
        folded = copied(bare.model)
        if fold(folded, bare.trace):
            yield from _cut(_Bare(folded, trace_model(folded, bare.trace.arguments)))
    yield from _cut(bare)
    yield bare.model


def _cut(bare: _Bare) -> Iterator[nn.Module]:
    """Candidates with fewer channels, the smallest first."""
    model, arguments, strangers = bare.model, bare.trace.arguments, bare.slots.strangers
    if strangers:
        try:
            candidate = _rewritten(model, arguments)
        except Exception as err:  # torch.export refuses many models, in many ways
            warn(
                f"{strangers} pruned convolutions have weights that belong to no layer, and "
                f"the model cannot be rewritten ({type(err).__name__}: {str(err)[:200]}): they "
                "keep their size. Make them nn.Conv2d modules, or the model exportable.",
                CompactionWarning,
            )
        else:
            yield candidate
    for follow in FOLLOW:
        slots = bare.slots if follow is FOLLOW[0] else slots_of(model, bare.trace, follow)
        yield fitted(_compacted(model, slots, pinned=False), arguments)
    yield fitted(_compacted(model, slots, pinned=True), arguments)


def _rewritten(bare: nn.Module, arguments: Arguments) -> nn.Module:
    """The model as a graph of small layers, tried on inputs of another size as well."""
    model = copied(bare)
    # Export takes a size of 1 for a constant, so it gets larger inputs where they are accepted.
    larger = replaced(arguments, _doubled)
    try:
        check = Check(model, model, larger, noise=False)
    except Exception:  # whatever the model raises at a size that it was not made for
        larger, check = arguments, Check(model, model, arguments, noise=False)
    with evaluating(model):
        result = rewritten(model, larger)
    problem = check.difference(result)
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
    kept = solve(slots, pinned=True) if pinned else choose_slots(slots, layers)
    result = shell(bare)
    for name, ((dim, channels), *_) in slots.tensors.items():
        narrow_tensor(result, name, dim, kept(channels))
    for name, (groups, channels) in slots.groups.items():
        count_groups(result.get_submodule(name), groups, kept(channels))
    selected: dict[nn.Module, nn.Module] = {}
    for name, applications in layers.items():
        module = result.get_submodule(name)
        smaller = shrink(module, part_of(applications, kept))
        if smaller is not module:
            selected[module] = smaller
    replace_modules(result, selected)
    return result


def fitted(model: nn.Module, arguments: Arguments) -> nn.Module:
    """The model with norms that know how many channels they get; in place.

    Those without parameters do not need the number, but instance norms warn where it is another.
    """
    channels: dict[Any, int] = {}

    def look(module: Any, inputs: tuple[Any, ...]) -> None:
        instance = isinstance(module, nn.modules.instancenorm._InstanceNorm)
        dim = inputs[0].dim() - module._get_no_batch_dim() if instance else 1
        channels[module] = inputs[0].shape[dim]

    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    norms = [module for module in norms if not module.state_dict()]
    handles = [module.register_forward_pre_hook(look) for module in norms]
    if norms:
        with contextlib.suppress(Exception):  # a wrong candidate is found out later
            outputs(model, [arguments])
    for handle in handles:
        handle.remove()
    for module, count in channels.items():
        module.num_features = count
    return model
