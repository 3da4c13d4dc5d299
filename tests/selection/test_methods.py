"""The methods share one signature, and each keeps what its description says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxlean.channels.graph import ChannelGraph, Kind
from fxlean.selection.chains import longest_chains
from fxlean.selection.methods import METHODS
from fxlean.selection.paths import complete_paths

RANKED = ("spectral", "l1", "random")  # these keep the budget exactly


def two_layers(lengths: np.ndarray, alive: np.ndarray) -> ChannelGraph:
    """Three inputs, four channels, two outputs; the 20 kernels have the given lengths."""
    sizes = np.array([0] * 3 + [3] * 4 + [4] * 2)
    starts = np.cumsum(sizes) - sizes
    return ChannelGraph(
        kinds=np.array([Kind.LIVE] * 3 + [Kind.SUM] * 6, dtype=np.uint8),
        sizes=sizes,
        source_start=np.array([0] * 7 + [3] * 2),
        length_start=starts,
        kernel_start=np.where(sizes > 0, starts, -1),
        sources=np.arange(7, dtype=np.int32),
        lengths=lengths.astype(np.float32),
        outputs=np.arange(9) >= 7,
        opaque=np.zeros(9, dtype=bool),
        ties=np.arange(9, dtype=np.int32),
        alive=alive,
    )


@st.composite
def graphs(draw: st.DrawFn) -> ChannelGraph:
    """Two layers with random lengths, some equal and some 0, and some kernels not alive."""
    lengths = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=20, max_size=20))
    alive = draw(st.lists(st.sampled_from([True, True, True, False]), min_size=20, max_size=20))
    return two_layers(np.array(lengths), np.array(alive))


def select(name: str, graph: ChannelGraph, budget: int, seed: int = 0) -> np.ndarray:
    """The keep mask of a method; its form is checked."""
    keep, chains = METHODS[name].select(graph, budget, np.random.default_rng(seed))
    assert keep.shape == (graph.num_kernels,)
    assert keep.dtype == np.bool_
    assert isinstance(chains, int)
    assert name not in RANKED or chains == 0
    return keep


def test_there_are_the_methods_of_the_documentation():
    assert list(METHODS) == ["lean", "path", "relevance", "spectral", "l1", "random"]
    assert all(method.description for method in METHODS.values())
    assert {name: method.norm for name, method in METHODS.items() if method.norm} == {
        "relevance": "share",
        "spectral": "spectral",
        "l1": "l1",
        "random": "l1",
    }
    assert [name for name, method in METHODS.items() if not method.gains] == ["l1", "random"]


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError, match="does not support item assignment"):
        METHODS["mine"] = METHODS["lean"]


@pytest.mark.parametrize("name", METHODS)
@settings(derandomize=True, deadline=None)
@given(graph=graphs(), budget=st.integers(0, 22))
def test_every_method_keeps_its_budget_and_only_alive_kernels(name, graph, budget):
    before = graph.alive.copy()
    keep = select(name, graph, budget)
    expected = min(budget, int(np.count_nonzero(before)))
    kept = int(np.count_nonzero(keep))
    assert kept == expected if name in RANKED or budget == 0 else kept >= expected
    assert not np.any(keep & ~before)
    assert np.array_equal(graph.alive, before)
    assert np.array_equal(select(name, graph, budget), keep)


@pytest.mark.parametrize("name", ["spectral", "l1"])
@settings(derandomize=True, deadline=None)
@given(graph=graphs(), budget=st.integers(0, 20))
def test_ranking_keeps_the_largest_and_of_equal_ones_the_first(name, graph, budget):
    alive = np.flatnonzero(graph.alive).tolist()
    expected = sorted(alive, key=lambda kernel: (-graph.lengths[kernel], kernel))[:budget]
    assert np.flatnonzero(select(name, graph, budget)).tolist() == sorted(expected)


def test_random_keeps_every_alive_kernel_equally_often():
    alive = np.arange(20) % 4 > 0
    graph = two_layers(np.zeros(20), alive)
    counts = sum(select("random", graph, 6, seed).astype(int) for seed in range(2000))
    assert np.all(counts[~alive] == 0)
    assert np.all(np.abs(counts[alive] - 800) < 4 * np.sqrt(2000 * 0.4 * 0.6))


def test_lean_and_path_are_the_functions_of_their_modules():
    generator = np.random.default_rng(3)
    graph = two_layers(np.exp(generator.normal(0, 1, 20)), np.ones(20, dtype=bool))
    for name, function in (("lean", longest_chains), ("path", complete_paths)):
        keep, chains = METHODS[name].select(graph, 5, generator)
        expected, count = function(graph, 5)
        assert np.array_equal(keep, expected)
        assert chains == count > 0
