"""Every model of torchvision, as it is and without example inputs.

Models above 150 M parameters run with `FXLEAN_LARGE_MODELS=1`.
"""

import inspect
import os

import pytest
import torch
import torchvision
from torch.utils._pytree import tree_flatten

import fxlean

LARGE = 150e6
# The largest models, for whose weights a small machine has no time: what pruning sees of them
# does not depend on the norm, so they are pruned by the cheapest one.
CHEAP_NORM = 50e6
DETECTION = ("fasterrcnn", "fcos", "keypointrcnn", "maskrcnn", "retinanet", "ssd")
ATTENTION = ("maxvit", "mvit", "raft", "ssd300", "swin", "vit")
SIZES = {
    "inception": (1, 3, 96, 96),
    "maxvit": (1, 3, 224, 224),
    "mc3": (1, 3, 8, 64, 64),
    "mvit": (1, 3, 16, 224, 224),
    "r2plus1d": (1, 3, 8, 64, 64),
    "r3d": (1, 3, 8, 64, 64),
    "raft": (1, 3, 128, 128),
    "s3d": (1, 3, 16, 224, 224),
    "swin3d": (1, 3, 4, 64, 64),
    "vit": (1, 3, 224, 224),
}
NAMES = [n for n in torchvision.models.list_models() if not n.startswith("quantized_")]
pytestmark = pytest.mark.filterwarnings(
    "ignore::fxlean.PruneWarning",
    "ignore:The default weight initialization of:FutureWarning",
)


def build(name):
    """The model with random weights, skipped where it is too large to be pruned by default."""
    torch.manual_seed(0)
    builder = torchvision.models.get_model_builder(name)
    model = builder(weights=None, **backbone(builder))
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > LARGE and not os.environ.get("FXLEAN_LARGE_MODELS"):
        pytest.skip(f"{name} has {size / 1e6:.0f} M parameters; FXLEAN_LARGE_MODELS=1 runs it")
    return model, size


def backbone(builder):
    takes = inspect.signature(builder).parameters
    return {"weights_backbone": None} if "weights_backbone" in takes else {}


def inputs_of(name):
    if name.startswith(DETECTION):
        return ([torch.rand(3, 64, 64)],)
    shape = next((s for key, s in SIZES.items() if name.startswith(key)), (1, 3, 64, 64))
    return (torch.rand(shape),) * (2 if name.startswith("raft") else 1)


def outcome(model, inputs):
    """The structure of the output, and the shapes in it but for the number of detections."""
    with torch.no_grad():
        leaves, spec = tree_flatten(model.eval()(*inputs))
    return spec, [(leaf.dtype, leaf.shape[1:]) for leaf in leaves]


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
