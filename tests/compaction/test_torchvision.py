"""Classification and segmentation models of torchvision, pruned further and further, compacted.

One of every architecture, and all of up to 8 M parameters; the others run with
`FXLEAN_LARGE_MODELS=1`.
"""

import itertools
import os

import pytest
import torch
import torchvision
from torchvision.models import get_model_weights, list_models

import fxlean
from fxlean import compact
from tests.support.compare import parameters, worst_error
from tests.support.torchvision_models import build, inputs_of
from tests.support.zoo import randomise_norms

SMALL = 8e6
LARGER = (
    "alexnet",
    "convnext_tiny",
    "deeplabv3_mobilenet_v3_large",
    "fcn_resnet50",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "resnet18",
    "resnext50_32x4d",
    "swin_t",
    "swin_v2_t",
    "vgg11_bn",
    "vit_b_16",
)
FIXED_SIZE = ("maxvit", "vit")
NAMES = sorted(
    list_models(module=torchvision.models) + list_models(module=torchvision.models.segmentation)
)
METHODS = dict(zip(NAMES, itertools.cycle(("lean", "path")), strict=False))

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* keeps its size, for (every|its):fxlean.CompactionWarning",
    "ignore::fxlean.PruneWarning",
    "ignore:The default weight initialization of:FutureWarning",
)


def skip_large(name):
    size = get_model_weights(name).DEFAULT.meta["num_params"]
    if size > SMALL and name not in LARGER and not os.environ.get("FXLEAN_LARGE_MODELS"):
        pytest.skip(f"{name} has {size / 1e6:.0f} M parameters; FXLEAN_LARGE_MODELS=1 runs it")


def example_and_other(name):
    """An input of two images, and one of three that are wider where the model allows it."""
    (x,) = inputs_of(name)
    wider = 0 if name.startswith(FIXED_SIZE) else 32
    _, channels, height, width = x.shape
    return torch.rand(2, channels, height, width), torch.rand(3, channels, height, width + wider)


@pytest.mark.parametrize("name", NAMES)
def test_compacted_models_keep_their_outputs(name):
    skip_large(name)
    model, size = build(name)
    randomise_norms(model.eval())
    example, other = example_and_other(name)
    for ratio in (0.5, 0.1, 0.02):
        fxlean.prune(model, ratio, example, method=METHODS[name], norm="l1")
        small = compact(model, example)
        with torch.no_grad():
            assert worst_error(small(other), model(other)) < 1e-4
        assert parameters(small) <= size
