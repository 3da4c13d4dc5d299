"""Parameters that compaction leaves of torchvision's models, beside those of an earlier run.

    python benchmarks/sizes.py now.json [--before earlier.json] [--names resnet18 densenet121]

Classification and segmentation models with random weights and norms, pruned by `path` and `lean`
to 0.3 and 0.05 of their kernels by the cheapest norm. What is known is read from the file, and each
result is added to it at once, so a run can be broken off and taken up again. Prints which models
became larger or smaller than before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from pathlib import Path

import torch
import torchvision
from torchvision.models import get_model_weights, list_models

sys.path.append(str(Path(__file__).resolve().parents[1]))

import fxlean
from tests.support.torchvision_models import backbone, inputs_of
from tests.support.zoo import randomise_norms

LARGEST = 90e6  # parameters; larger models take minutes each


def names() -> list[str]:
    """The models, the smallest first."""
    models = torchvision.models
    found = list_models(module=models) + list_models(module=models.segmentation)
    sizes = {name: get_model_weights(name).DEFAULT.meta["num_params"] for name in found}
    return sorted((name for name in found if sizes[name] < LARGEST), key=lambda name: sizes[name])


def left(name: str, method: str, ratio: float) -> int:
    """Parameters of a pruned and compacted model."""
    torch.manual_seed(0)
    builder = torchvision.models.get_model_builder(name)
    model = builder(weights=None, **backbone(builder)).eval()
    randomise_norms(model)
    x = inputs_of(name)[0]
    fxlean.prune(model, ratio, x, method=method, norm="l1")
    return sum(parameter.numel() for parameter in fxlean.compact(model, x).parameters())


def main() -> None:
    """Measure what is not known yet, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--names", nargs="+", default=names())
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    before = json.loads(options.before.read_text()) if options.before else {}
    found = json.loads(options.results.read_text()) if options.results.exists() else {}
    for name, method, ratio in itertools.product(options.names, ("path", "lean"), (0.3, 0.05)):
        key = f"{name} {method} {ratio}"
        if key not in found:
            found[key] = left(name, method, ratio)
            options.results.write_text(json.dumps(found, indent=0))
            print(key, f"{found[key]:,}", flush=True)
    for change, sign in (("larger", 1), ("smaller", -1)):
        keys = [key for key in found if sign * (found[key] - before.get(key, found[key])) > 0]
        print(f"{len(keys)} of {len(found)} {change}")
        for key in keys:
            print(f"  {key}: {before[key]:,} -> {found[key]:,}")


if __name__ == "__main__":
    main()
