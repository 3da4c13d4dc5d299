"""Which channels of torchvision's models can never go, and why: the table of docs/channels.md.

    python benchmarks/pinned.py [--names resnet18 swin_t]

A channel counts that a convolution or linear layer writes and that belongs to no unit.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from results import insert
from torchvision.models import get_model_builder

sys.path.append(str(Path(__file__).resolve().parents[1]))

from fxlean.compaction.trials import units_of
from fxlean.tracing.tracer import trace_model
from tests.support.torchvision_models import backbone, inputs_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "channels.md"
MARKS = ("<!-- table: benchmarks/pinned.py -->", "<!-- end of table -->")
NAMES = (
    *("convnext_tiny", "deeplabv3_mobilenet_v3_large", "densenet121", "efficientnet_b0"),
    *("efficientnet_v2_s", "fcn_resnet50", "googlenet", "inception_v3"),
    *("lraspp_mobilenet_v3_large", "maxvit_t", "mnasnet1_0", "mobilenet_v2"),
    *("mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50"),
    *("resnext50_32x4d", "shufflenet_v2_x1_0", "squeezenet1_1", "swin_t", "vgg11_bn", "vit_b_16"),
)


def row(name: str) -> str:
    """The line of one model."""
    builder = get_model_builder(name)
    model = builder(weights=None, **backbone(builder)).eval()
    units = units_of(model, trace_model(model, inputs_of(name)))
    layers = [use for use in units.uses if not use.is_norm and use.number == 0]
    pinned = sum(int((use.rows < 0).sum()) for use in layers)
    total = sum(len(use.rows) for use in layers)
    reasons: Counter[str] = Counter()
    for use in layers:
        if use.layer in units.pinned:
            reasons[units.pinned[use.layer]] += len(use.rows)
    because = ", ".join(f"`{reason}`" for reason, _ in reasons.most_common())
    return f"| {name} | {units.count:,} | {pinned / total:.1%} | {because} |"


def main() -> None:
    """Write the table into the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--names", nargs="+", default=NAMES)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    lines = ["| model | units | channels in none | pinned by |", "|---|---|---|---|"]
    for name in parser.parse_args().names:
        lines.append(row(name))
        print(lines[-1], flush=True)
    insert(MARKS, "\n".join(lines), PAGE)


if __name__ == "__main__":
    main()
