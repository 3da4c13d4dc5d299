"""Layers cut to size: which channels they compute on, and the smaller modules that do it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..channels.weights import attribute
from ..checkpoint.layout import note_kept
from ..nn import Selected
from ..tracing.sandbox import copied
from .slots import Application
from .solve import Kept, fill_up

# Nanoseconds on two cores; only their ratios matter. `benchmarks/layers.py costs` measures them.
MULTIPLY = 0.01  # one multiply-accumulate of a convolution
PASS = 0.2  # reading or writing an element
GATHER = 0.8  # copying an element to a new tensor, of which nothing is in the cache yet
CALL = 10000.0  # calling one more operator
CAUTION = 2.0  # how many times its cost a selection must save: estimates are off by a half


@dataclass(frozen=True, eq=False)
class Part:
    """What is left of a layer.

    Attributes:
        applications: its applications.
        present: shape (columns,), True for the channels that its source still has.
        wanted: shape (rows,), True for those that its result must have.
        used: shape (columns,), True for those that the wanted results depend on.
        live: shape (rows,), True for wanted results that are not zero.
    """

    applications: tuple[Application, ...]
    present: Tensor
    wanted: Tensor
    used: Tensor
    live: Tensor


def part_of(applications: Sequence[Application], kept: Kept) -> Part:
    """What is left of a layer, from its applications and the slots that are kept."""
    wanted = kept(applications[0].result.slots)
    live = torch.stack([wanted & ~applied.result.zero for applied in applications]).any(0)
    used = torch.stack([applied.columns_read(live) for applied in applications]).any(0)
    return Part(tuple(applications), kept(applications[0].source.slots), wanted, used, live)


def shrink(module: nn.Module, part: Part) -> nn.Module:
    """The layer cut to size: the module, changed in place, or a `Selected` around it."""
    rows, columns = min(_options(part), key=lambda option: _option_cost(part, *option))
    narrow(module, rows, columns, part.applications[0].groups)
    return _select(module, part, rows, columns)


def cost(part: Part) -> float:
    """Estimated nanoseconds of a layer in its best form, selections included."""
    return min(_option_cost(part, *option) for option in _options(part))


def _options(part: Part) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns to compute, the widest first."""
    groups = part.applications[0].groups
    if groups > 1:
        return _grouped_options(part, groups)
    return [
        (rows, columns)
        for rows in (part.wanted, fill_up(part.live, part.wanted))
        for columns in (part.present, fill_up(part.used, part.present))
        if rows.any() and columns.any()
    ]


