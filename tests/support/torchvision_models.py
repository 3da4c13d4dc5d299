"""The models of torchvision, with random weights, and inputs for them."""

import inspect
import os

import pytest
import torch
import torchvision
from torch.utils._pytree import tree_flatten

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
