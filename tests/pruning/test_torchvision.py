"""Every model of torchvision, as it is and without example inputs.

Models above 150 M parameters run with `FXLEAN_LARGE_MODELS=1`.
"""

import pytest
import torchvision

import fxlean
from tests.support.torchvision_models import (
    ATTENTION,
    CHEAP_NORM,
    DETECTION,
    build,
    inputs_of,
    outcome,
)

NAMES = [n for n in torchvision.models.list_models() if not n.startswith("quantized_")]
pytestmark = pytest.mark.filterwarnings(
    "ignore::fxlean.PruneWarning",
    "ignore:The default weight initialization of:FutureWarning",
)


@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_pruned_as_it_is(name):
    model, size = build(name)
    norm = "l1" if size > CHEAP_NORM else "spectral"
    inputs = inputs_of(name)
    before = outcome(model, inputs)
    result = fxlean.prune(model, 0.1, norm=norm)
    budget = int(0.1 * result.total)
    assert budget <= result.selected <= budget + 1000  # plus at most the rest of one chain
    assert result.kept <= result.selected
    assert outcome(model, inputs) == before
    if not name.startswith(ATTENTION):
        assert not result.opaque_ops
    if name.startswith(DETECTION):
        pruned = {layer.name.split(".")[0] for layer in result.layers}
        assert {"backbone"} < pruned
