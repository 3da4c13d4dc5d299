"""Schedules: what each step keeps, going on with one, and one that nobody loops over."""

import copy
import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxlean
from tests.support.compare import same_state, state
from tests.support.zoo import make

pytestmark = pytest.mark.filterwarnings("ignore:the .* kernels that:fxlean.PruneWarning")


@given(st.floats(1e-4, 1), st.integers(1, 30))
def test_each_step_keeps_the_same_fraction_of_the_one_before(ratio, steps):
    found = [1.0, *fxlean.schedule(ratio, steps)]
    assert found[-1] == pytest.approx(ratio)
    assert len(found) == steps + 1
    for before, after in itertools.pairwise(found):
        assert after / before == pytest.approx(ratio ** (1 / steps))


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_a_schedule_that_was_broken_off_goes_on(start, tmp_path):
    model, inputs = make("residual_downsample")
    broken, _ = make("residual_downsample")
    whole = list(fxlean.iterate(model, 0.2, 4, inputs, method="l1"))
    for number, result in enumerate(fxlean.iterate(broken, 0.2, 4, inputs, method="l1")):
        if number == start:
            break
        assert result.kept == whole[number].kept
    broken, _ = make("residual_downsample")
    for ratio in fxlean.schedule(0.2, 4)[:start]:
        fxlean.prune(broken, ratio, inputs, method="l1")
    fxlean.save(broken, tmp_path / "model")
    loaded = fxlean.load(make("residual_downsample")[0], tmp_path / "model")
    rest = list(fxlean.iterate(loaded, 0.2, 4, inputs, start=start, method="l1"))
    assert [step.kept for step in rest] == [step.kept for step in whole[start:]]
    if rest:
        assert torch.equal(loaded(*inputs), model(*inputs))


@pytest.mark.parametrize("start", [-1, 4, 1.0, True, None])
def test_a_start_that_is_none_is_refused(start):
    model, inputs = make("residual")
    with pytest.raises(fxlean.ArgumentError, match=r"start is .* of the 3 steps are done"):
        fxlean.iterate(model, 0.5, 3, inputs, start=start)


def test_repair_cannot_go_on_without_the_unpruned_network():
    model, inputs = make("residual")
    with pytest.raises(fxlean.ArgumentError, match=r"fxlean\.schedule\(ratio, steps\)\[start:\]"):
        fxlean.iterate(model, 0.5, 3, inputs, start=1, repair=True)


def test_a_schedule_that_nobody_loops_over_warns_at_its_call_as_the_interpreter_exits(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, fxlean\n"
        "model, image = torch.nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 8, 8)\n"
        "steps = fxlean.iterate(model, 0.5, 2, image, prune_outputs=True)\n"
    )
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(fxlean.__file__).parents[1])},
        check=True,
    )
    assert f"{script}:3: PruneWarning: nothing was pruned" in done.stderr


def test_a_schedule_that_nobody_loops_over_is_noticed():
    model, inputs = make("plain")
    before = state(model)
    with pytest.warns(fxlean.PruneWarning, match="nothing was pruned: fxlean.iterate") as found:
        fxlean.iterate(model, 0.5, 3, inputs)
    assert found[0].filename == __file__
    assert same_state(before, model.state_dict())


def test_one_that_is_broken_off_is_not():
    model, inputs = make("plain")
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps = fxlean.iterate(model, 0.5, 3, inputs, method="path")
        next(steps)
        del steps
    fxlean.prune(other, fxlean.schedule(0.5, 3)[0], inputs, method="path")
    assert same_state(model.state_dict(), other.state_dict())
