"""Targets: what is kept when a network may cost a fraction of what it does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..channels.graph import ChannelGraph
from ..costs import LayerCost
from ..errors import ArgumentError, by_reason
from ..selection.channels import Costs, removal_order
from ..selection.methods import Method
from ..tracing.arguments import public_name, resolve_ignored
from .channels import Channels, Flags, ends
from .prunable import Network

COUNTED = ("kernels", "parameters", "macs")
CLOSE = 0.005  # a measured target is met within this fraction of it
TRIALS = 12


@dataclass(frozen=True)
class Target:
    """What is to be left of a network.

    Attributes:
        ratio: the fraction that is left.
        of: what it is a fraction of: one of `COUNTED`, or a function that measures a model.
        least: the fraction of a layer's kernels or channels that stays at least, by its name; 0 for
            layers that are not mentioned.
        round_to: numbers of channels are multiples of it; see `removal_order`.
    """

    ratio: float
    of: str | Callable[[nn.Module], float]
    least: Mapping[str, float]
    round_to: int | None = None


def least_of(model: nn.Module, at_least: Any, layers: Sequence[str]) -> dict[str, float]:
    """The fraction that stays at least, by the name of the layer, from a fraction or a mapping."""
    if not isinstance(at_least, Mapping):
        return dict.fromkeys(layers, 0.0 if at_least is None else float(at_least))
    found = dict.fromkeys(layers, 0.0)
    for pattern, fraction in at_least.items():
        names = resolve_ignored(model, [pattern], "at_least")
        # A weight of no layer is a layer by its own name.
        inside = {
            layer
            for layer in layers
            for name in names
            if name.startswith(f"{layer}.") or public_name(name) == layer
        }
        found |= dict.fromkeys(inside, float(fraction))
    return found


@dataclass(frozen=True, eq=False)
class Problem:
    """What a choice is made from.

    Attributes:
        network: what there is to prune, with lengths in its graph.
        method: how to choose.
        generator: for a method that draws.
        target: what is to be left.
        overlaps: of what layers read, see `shares_of`; empty if the method does not ask data.
    """

    network: Network
    method: Method
    generator: np.random.Generator
    target: Target
    overlaps: Mapping[int, NDArray[np.float64]]

    def select(self, budget: int) -> tuple[Flags, int]:
        """Kernels to keep, and the number of chains."""
        return self.method.select(self.network.graph, budget, self.generator)

    def scores(self) -> NDArray[np.floating]:
        """What every kernel is worth."""
        return self.method.scores(self.network.graph, self.generator)


def kernels_within(
    problem: Problem, layer_costs: Sequence[LayerCost], measured: Callable[[Flags], float]
) -> tuple[Flags, int]:
    """Kernels to keep, and the number of chains, so that what they cost is within a target.

    Methods that extract chains choose as many kernels as fit; the others rank by score over cost.

    Args:
        problem: what to choose from.
        layer_costs: of the layers of the network.
        measured: the fraction that a keep mask leaves of what the target measures.
    """
    graph, target = problem.network.graph, problem.target
    if target.of == "kernels" and not any(target.least.values()):
        return problem.select(int(target.ratio * graph.num_kernels))
    counted = isinstance(target.of, str)
    costs = _kernel_costs(problem.network, layer_costs, str(target.of) if counted else "macs")
    scores = problem.scores()
    forced = _forced(graph, scores, target.least)
    rank = scores / np.maximum(costs, 1e-12)
    order = np.lexsort((np.arange(len(rank)), -rank, ~forced))
    order = order[graph.alive[order]]
    chains = 0

    def chosen(budget: int) -> Flags:
        nonlocal chains
        if problem.method.chains:
            keep, chains = problem.select(budget)
            return keep | forced
        keep = forced.copy()
        keep[order[:budget]] = True
        return keep

    def left(budget: int) -> float:
        keep = chosen(budget)
        return float(costs @ keep / costs.sum()) if counted else measured(keep)

    budget = _largest_within(left, len(order), target.ratio, "kernels", target.of)
    return chosen(budget), chains


def units_within(
    channels: Channels,
    scores: NDArray[np.float64],
    target: Target,
    totals: Mapping[str, float],
    measured: Callable[[Flags], float],
) -> Flags:
    """Units to remove, True where they go, so that what is left costs no more than a target.

    Args:
        channels: of the network.
        scores: shape (units,), what each is worth.
        target: what is to be left.
        totals: what the whole network costs, by the names in `COUNTED`.
        measured: the fraction that is left without some units of what the target measures.
    """
    of = target.of if isinstance(target.of, str) else "macs"
    costs = unit_costs(channels, of, target.least)
    gone = channels.gone()
    reasons = "; ".join(by_reason({**channels.network.skipped, **channels.units.pinned}))
    pinned = f" (all channels stay of {reasons})" if reasons else ""
    fixed = totals[of] - costs.total(np.zeros_like(gone))
    steps = removal_order(costs, scores, gone, target.round_to)
    if isinstance(target.of, str):
        limit, left = target.ratio * totals[of], fixed + costs.total(gone)
        for members, total in steps:
            if left <= limit:
                break
            gone[members] = True
            left = fixed + total
        if left > limit * (1 + 1e-9):
            raise _unreachable(target.of, target.ratio, left / totals[of], "channels", pinned)
        return gone
    removed = [members for members, _ in steps]

    def without(count: int) -> Flags:
        result = gone.copy()
        result[list(itertools.chain(*removed[:count]))] = True
        return result

    def after(kept: int) -> float:
        return measured(without(len(removed) - kept))

    kept = _largest_within(after, len(removed), target.ratio, "channels", target.of, pinned)
    return without(len(removed) - kept)


def unit_costs(channels: Channels, of: str, least: Mapping[str, float]) -> Costs:
    """The kernels, parameters or multiply-accumulates of every use, by its rows and columns."""
    uses = channels.units.uses
    product, linear, fewest = (np.zeros(len(uses)) for _ in range(3))
    columns = [use.columns for use in uses]
    graph = channels.network.graph
    for number, (use, block) in enumerate(zip(uses, channels.blocks, strict=True)):
        if of == "kernels":
            prunable = block is not None and graph.kernel_start[block.first] >= 0
            each = float(prunable and use.number == 0)
            if each and block is not None:
                columns[number] = ends(use, block)[1].reshape(-1)
        else:
            each = float(use.work if of == "macs" else use.elements)
        if use.groups == 1:
            product[number] = each
        else:
            linear[number] = each * len(columns[number]) / use.groups
        linear[number] += use.vectors * (of == "parameters")
        fewest[number] = (
            0 if use.is_norm else ceil(least.get(use.layer, 0.0) * len(use.rows) - 1e-9)
        )
    others = channels.units.tensors.values() if of == "parameters" else ()
    none = np.zeros(len(others))
    return Costs(
        (*(use.rows for use in uses), *(units for _, _, units in others)),
        (*columns, *[np.array([-1])] * len(others)),
        np.append(product, none),
        np.append(linear, [each for _, each, _ in others]),
        np.append(fewest, none).astype(np.int64),
    )


def _kernel_costs(
    network: Network, layer_costs: Sequence[LayerCost], of: str
) -> NDArray[np.float64]:
    """What every kernel costs, shape (k,)."""
    graph, known = network.graph, {cost.name: cost for cost in layer_costs}
    costs = np.ones(graph.num_kernels)
    if of == "kernels":
        return costs
    for layer, weight in zip(graph.layers, network.weights, strict=True):
        elements = np.full(layer.columns, weight.value.numel() / layer.rows / layer.columns)
        if weight.columns is not None:
            elements = np.bincount(weight.columns.numpy()).astype(np.float64)
        cost = known[layer.name]
        factor = cost.macs / cost.parameters if of == "macs" else 1.0
        costs[layer.kernels] = np.tile(factor * elements, layer.rows)
    return costs


def _forced(graph: ChannelGraph, scores: NDArray[np.floating], least: Mapping[str, float]) -> Flags:
    """The best kernels of every layer, as many as it keeps at least."""
    forced = np.zeros(graph.num_kernels, dtype=bool)
    for layer in graph.layers:
        count = ceil(least.get(layer.name, 0.0) * layer.rows * layer.columns - 1e-9)
        own = np.where(graph.alive[layer.kernels], scores[layer.kernels], -np.inf)
        best = np.argsort(-own, kind="stable")[: min(count, int(graph.alive[layer.kernels].sum()))]
        forced[layer.start + best] = True
    return forced


def _largest_within(
    left: Callable[[int], float],
    most: int,
    ratio: float,
    what: str,
    of: str | Callable[[nn.Module], float],
    pinned: str = "",
) -> int:
    """The largest number, up to `most`, for which no more than `ratio` is left, nearly.

    What is left grows with the number, nearly in proportion: so guess, and halve what is open.
    """
    if ratio == 1 or left(most) <= ratio:
        return most
    low, high = 0, most
    below, above = left(low), 1.0
    if below > ratio:
        raise _unreachable(of, ratio, below, what, pinned)
    for trial in range(TRIALS if callable(of) else 4 * TRIALS):
        if high - low <= 1 or below >= ratio * (1 - CLOSE):
            break
        share = (ratio - below) / (above - below) if trial % 3 < 2 and above > below else 0.5
        middle = min(high - 1, max(low + 1, round(low + share * (high - low))))
        found = left(middle)
        if found <= ratio:
            low, below = middle, found
        else:
            high, above = middle, found
    return low


def _unreachable(of: Any, ratio: float, least: float, what: str, pinned: str) -> ArgumentError:
    name = of if isinstance(of, str) else getattr(of, "__name__", "cost")
    return ArgumentError(
        f"ratio is {ratio:g}, but {least:.1%} of the {name} stay when all {what} are gone that may "
        f"go{pinned}. Pass a ratio of at least {least + 5e-4:.3f}, or free more: with less in "
        "at_least, ignore or round_to."
    )
