"""Whole channels: the units of compaction, and the kernels of the graph that belong to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..channels.wiring import Block
from ..compaction.units import Units, Use
from ..selection.takeover import Reading
from .prunable import Network

Flags = NDArray[np.bool_]
COMPUTED = (
    "a weight that is computed, as by weight norm, that no convolution or linear layer owns, as in "
    "a recurrent layer, or that is used in other ways as well"
)
BESIDE = "a layer that is left alone, which reads or adds to them"


@dataclass(frozen=True, eq=False)
class Channels:
    """Units of channels that can be pruned, and the graph of the same network.

    Attributes:
        network: with its graph.
        units: those that masks can remove.
        blocks: the application in the graph of every use of `units`; None for batch norms.
    """

    network: Network
    units: Units
    blocks: tuple[Block | None, ...]

    def kept_kernels(self, gone: Flags) -> Flags:
        """Which kernels are left without some units: they write and read none that is gone."""
        keep = self.network.graph.alive.copy()
        stays = np.append(~gone, True)
        for use, start, block in self._kernels():
            rows, columns = ends(use, block)
            kept = stays[rows] & stays[columns]
            keep[start : start + kept.size] &= kept.reshape(-1)
        return keep

    def scores(self, kernels: NDArray[np.floating], together: np.ufunc) -> NDArray[np.float64]:
        """The score of every unit, from those of the kernels that write it.

        Kernels from a unit to itself, as of a depthwise or grouped convolution, pass on what
        others write, and are not counted again.
        """
        scores = np.zeros(self.units.count + 1)
        for use, start, block in self._kernels():
            rows, columns = ends(use, block)
            own = kernels[start : start + block.rows * block.columns].astype(np.float64)
            outer = np.where(rows == columns, 0.0, own.reshape(columns.shape[0], -1, block.columns))
            if use.number == 0:
                together.at(scores, use.rows, together.reduce(outer, axis=2).reshape(-1))
        return scores[:-1]

    def readings(
        self,
        kernels: NDArray[np.floating],
        scores: NDArray[np.float64],
        overlaps: Mapping[int, NDArray[np.float64]],
    ) -> list[Reading]:
        """What layers read of the units, where overlaps are known.

        As much as the kernels say; layers that are not pruned share what then remains of `scores`.
        """
        found: dict[int, tuple[NDArray[np.int64], NDArray[np.float64] | None]] = {}
        rest, times = np.append(scores, 0.0), np.zeros(len(scores) + 1)
        for use, block in zip(self.units.uses, self.blocks, strict=True):
            if block is None or block.first not in overlaps:
                continue
            rows, columns = (units[0] for units in ends(use, block))
            start = int(self.network.graph.kernel_start[block.first])
            if start < 0:
                found[block.first] = columns[0], None
                np.add.at(times, columns[0], 1)
                continue
            own = kernels[start : start + block.rows * block.columns].astype(np.float64)
            flow = np.where(rows == columns, 0.0, own.reshape(block.rows, -1)).sum(axis=0)
            found[block.first] = columns[0], flow
            np.subtract.at(rest, columns[0], flow)
        rest = np.maximum(rest, 0) / np.maximum(times, 1)
        return [
            Reading(units, rest[units] if flow is None else flow, overlaps[first])
            for first, (units, flow) in found.items()
        ]

    def gone(self) -> Flags:
        """Units that earlier masks have removed: no kernel that writes them is alive, and used.

        Of a layer without any a unit counts as there, since it keeps one.
        """
        from ..selection.liveness import used_kernels  # here, because numba takes long to import

        graph = self.network.graph
        gone: Flags = self.scores(used_kernels(graph, graph.alive).astype(float), np.add) == 0
        gone = np.append(gone, False)
        for use in self.units.uses:
            for side in (use.rows, use.columns):
                gone[side[0]] &= not gone[side].all()
        return gone[:-1]

    def _kernels(self) -> Iterator[tuple[Use, int, Block]]:
        """Uses of prunable layers, each with its first kernel and its block."""
        for use, block in zip(self.units.uses, self.blocks, strict=True):
            start = -1 if block is None else int(self.network.graph.kernel_start[block.first])
            if block is not None and start >= 0:
                yield use, start, block


def find_channels(network: Network, units: Units) -> Channels:
    """The units that masks can remove.

    All that writes one must be prunable. What reads it is masked as well, or must find it zero: a
    layer that is left alone would see the constant that a sigmoid makes of a channel without
    kernels.
    """
    channels = Channels(network, units, _blocks(network, units))
    graph, left_alone = network.graph, []
    free = np.ones(units.count + 1, dtype=bool)
    for use, found in zip(units.uses, channels.blocks, strict=True):
        if use.is_norm or (found is not None and graph.kernel_start[found.first] >= 0):
            continue
        free[use.rows] = False
        if found is None:
            free[use.columns] = False
        else:
            left_alone.append((use, found))
    from ..selection.liveness import zero_channels  # here, because numba takes long to import

    before = -1
    while before != int(free[:-1].sum()):
        before = int(free[:-1].sum())
        zero = zero_channels(graph, channels.kept_kernels(free[:-1]))
        for use, block in left_alone:
            free[use.columns[~zero[_sources(network, use, block)]]] = False
    left = units.only(free[:-1], BESIDE)
    strangers = {layer.name for layer in graph.layers} - {use.layer for use in units.uses}
    reasons = {**dict.fromkeys(strangers, COMPUTED), **left.pinned}
    pinned = {layer.name: reasons[layer.name] for layer in graph.layers if layer.name in reasons}
    return replace(channels, units=replace(left, pinned={**pinned, **units.pinned}))


def ends(use: Use, block: Block) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The units that kernels write and read, shapes (groups, rows, 1) and (groups, 1, columns)."""
    columns = use.columns
    if block.weight.columns is not None:  # several features of a linear layer are of one channel
        columns = np.full(block.columns, -1)
        columns[block.weight.columns.numpy()] = use.columns
    shape = (use.groups, -1, 1)
    return use.rows.reshape(shape), columns.reshape(use.groups, 1, block.columns)


def _blocks(network: Network, units: Units) -> tuple[Block | None, ...]:
    """The block of every use: that of the same layer, the first of the first, and so on."""
    known: defaultdict[str, list[Block]] = defaultdict(list)
    for block in network.blocks:
        known[block.weight.layer_name].append(block)
    found: list[Block | None] = []
    for use in units.uses:
        own = [] if use.is_norm else known[use.layer][use.number : use.number + 1]
        found.append(own[0] if own and own[0].rows == len(use.rows) else None)
    return tuple(found)


def _sources(network: Network, use: Use, block: Block) -> NDArray[np.int32]:
    """The channel of the graph that stands at every column of a use."""
    graph, height = network.graph, block.rows // use.groups
    firsts = graph.source_start[block.first : block.first + block.rows : height]
    sources = np.concatenate([graph.sources[first : first + block.columns] for first in firsts])
    return sources if block.weight.columns is None else sources[block.weight.columns.numpy()]
