"""Which part of a channel's score is its own, for others could take the rest over.

After pruning, `repair` lets what a layer still reads stand in for what it does not. What is lost
with a channel is then only what is no linear function of the channels that stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RIDGE = 1e-3  # of a channel's variance; less is no part of its own
PASSES = 3  # from then on hardly any order changes


@dataclass(frozen=True, eq=False)
class Reading:
    """What one application of a layer reads.

    Attributes:
        units: shape (n,), the unit of each of its channels; -1 for those that stay.
        flow: shape (n,), the scores of the kernels that read each, added up.
        correlations: shape (n, n), between the channels; 0 where one does not vary.
    """

    units: NDArray[np.int64]
    flow: NDArray[np.float64]
    correlations: NDArray[np.float64]


def own_scores(scores: NDArray[np.float64], readings: Sequence[Reading]) -> NDArray[np.float64]:
    """Scores of units, less what units of greater scores could take over.

    For every layer that reads a channel, that is the fraction of its variance that the best linear
    function of the channels before it gives, in the order of the results; fractions of several
    layers are averaged by what flows through them. The order is that of `scores` at first, then
    that of the results so far.

    A fraction that is left is a pivot of the Cholesky decomposition of the correlations.

    Args:
        scores: shape (units,), at least 0.
        readings: of layers; units that none of them reads keep their scores.

    >>> twins = Reading(np.arange(3), np.ones(3), np.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]))
    >>> own_scores(np.array([3.0, 2.0, 1.0]), [twins]).round(2).tolist()
    [3.0, 0.0, 1.0]
    """
    from scipy.linalg import cholesky  # here, because scipy takes long to import

    own = scores
    for _ in range(PASSES):
        worth = np.append(own, np.inf)
        left, whole = np.zeros_like(worth), np.zeros_like(worth)
        for reading in readings:
            order = np.argsort(-worth[reading.units], kind="stable")
            matrix = reading.correlations[np.ix_(order, order)]
            matrix.flat[:: len(order) + 1] += RIDGE
            factor = cholesky(matrix.T, lower=True, overwrite_a=True, check_finite=False)
            fractions = np.empty(len(order))
            fractions[order] = np.minimum(factor.diagonal() ** 2, 1.0)
            np.add.at(left, reading.units, reading.flow * fractions)
            np.add.at(whole, reading.units, reading.flow)
        own = scores * np.divide(left, whole, out=np.ones_like(left), where=whole > 0)[:-1]
    return own
