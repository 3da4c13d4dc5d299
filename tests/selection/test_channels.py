"""The order in which units go, against plain greedy removal with exact costs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxlean.selection.channels import Costs, removal_order


@st.composite
def networks(draw):
    """Costs of a few layers, and scores of the units of their channels."""
    count = draw(st.integers(1, 8))
    unit = st.integers(-1, count - 1)
    sides = [
        tuple(np.array(draw(st.lists(unit, min_size=1, max_size=10))) for _ in range(2))
        for _ in range(draw(st.integers(1, 4)))
    ]
    rows, columns = zip(*sides, strict=True)
    product, linear = (
        np.array(draw(st.lists(st.integers(0, 5), min_size=len(sides), max_size=len(sides))), float)
        for _ in range(2)
    )
    least = np.array([draw(st.integers(0, len(own))) for own in rows])
    scores = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    gone = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    costs = Costs(rows, columns, product, linear, least)
    # Scores that differ, for ties are told apart by the class of a unit first.
    return costs, np.array(scores) + np.arange(count) * 1e-3, np.array(gone)


def total(costs, gone):
    """The cost of every layer with the channels that are left, added up."""
    result = 0.0
    for number, (rows, columns) in enumerate(zip(costs.rows, costs.columns, strict=True)):
        written = sum(unit < 0 or not gone[unit] for unit in rows)
        read = sum(unit < 0 or not gone[unit] for unit in columns)
        result += costs.product[number] * written * read + costs.linear[number] * written
    return result


def greedy(costs, scores, gone):
    """Again and again the unit of least score per cost saved that may go."""
    gone, order = gone.copy(), []
    while True:
        best = None
        for unit in np.flatnonzero(~gone):
            without = gone.copy()
            without[unit] = True
            touched = [
                number
                for number, sides in enumerate(zip(costs.rows, costs.columns, strict=True))
                if any(unit in side for side in sides)
            ]
            mine = Costs(*[[part[n] for n in touched] for part in vars(costs).values()])
            saved = total(costs, gone) - total(costs, without)
            if saved > 0 and allowed_after(mine, gone, without):
                value = (scores[unit] / saved, unit)
                best = value if best is None or value < best else best
        if best is None:
            return order
        gone[best[1]] = True
        order.append((best[1], total(costs, gone)))


def allowed_after(costs, gone, without):
    """Whether what was allowed still is; a layer that falls short already may not lose a row."""
    for number, (rows, columns) in enumerate(zip(costs.rows, costs.columns, strict=True)):
        before, after = (
            [sum(unit < 0 or not flags[unit] for unit in side) for side in (rows, columns)]
            for flags in (gone, without)
        )
        if after[0] < before[0] and after[0] < max(1, costs.least[number]):
            return False
        if after[1] < before[1] and after[1] < 1:
            return False
    return True


@given(networks())
def test_units_go_as_in_plain_greedy_removal(network):
    costs, scores, gone = network
    found = [(int(unit), cost) for (unit,), cost in removal_order(costs, scores, gone)]
    expected = greedy(costs, scores, gone)
    assert [cost for _, cost in found] == pytest.approx([cost for _, cost in expected])
    assert [unit for unit, _ in found] == [unit for unit, _ in expected]


@given(networks(), st.integers(1, 5))
def test_every_step_leaves_a_multiple(network, multiple):
    costs, scores, gone = network
    gone = gone.copy()
    for members, cost in removal_order(costs, scores, gone.copy(), multiple):
        assert not gone[members].any()
        gone[members] = True
        assert cost == pytest.approx(total(costs, gone))
        assert costs.total(gone) == pytest.approx(cost)


@given(networks())
def test_narrow_layers_are_not_rounded_by_default(network):
    found = [(list(members), cost) for members, cost in removal_order(*network, None)]
    assert found == [(list(members), cost) for members, cost in removal_order(*network, 1)]


@pytest.mark.parametrize(("width", "multiple", "fine"), [(1, 8, 64), (3, 8, 21), (6, 4, 10)])
def test_wide_layers_keep_multiples_of_8_by_default(width, multiple, fine):
    count = 100
    costs = Costs(
        (np.repeat(np.arange(count), width),),
        *((np.full(3, -1),), np.ones(1), np.zeros(1), np.zeros(1, int)),
    )
    gone = np.zeros(count, dtype=bool)
    steps = [len(m) for m, _ in removal_order(costs, np.arange(float(count)), gone, None)]
    left = count - np.cumsum([0, *steps])
    assert {int(n) % multiple for n in left[1:] if n > fine} == {0}
    assert list(left[left <= fine]) == list(range(left[left <= fine][0], 0, -1))


def test_a_layer_by_itself_keeps_a_multiple():
    costs = Costs((np.arange(20),), (np.full(3, -1),), np.ones(1), np.zeros(1), np.zeros(1, int))
    gone = np.zeros(20, dtype=bool)
    sizes = [len(units) for units, _ in removal_order(costs, np.arange(20.0), gone, 8)]
    assert sizes == [4, 8]