def _grouped_options(part: Part, groups: int) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns to compute in groups, of which each is left whole or taken out."""
    height, width = len(part.wanted) // groups, len(part.present) // groups
    present = part.present.reshape(groups, width).any(1)
    options = []
    for rows in (part.wanted, part.live):
        chosen = rows.reshape(groups, height).any(1) & present
        if chosen.any():
            options.append((chosen.repeat_interleave(height), chosen.repeat_interleave(width)))
    return options


def _option_cost(part: Part, rows: Tensor, columns: Tensor) -> float:
    """Estimated nanoseconds of a layer on these rows and columns."""
    before = sum(applied.size[0] for applied in part.applications)
    after = sum(applied.size[1] for applied in part.applications)
    first, count, width = part.applications[0], int(rows.sum()), int(columns.sum())
    kernels = count * (width if first.groups == 1 else first.nonzero.shape[1])
    total = PASS * (before * width + after * count)
    total += MULTIPLY * kernels * sum(applied.work for applied in part.applications)
    if not torch.equal(columns, part.present):
        total += CAUTION * (CALL + GATHER * before * width)
    if not torch.equal(rows, part.wanted):
        total += CAUTION * (2 * CALL + GATHER * after * int(part.wanted.sum()))
    return total


def shell(bare: nn.Module) -> nn.Module:
    """A copy to be cut, which shares parameters and buffers with the model until they are."""
    return copied(bare, [*bare.parameters(), *bare.buffers()])


def narrow(module: Any, rows: Tensor, columns: Tensor, groups: int) -> None:
    """Leave only these rows and columns in the parameters and buffers of a layer."""
    if rows.all() and columns.all():
        return
    left = groups if groups == 1 else int(rows.sum()) * groups // len(rows)
    for tensors, name, tensor, sides in _tensors(module, rows, columns, groups):
        part = tensor.detach()
        for dim, side in enumerate(sides):
            chosen = side.nonzero().flatten()
            part = part.index_select(dim, chosen.to(tensor.device))
            note_kept(module, name, dim, chosen)
        part = _laid_out(part, tensor)
        trained = isinstance(tensor, nn.Parameter)
        tensors[name] = nn.Parameter(part, tensor.requires_grad) if trained else part
    widths = {"in": int(columns.sum()), "out": int(rows.sum())}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = widths["out"]
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = widths["in"], widths["out"]
    else:
        module.in_channels, module.out_channels, module.groups = widths["in"], widths["out"], left


def _laid_out(part: Tensor, like: Tensor) -> Tensor:
    """In the memory format of another tensor."""
    for rank, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if like.dim() == rank and like.is_contiguous(memory_format=layout):
            return part.contiguous(memory_format=layout)
    return part


def blank(module: Any, rows: Tensor, columns: Tensor, groups: int) -> None:
    """Zeros in place of all but these rows and columns in new parameters of a layer."""
    for tensors, name, tensor, sides in _tensors(module, rows, columns, groups):
        if isinstance(tensor, nn.Parameter):
            value = tensor.detach()
            for dim, side in enumerate(sides):
                gone = (~side).nonzero().flatten()
                value = value.index_fill(dim, gone.to(tensor.device), 0)
            tensors[name] = nn.Parameter(value, tensor.requires_grad)


def _tensors(
    module: Any, rows: Tensor, columns: Tensor, groups: int
) -> Iterator[tuple[dict[str, Any], str, Tensor, list[Tensor]]]:
    """The tensors of a layer that hold its channels, and which of these lie along dimension 0, 1.

    What else hangs on a layer, such as the counters of a profiler, is not of that size.
    """
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is None or tensor.dim() == 0:
                continue
            sides = [rows, columns] if tensor.dim() > 1 else [rows]
            if tensor.dim() > 1 and getattr(module, "transposed", False):
                sides.reverse()
            sides = sides if groups == 1 else sides[:1]
            if [len(side) for side in sides] == [*tensor.shape[: len(sides)]]:
                yield tensors, name, tensor, sides


def narrow_tensor(model: nn.Module, name: str, dim: int, kept: Tensor) -> None:
    """Leave these channels, along a dimension, in a parameter or buffer; wherever it is."""
    if kept.all():
        return
    whole, places = attribute(model, name), kept.nonzero().flatten()
    part = whole.detach().index_select(dim, places.to(whole.device))
    for module, key in _put(model, whole, part):
        note_kept(module, key, dim, places)
        if isinstance(module, nn.PReLU):
            module.num_parameters = len(part)


def blank_tensor(model: nn.Module, name: str, dim: int, kept: Tensor) -> None:
    """Zeros in place of all but these channels in a parameter or buffer, wherever it is."""
    whole, gone = attribute(model, name), (~kept).nonzero().flatten()
    _put(model, whole, whole.detach().index_fill(dim, gone.to(whole.device), 0))


def _put(model: nn.Module, old: Tensor, value: Tensor) -> list[tuple[nn.Module, str]]:
    """Put a value in the place of a parameter or buffer; in which modules, and its name there."""
    trained = isinstance(old, nn.Parameter)
    new = nn.Parameter(value, old.requires_grad) if trained else value
    found: list[tuple[nn.Module, dict[str, Any], str]] = [
        (module, tensors, key)
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for key, tensor in tensors.items()
        if tensor is old
    ]
    for _, tensors, key in found:
        tensors[key] = new
    return [(module, key) for module, _, key in found]


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, everywhere; they may hold those."""
    fresh = {*new.values()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new and parent not in fresh:
                parent._modules[name] = new[child]


def count_groups(module: Any, groups: int, kept: Tensor) -> None:
    """Tell a group norm how many channels it has left, and in how many groups; in place."""
    module.num_channels = int(kept.sum())
    module.num_groups = module.num_channels * groups // len(kept)


def _select(module: nn.Module, part: Part, rows: Tensor, columns: Tensor) -> nn.Module:
    """The narrowed module with a selection before and a placement behind it, where needed."""
    same_rows, same_columns = torch.equal(rows, part.wanted), torch.equal(columns, part.present)
    if same_rows and same_columns:
        return module
    reads = None if same_columns else _places(columns, part.present)
    places = None if same_rows else _places(rows, part.wanted)
    selected = Selected(module, reads, places, int(part.wanted.sum())).train(module.training)
    return selected.to(next(iter(module.state_dict().values())).device)


def _places(some: Tensor, among: Tensor) -> Tensor:
    """The place of each of `some` channels among those of `among`."""
    return (among.cumsum(0) - 1)[some]
