"""Units: sets of channels that can only go together, and what a network costs without some of them.

Slots that are linked, or that a layer ties which computes every channel from its own, form a unit.
Without pins, `compact` removes it as soon as masks have removed what writes and what reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..channels.calls import BatchNorm
from ..tracing.sandbox import on_cpu
from .slots import Slots
from .solve import components


@dataclass(frozen=True, eq=False)
class Use:
    """One application of a layer, by the units of its channels.

    Attributes:
        layer: name of the module.
        number: how many applications of the layer came before.
        rows, columns: the unit of every channel that it writes and reads; -1 for those that stay.
        groups: of the layer.
        elements: of one kernel; 0 if an application before has counted them, and for a batch norm.
        vectors: parameters with one element for every row, 0 if counted before.
        work: multiply-accumulates of one kernel, for one sample.
        is_norm: whether it is a batch norm, which has no kernels.
    """

    layer: str
    number: int
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    groups: int
    elements: int
    vectors: int
    work: int
    is_norm: bool


@dataclass(frozen=True, eq=False)
class Units:
    """The units of a network, numbered from 0.

    Attributes:
        count: how many there are.
        uses: all applications of layers that write or read channels, in order.
        tensors: parameters and buffers of element-wise operators and group norms, by name: the
            dimension that lies along channels, how many parameters a channel has, and its unit.
        groups: of the group norms, by layer: how many, and the units of all channels.
        pinned: for layers all of whose channels stay, the operator that needs all of them, or what
            went wrong without some.
    """

    count: int
    uses: tuple[Use, ...]
    tensors: Mapping[str, tuple[int, int, NDArray[np.int64]]]
    groups: Mapping[str, tuple[int, NDArray[np.int64]]]
    pinned: Mapping[str, str]

    def only(self, chosen: NDArray[np.bool_], reason: str = "") -> Units:
        """Some of the units, numbered anew; the channels of the others stay, for a reason if any.

        The reason is that of layers all of whose channels stay only now.
        """
        numbers = np.append(np.where(chosen, np.cumsum(chosen) - 1, -1), -1)
        uses = [replace(u, rows=numbers[u.rows], columns=numbers[u.columns]) for u in self.uses]
        tensors = {
            name: (dim, each, numbers[ids]) for name, (dim, each, ids) in self.tensors.items()
        }
        groups = {name: (count, numbers[ids]) for name, (count, ids) in self.groups.items()}
        pinned = dict(self.pinned)
        if reason:
            whole = [u.layer for u in uses if not u.is_norm and (u.rows < 0).all()]
            pinned = {**dict.fromkeys(whole, reason), **pinned}
        return Units(int(chosen.sum()), tuple(uses), tensors, groups, pinned)


def _labels(slots: Slots) -> tuple[Tensor, Tensor]:
    """The unit of every slot, -1 where it stays, and the component that it belongs to."""
    tied = {applied.layer for applied in slots.applications if applied.diagonal}
    for applied in slots.applications:
        if applied.groups > 1 and not applied.diagonal:
            # A group goes as a whole, what it reads with what it writes.
            ends = (applied.source.slots, applied.result.slots)
            slots.link(*(end.reshape(applied.groups, -1)[:, 0] for end in ends))
    component = components(slots, tied)
    stays = torch.zeros(slots.count, dtype=torch.bool)
    for numbers in slots.pinned:
        stays[component[numbers]] = True
    free = torch.unique(component[~stays[component]])
    label = torch.full((slots.count,), -1)
    label[free] = torch.arange(len(free))
    return label[component], component


@on_cpu()
def units_among(bare: nn.Module, slots: Slots) -> Units:
    """The units that there are among the slots of a model without masks."""
    label, component = _labels(slots)
    seen: Counter[str] = Counter()
    uses = []
    for applied in slots.applications:
        module = bare.get_submodule(applied.layer)
        first, is_norm = seen[applied.layer] == 0, isinstance(applied.call, BatchNorm)
        own = [*module.parameters(recurse=False)]
        matrices = [p for p in own if p.dim() > 1 and not is_norm]
        uses.append(
            Use(
                applied.layer,
                seen[applied.layer],
                label[applied.result.slots].numpy(),
                label[applied.source.slots].numpy(),
                applied.groups,
                sum(p.shape[2:].numel() for p in matrices) * first,
                sum(p.dim() == 1 for p in own) * first,
                applied.work,
                is_norm,
            )
        )
        seen[applied.layer] += 1
    written = np.unique(
        np.concatenate([np.zeros(0, int), *(u.rows for u in uses if not u.is_norm)])
    )
    count = int(label.max()) + 1 if len(label) else 0
    tensors, elements = {}, {name: p.numel() for name, p in bare.named_parameters()}
    for name, ((dim, places), *_) in slots.tensors.items():
        tensors[name] = dim, elements.get(name, 0) // len(places), label[places].numpy()
    groups = {name: (number, label[at].numpy()) for name, (number, at) in slots.groups.items()}
    units = Units(count, tuple(uses), tensors, groups, _reasons(slots, label, component.numpy()))
    # What no layer writes, such as a constant of the code, is none of them.
    return units.only(np.isin(np.arange(count), written))


def _reasons(slots: Slots, label: Tensor, component: NDArray[np.int64]) -> dict[str, str]:
    """Why all the channels that a layer writes stay, for every layer of which they do."""
    by: dict[int, str] = {}
    for numbers, operator in zip(slots.pinned, slots.pinned_by, strict=True):
        for number in np.unique(component[numbers.numpy()]):
            by.setdefault(int(number), operator)
    found = {}
    for applied in slots.applications:
        places = applied.result.slots
        if not isinstance(applied.call, BatchNorm) and bool((label[places] < 0).all()):
            names = Counter(by.get(int(number), "") for number in component[places.numpy()])
            found[applied.layer] = names.most_common(1)[0][0]
    return found
