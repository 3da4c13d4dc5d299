"""Models on another device than the CPU, and another default device than the CPU."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.backend_registration

import fxlean
from tests.support.zoo import ZOO, make

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot register a device that is written in Python",
)
def test_a_device_that_refuses_to_meet_the_cpu():
    # In a process of its own, because the device stays registered.
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.toy_device"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name}: same" for name in sorted(ZOO)]


@pytest.mark.filterwarnings(
    "ignore::fxlean.PruneWarning",
    "ignore:.* keeps its size, for (every|its):fxlean.CompactionWarning",
)
@pytest.mark.parametrize("method", ["lean", "random"])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_default_device_makes_no_difference(name, method):
    # Anything that is made on the meta device by mistake has no numbers.
    model, inputs = make(name)
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    fxlean.prune(model, 0.5, inputs, method=method)
    expected = fxlean.compact(model, inputs)
    torch.set_default_device("meta")
    try:
        torch.manual_seed(0)
        fxlean.prune(twin, 0.5, inputs, method=method)
        small = fxlean.compact(twin, inputs)
    finally:
        torch.set_default_device(None)
    for pruned, reference in ((twin, model), (small, expected)):
        found = pruned.state_dict()
        assert found.keys() == reference.state_dict().keys()
        for key, tensor in reference.state_dict().items():
            assert torch.equal(found[key], tensor), key
