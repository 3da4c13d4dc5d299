"""The pruning methods: graph and budget in, keep mask out; one signature for all.

`METHODS` is the list of methods, and the documentation prints it. What needs numba is imported
inside the functions, see `jit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from ..channels.graph import ChannelGraph

SHARE = "share"
Select = Callable[[ChannelGraph, int, np.random.Generator], tuple[NDArray[np.bool_], int]]


@dataclass(frozen=True)
class Method:
    """How a method chooses kernels, and the lengths that it wants to choose by.

    Attributes:
        select: takes graph, budget and random generator; returns a keep mask over the kernels
            and the number of chains (0 for methods that rank kernels one by one). Only alive
            kernels are kept: at least `budget` of them, or all if there are fewer.
        description: one line for the documentation.
        norm: the kernel norm that belongs to the method; None for whichever the user asked for.
            `SHARE` stands for shares of variance, which only batches or noise can tell.
        gains: whether gains, those of batch norms among them, multiply the lengths.
    """

    select: Select
    description: str
    norm: str | None = None
    gains: bool = True


def _lean(
    graph: ChannelGraph, budget: int, rng: np.random.Generator
) -> tuple[NDArray[np.bool_], int]:
    """Kernels on the longest chains."""
    from .chains import longest_chains

    return longest_chains(graph, budget)


def _path(
    graph: ChannelGraph, budget: int, rng: np.random.Generator
) -> tuple[NDArray[np.bool_], int]:
    """Kernels on the longest complete chains."""
    from .paths import complete_paths

    return complete_paths(graph, budget)


def _largest(
    graph: ChannelGraph, budget: int, rng: np.random.Generator
) -> tuple[NDArray[np.bool_], int]:
    """Kernels of largest length, exactly `budget` of them."""
    from .ranking import fill_largest, kernel_scores

    keep = np.zeros(graph.num_kernels, dtype=bool)
    fill_largest(keep, graph.alive, kernel_scores(graph), budget)
    return keep, 0


def _relevant(
    graph: ChannelGraph, budget: int, rng: np.random.Generator
) -> tuple[NDArray[np.bool_], int]:
    """Kernels through which most of the outputs flows, those that connect nothing left out."""
    from .relevance import most_relevant

    return most_relevant(graph, budget), 0


def _random(
    graph: ChannelGraph, budget: int, rng: np.random.Generator
) -> tuple[NDArray[np.bool_], int]:
    """Kernels drawn uniformly, exactly `budget` of them."""
    from .ranking import fill_largest

    keep = np.zeros(graph.num_kernels, dtype=bool)
    fill_largest(keep, graph.alive, rng.random(graph.num_kernels), budget)
    return keep, 0


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "lean": Method(_lean, "longest disjoint chains of kernels, found greedily"),
        "path": Method(_path, "longest chains from the model's inputs to its outputs"),
        "relevance": Method(
            _relevant, "kernels through which most of the outputs flows, on batches", norm=SHARE
        ),
        "spectral": Method(_largest, "kernels with the largest norm", norm="spectral"),
        "l1": Method(
            _largest, "kernels with the largest sum of absolute weights", norm="l1", gains=False
        ),
        # Reads no lengths: those of l1 cost the least.
        "random": Method(_random, "kernels drawn at random, as a baseline", norm="l1", gains=False),
    }
)
