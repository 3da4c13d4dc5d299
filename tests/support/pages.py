"""The code on the pages, and what pages take as given: a network of theirs, images and a loop.

A page whose examples go on from things that it does not build names them in its source, as in
`<!-- given: model, images -->`. Each of its blocks finds them new, so that none works on a model
that the one before it has pruned.
"""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fxlean.calibration.statistics import measure_statistics
from tests.support.blocks import Anchored, conv_bn, conv_bn_relu, residual

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(<!-- without fxlean -->\n)?^( *)```python\n(.*?)^\2```$(?:\n\n```text\n(.*?)^```$)?",
    re.S | re.M,
)
GIVEN = re.compile(r"<!-- given: (.*) -->")


@dataclass(frozen=True)
class Block:
    """Python on a page.

    Attributes:
        code: without indentation.
        line: at which it begins.
        apart: whether it runs in a process that cannot import fxlean.
        output: what it prints, if a block of text right behind it says so.
    """

    code: str
    line: int
    apart: bool
    output: str | None


def blocks(page):
    """The Python on a page, in order."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start(3))
        yield Block(textwrap.dedent(found[3]), line, found[1] is not None, found[4])


def given(page):
    """What the page takes as given, by name, the same at every call."""
    names = GIVEN.search(page.read_text())
    with torch.random.fork_rng():  # pages that set a seed get what they say
        torch.manual_seed(0)
        everything = _everything()
    return {name: everything[name] for name in names[1].split(", ")} if names else {}


def _everything():
    model = nn.Sequential(
        conv_bn_relu(3, 8),
        residual(nn.Sequential(conv_bn_relu(8, 12), conv_bn(12, 8))),
        conv_bn_relu(8, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    images, labels = torch.randn(64, 3, 12, 12), torch.arange(64) % 4
    measure_statistics(model, [(images,)])  # as a trained network has them
    return {
        "model": model,
        "images": images,
        "x": images[:1],
        "batches": list(images.split(16)),
        "loader": list(zip(images.split(16), labels.split(16), strict=True)),
        "finetune": lambda model: None,
        "YOLO": Detector,
    }


class Detector:
    """Stands in for YOLO of ultralytics: with such a head, and assigning weights before it runs."""

    def __init__(self, _):
        self.model = Anchored()

    def predict(self, image):
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight = nn.Parameter(module.weight.detach())
        return self.model(image)

    def export(self, format):
        return torch.export.export(self.model, (torch.rand(1, 3, 640, 640),))


PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if any(blocks(p))]
