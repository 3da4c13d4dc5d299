"""Whole channels: in which order units of channels go, by score per cost saved.

The cost of a network is a sum over its layers of

    product * rows * columns + linear * rows

with the numbers of channels that they still have, so what a unit saves falls with every other that
goes before it. Units that write and read the same numbers of channels of the same layers are one
class: all save the same, so that only the lowest score of each class competes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, lcm

import numpy as np
from numpy.typing import NDArray

WIDE = 16  # channels of wide layers go in so many, which is what vector units compute in,
FINE = 64  # and one by one where no more are left


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
        rows, columns = self.left(gone)
        return float(self.product @ (rows * columns) + self.linear @ rows)

    def left(self, gone: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many rows and columns every use has left without some units, each shape (n,)."""
        stays = np.append(~gone, True)
        sides = (self.rows, self.columns)
        rows, columns = (np.array([stays[u].sum() for u in s], dtype=np.int64) for s in sides)
        return rows, columns


@dataclass(eq=False)
class _Class:
    """Units that save the same.

    Attributes:
        uses: numbers of the uses that it touches.
        rows, columns: how many of their channels one unit is.
        least: how many rows they must keep if any of them go.
        product, linear: factors of their cost.
        members: the units, the lowest score first.
        multiple: the number of units that stay is a multiple of it,
        fine: unless so few are left, which go one by one.
        next: how many of them are gone.
    """

    uses: NDArray[np.int64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    least: NDArray[np.int64]
    product: NDArray[np.float64]
    linear: NDArray[np.float64]
    members: NDArray[np.int64]
    multiple: int
    fine: int
    next: int = 0

    def step(self) -> NDArray[np.int64]:
        """The units that go next: so many that a multiple stays, above 1 never nothing."""
        left = len(self.members) - self.next
        if left <= self.fine:
            return self.members[self.next : self.next + 1]
        count = left % self.multiple or self.multiple
        count = 0 if self.multiple > 1 and count == left else count
        return self.members[self.next : self.next + count]


def removal_order(
    costs: Costs,
    scores: NDArray[np.float64],
    gone: NDArray[np.bool_],
    round_to: int | None = 1,
) -> Iterator[tuple[NDArray[np.int64], float]]:
    """Units in the order in which they go, and what the network costs after each step.

    Each step removes the units of least score per cost saved. The saving of what is left falls from
    step to step, so a value computed earlier is a lower bound, and a heap of them finds the least
    without looking at all. No layer loses its last channel.

    Args:
        costs: of the network.
        scores: shape (units,), at least 0.
        gone: shape (units,), True for units that are gone from the start.
        round_to: every step leaves a multiple of so many channels of each class of units; if None,
            of `WIDE` where more than `FINE` were left.
    """
    rows, columns = costs.left(gone)

    def value(group: _Class) -> tuple[float, float]:
        """Score per cost saved of the next step of a class, infinite if none, and that saving."""
        members = group.step()
        before, read = rows[group.uses], columns[group.uses]
        after = before - len(members) * group.rows
        others = read - len(members) * group.columns
        if not len(members) or (after < group.least).any() or (others[group.columns > 0] < 1).any():
            return inf, 0.0
        saved = group.product @ (before * read - after * others) + group.linear @ (before - after)
        return float(scores[members].sum() / saved) if saved > 0 else inf, float(saved)

    total = costs.total(gone)
    classes = _classes(costs, scores, gone, round_to)
    heap = [(value(group)[0], number) for number, group in enumerate(classes)]
    heapq.heapify(heap)
    while heap and heap[0][0] < inf:
        _, number = heapq.heappop(heap)
        group = classes[number]
        now, saved = value(group)
        if heap and (now, number) > heap[0]:
            heapq.heappush(heap, (now, number))
            continue
        if now == inf:
            return
        members = group.step()
        rows[group.uses] -= len(members) * group.rows
        columns[group.uses] -= len(members) * group.columns
        total -= saved
        group.next += len(members)
        yield members, total
        heapq.heappush(heap, (value(group)[0], number))


def alike(
    rows: Sequence[NDArray[np.int64]],
    columns: Sequence[NDArray[np.int64]],
    among: NDArray[np.bool_],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Units that write and read as many channels of the same uses, class by class.

    Args:
        rows: for every use the unit of every channel that it writes; -1 for channels of none.
        columns: the same for those that it reads.
        among: shape (units,), True for those that are wanted.

    Returns:
        The units of each class, and for each use that they touch its number and how many of its
        rows and columns one of them is, shape (3, uses).
    """
    parts = [np.zeros((4, 0), dtype=np.int64)]  # a unit, a use, and how many rows and columns
    for number, sides in enumerate(zip(rows, columns, strict=True)):
        counts = np.stack([np.bincount(ids + 1, minlength=len(among) + 1)[1:] for ids in sides])
        places = np.flatnonzero(counts.any(0))
        parts.append(np.vstack([places, np.full_like(places, number), counts[:, places]]))
    touched = np.concatenate(parts, axis=1)
    touched = touched[:, np.argsort(touched[0], kind="stable")]
    starts = np.searchsorted(touched[0], np.arange(len(among) + 1))
    members: dict[bytes, list[int]] = {}
    for unit in np.flatnonzero(among & (np.diff(starts) > 0)).tolist():
        own = touched[1:, starts[unit] : starts[unit + 1]]
        members.setdefault(own.tobytes(), []).append(unit)
    for units in members.values():
        yield np.array(units), touched[1:, starts[units[0]] : starts[units[0] + 1]]


def _classes(
    costs: Costs, scores: NDArray[np.float64], gone: NDArray[np.bool_], round_to: int | None
) -> list[_Class]:
    """The classes of all units that are not gone."""
    found = []
    for units, (uses, rows, columns) in alike(costs.rows, costs.columns, ~gone):
        counts = np.concatenate([rows, columns])
        counts = counts[counts > 0]  # channels of a unit, in every layer
        multiple = lcm(*((round_to or WIDE) // np.gcd(round_to or WIDE, counts)).tolist())
        found.append(
            _Class(
                uses,
                rows,
                columns,
                np.where(rows > 0, np.maximum(costs.least[uses], 1), 0),
                costs.product[uses],
                costs.linear[uses],
                units[np.argsort(scores[units], kind="stable")],
                multiple,
                0 if round_to else max(FINE // int(counts.min()), multiple),
            )
        )
    return found
