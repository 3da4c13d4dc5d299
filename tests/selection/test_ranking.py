"""Kernels ranked one by one."""

import numpy as np

from fxlean.selection.ranking import fill_largest, kernel_scores
from tests.support.graphs import INPUT, Row, build


def test_the_scores_of_kernels_are_the_maxima_of_their_edges():
    rows = [INPUT, Row((0, 0), (1.0, 5.0), 0), Row((1, 0), (2.0, 3.0), 0), Row((2,), (9.0,))]
    graph = build(rows, [True, False, True])
    assert kernel_scores(graph).tolist() == [2.0, 5.0, 0.0]


def test_filling_takes_the_largest_and_of_equal_ones_the_first():
    keep = np.array([False, True, False, False, False, False])
    alive = np.array([True, True, True, True, True, False])
    fill_largest(keep, alive, np.array([1, 9, 2, 1, 1, 9], dtype=np.float32), 4)
    assert np.flatnonzero(keep).tolist() == [0, 1, 2, 3]
    fill_largest(keep, alive, np.zeros(6, dtype=np.float32), 9)
    assert np.array_equal(keep, alive)
