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
# A string, for to import numpy.random takes a tenth of the time of importing fxlean.
Scores = Callable[[ChannelGraph, "np.random.Generator"], NDArray[np.floating]]
Select = Callable[[ChannelGraph, int, "np.random.Generator"], tuple[NDArray[np.bool_], int]]


@dataclass(frozen=True)
class Method:
    """How a method chooses kernels, and the lengths that it wants to choose by.

    Attributes:
        select: takes graph, budget and random generator; returns a keep mask over the kernels
            and the number of chains (0 for methods that rank kernels one by one). Only alive
            kernels are kept: at least `budget` of them, or all if there are fewer.
        description: one line for the documentation.
        scores: takes graph and random generator; returns what each kernel is worth, at least 0,
            which ranks whole channels, and kernels that cost unequally.
        chains: whether kernels are chosen chain by chain. The score of a channel is the largest of
            the kernels that write it, else their sum.
        norm: the kernel norm that belongs to the method; None for whichever the user asked for.
            `SHARE` stands for shares of variance, which only batches or noise can tell.
        gains: whether gains, those of batch norms among them, multiply the lengths.
    """

    select: Select
    description: str
    scores: Scores
    chains: bool = False
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


def _chain_scores(complete: bool) -> Scores:
    """The length of the longest chain through each kernel."""

    def scores(graph: ChannelGraph, rng: np.random.Generator) -> NDArray[np.floating]:
        from .paths import chain_scores

        return chain_scores(graph, complete=complete)

    return scores


def _lengths(graph: ChannelGraph, rng: np.random.Generator) -> NDArray[np.floating]:
    """The length of each kernel."""
    from .ranking import kernel_scores

    return kernel_scores(graph)


def _relevances(graph: ChannelGraph, rng: np.random.Generator) -> NDArray[np.floating]:
    """How much of the outputs flows through each kernel."""
    from .relevance import kernel_relevance

    return kernel_relevance(graph)


def _draws(graph: ChannelGraph, rng: np.random.Generator) -> NDArray[np.floating]:
    """A random number for each kernel."""
    return rng.random(graph.num_kernels)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "lean": Method(
            _lean,
            "longest disjoint chains of kernels, found greedily",
            _chain_scores(complete=False),
            chains=True,
        ),
        "path": Method(
            _path,
            "longest chains from the model's inputs to its outputs",
            _chain_scores(complete=True),
            chains=True,
        ),
        "relevance": Method(
            _relevant,
            "kernels through which most of the outputs flows, on batches",
            _relevances,
            norm=SHARE,
        ),
        "spectral": Method(_largest, "kernels with the largest norm", _lengths, norm="spectral"),
        "l1": Method(
            _largest,
            "kernels with the largest sum of absolute weights",
            _lengths,
            norm="l1",
            gains=False,
        ),
        # Reads no lengths: those of l1 cost the least.
        "random": Method(
            _random, "kernels drawn at random, as a baseline", _draws, norm="l1", gains=False
        ),
    }
)
