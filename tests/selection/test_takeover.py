"""What others can take over, against least squares."""

import numpy as np
import pytest

from fxlean.selection.takeover import Reading, own_scores


def reading(values, units, flow):
    """What a layer reads, by the values of its channels, shape (channels, positions)."""
    return Reading(np.array(units), np.array(flow, dtype=float), np.atleast_2d(np.corrcoef(values)))


def unexplained(values, number, others):
    """The fraction of a channel's variance that least squares on others leaves."""
    centred = values - values.mean(axis=1, keepdims=True)
    target, given = centred[number], centred[others].T
    rest = target - given @ np.linalg.lstsq(given, target, rcond=None)[0]
    return rest.var() / target.var()


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_what_least_squares_on_greater_ones_leaves(seed):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((6, 6)) @ rng.standard_normal((6, 500))
    scores = rng.random(6) + 0.1
    own = own_scores(scores, [reading(values, range(6), scores)])
    order = np.argsort(-own)
    for place, number in enumerate(order):
        expected = scores[number] * unexplained(values, number, order[:place])
        assert own[number] == pytest.approx(expected, rel=0.1, abs=0.01 * scores.max())


def test_channels_that_stay_take_over_first():
    values = np.random.default_rng(0).standard_normal((2, 100))
    stays = reading(np.concatenate([values, values[:1]]), [0, 1, -1], [1, 1, 1])
    assert own_scores(np.array([9.0, 1.0]), [stays]) == pytest.approx([0, 1], abs=0.02)


def test_layers_count_by_what_flows_into_them():
    values = np.random.default_rng(0).standard_normal((2, 100))
    alone = reading(values[:1], [0], [3])
    beside_its_twin = reading(values[[1, 1]], [0, 1], [1, 1])
    own = own_scores(np.array([2.0, 5.0]), [alone, beside_its_twin])
    assert own == pytest.approx([2 * 3 / 4, 5], rel=0.01)


def test_what_no_layer_reads_and_what_does_not_vary_keeps_its_score():
    still = Reading(np.array([0, 1]), np.array([0.0, 1.0]), np.diag([0.0, 1.0]))
    assert own_scores(np.array([1.0, 2.0, 3.0]), [still]).tolist() == [1, 2, 3]
    assert own_scores(np.array([1.0]), []).tolist() == [1]
