"""A few of the random networks that `python -m tests.fuzz` runs for an hour."""

from collections import Counter

from tests.support.fuzzing import fuzz


def test_random_networks_with_random_features_hold():
    outcomes: Counter[str] = Counter()
    fuzz(0, 25, outcomes)
    assert outcomes["smaller"] > 5
