"""Whole channels: in which order units of channels go, by score per cost saved.

The cost of a network is a sum over its layers of

    product * rows * columns + linear * rows

with the numbers of channels that they still have, so what a unit saves falls with every other that
goes before it. Units that write and read the same numbers of channels of the same layers are one
class: all save the same, so that only the lowest score of each class competes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, inf

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Costs:
    """What a network costs, by the channels that its n uses of layers write and read.

    Attributes:
        rows, columns: for every use the unit of every channel; -1 for those that stay.
        product, linear: shape (n,), the factors of the cost.
        least: shape (n,), the smallest number of rows that each must keep.
    """

    rows: tuple[NDArray[np.int64], ...]
    columns: tuple[NDArray[np.int64], ...]
    product: NDArray[np.float64]
    linear: NDArray[np.float64]
    least: NDArray[np.int64]

    def total(self, gone: NDArray[np.bool_]) -> float:
        """The cost without some units, True where they are gone."""
        return self.of(np.arange(len(self.rows)), *self.left(gone))

    def left(self, gone: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many rows and columns every use has left without some units, each shape (n,)."""
        stays = np.append(~gone, True)
        sides = (self.rows, self.columns)
        rows, columns = (np.array([stays[u].sum() for u in s], dtype=np.int64) for s in sides)
        return rows, columns

    def of(
        self, uses: NDArray[np.int64], rows: NDArray[np.int64], columns: NDArray[np.int64]
    ) -> float:
        """What some uses cost with so many rows and columns, each shape (uses,)."""
        return float(self.product[uses] @ (rows * columns) + self.linear[uses] @ rows)


@dataclass(eq=False)
class _Class:
    """Units that save the same.

    Attributes:
        uses: numbers of the uses that it touches.
        rows, columns: how many of their channels one unit is.
        members: the units, the lowest score first.
        next: how many of them are gone.
    """

    uses: NDArray[np.int64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    members: NDArray[np.int64]
    next: int = 0


def removal_order(
    costs: Costs,
    scores: NDArray[np.float64],
    gone: NDArray[np.bool_],
    round_to: int = 1,
) -> Iterator[tuple[NDArray[np.int64], float]]:
    """Units in the order in which they go, and what the network costs after each step.

    Each step removes the units of least score per cost saved. The saving of what is left falls from
    step to step, so a value computed earlier is a lower bound, and a heap of them finds the least
    without looking at all. No layer loses its last channel.

    Args:
        costs: of the network.
        scores: shape (units,), at least 0.
        gone: shape (units,), True for units that are gone from the start.
        round_to: every step leaves a multiple of so many channels of each class of units.
    """
    rows, columns = costs.left(gone)
    least = np.maximum(costs.least, 1)

    def cost(uses: NDArray[np.int64]) -> float:
        return costs.of(uses, rows[uses], columns[uses])

    def value(group: _Class) -> float:
        """Score per cost saved of the next step of a class, infinite if there can be none."""
        members = _step(group, round_to)
        left = rows[group.uses] - len(members) * group.rows
        others = columns[group.uses] - len(members) * group.columns
        if not len(members) or (left < least[group.uses])[group.rows > 0].any() or others.min() < 1:
            return inf
        saved = cost(group.uses) - costs.of(group.uses, left, others)
        return float(scores[members].sum()) / saved if saved > 0 else inf

    total = costs.total(gone)
    classes = _classes(costs, scores, gone)
    heap = [(value(group), number) for number, group in enumerate(classes)]
    heapq.heapify(heap)
    while heap and heap[0][0] < inf:
        _, number = heapq.heappop(heap)
        group = classes[number]
        now = value(group)
        if heap and (now, number) > heap[0]:
            heapq.heappush(heap, (now, number))
            continue
        if now == inf:
            return
        members = _step(group, round_to)
        before = cost(group.uses)
        rows[group.uses] -= len(members) * group.rows
        columns[group.uses] -= len(members) * group.columns
        total -= before - cost(group.uses)
        group.next += len(members)
        yield members, total
        heapq.heappush(heap, (value(group), number))


def _step(group: _Class, round_to: int) -> NDArray[np.int64]:
    """The units of a class that go next: so many that a multiple of `round_to` channels stays."""
    most = int(max(group.rows.max(), group.columns.max()))
    multiple = round_to // gcd(round_to, most)
    left = len(group.members) - group.next
    count = left % multiple or multiple
    # The last ones stay, so that the number stays a multiple.
    count = 0 if multiple > 1 and count == left else count
    return group.members[group.next : group.next + count]


def _classes(costs: Costs, scores: NDArray[np.float64], gone: NDArray[np.bool_]) -> list[_Class]:
    """The classes of all units that are not gone."""
    touched: dict[int, list[tuple[int, int, int]]] = {}
    for number, (written, read) in enumerate(zip(costs.rows, costs.columns, strict=True)):
        counts = [np.bincount(units + 1, minlength=len(gone) + 1)[1:] for units in (written, read)]
        for unit in np.flatnonzero(counts[0] + counts[1]).tolist():
            part = (number, int(counts[0][unit]), int(counts[1][unit]))
            touched.setdefault(unit, []).append(part)
    members: dict[tuple[tuple[int, int, int], ...], list[int]] = {}
    for unit in sorted(touched):
        if not gone[unit]:
            members.setdefault(tuple(touched[unit]), []).append(unit)
    found = []
    for parts, units in members.items():
        uses, rows, columns = np.array(parts, dtype=np.int64).T
        order = np.argsort(scores[units], kind="stable")
        found.append(_Class(uses, rows, columns, np.array(units, dtype=np.int64)[order]))
    return found
