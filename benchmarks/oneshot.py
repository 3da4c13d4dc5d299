"""Accuracy without labels: pruned, repaired, repaired in rounds, and distilled.

    python benchmarks/oneshot.py [--seeds 5] [--methods relevance l1] [--ratios 0.3 0.1]

For each seed a residual network is trained on handwritten digits with added noise, which leaves it
at 92 to 95 %. Copies of it are pruned by every method to every ratio, without a label or a
training step: as pruned, with batch norm statistics measured anew, repaired once, and in rounds of
pruning and repair; for relevance also after distillation, and in rounds on noise in place of
images. Prints a Markdown table, the means over the seeds. With the defaults a few minutes on one
core.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from quickstart import Block, Data, accuracy, load_data, train

import fxlean
from fxlean.calibration.statistics import measure_statistics

COLUMNS = ("as pruned", "statistics", "repaired", "rounds", "distilled", "rounds on noise")
NOISE = 0.25  # standard deviation; the images are in [0, 1]
IMAGES, BATCH = 256, 64  # unlabelled images, from the training part
STEPS = 200  # of distillation


def network(blocks: int) -> nn.Module:
    """A residual network with three stages of this many blocks; ResNet-20 has three."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)]
    layers.append(nn.ReLU())
    inputs = 16
    for outputs in (16, 32, 64):
        for _ in range(blocks):
            layers.append(Block(inputs, outputs, stride=2 if inputs < outputs else 1))
            inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*layers)


def noisy(data: Data, seed: int) -> Data:
    """The images with noise added."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    return images + NOISE * torch.randn(images.shape, generator=generator), labels


def measure(
    trained: nn.Module, method: str, ratio: float, rounds: int, images: Tensor, test: Data
) -> Iterator[tuple[str, float]]:
    """Accuracy of every column for one method and ratio."""
    batches = list(images.split(BATCH))
    options = {"method": method, "calibration": batches}
    model = copy.deepcopy(trained)
    fxlean.prune(model, ratio, images[:1], **options)
    yield "as pruned", accuracy(model, test)
    again = copy.deepcopy(model)
    measure_statistics(again, [(images,)])
    yield "statistics", accuracy(again, test)
    fxlean.repair(model, batches, trained)
    yield "repaired", accuracy(model, test)
    model = copy.deepcopy(trained)
    list(fxlean.iterate(model, ratio, rounds, images[:1], repair=True, **options))
    yield "rounds", accuracy(model, test)
    if method == "relevance":
        fxlean.distill(model, batches, trained, STEPS)
        yield "distilled", accuracy(model, test)
        model = copy.deepcopy(trained)
        list(fxlean.iterate(model, ratio, rounds, images[:1], repair=True, method=method))
        yield "rounds on noise", accuracy(model, test)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=1, help="a stage; ResNet-20 has 3")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["relevance", "path", "lean", "l1"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.3, 0.2, 0.1])
    return parser.parse_args()


def main() -> None:
    """Trains, prunes and repairs; prints the table."""
    options = parse_arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", fxlean.PruneWarning)  # where a method cuts the network apart
    cells: defaultdict[tuple[str, float, str], list[float]] = defaultdict(list)
    unpruned = []
    cases = [(method, ratio) for method in options.methods for ratio in options.ratios]
    bar = tqdm(total=options.seeds * len(cases), unit="network", disable=None)
    for seed in range(options.seeds):
        training, test = (noisy(data, 2 * seed + i) for i, data in enumerate(load_data()))
        torch.manual_seed(seed)
        trained = network(options.blocks)
        train(trained, training, options.epochs, peak_rate=0.01)
        unpruned.append(accuracy(trained, test))
        for method, ratio in cases:
            images = training[0][:IMAGES]
            for column, value in measure(trained, method, ratio, options.rounds, images, test):
                cells[method, ratio, column].append(value)
            bar.update()
    bar.close()
    print(f"\nunpruned: {sum(unpruned) / len(unpruned):.3f}\n")
    print(f"| method | kept | {' | '.join(COLUMNS)} |")
    print("|---" * (2 + len(COLUMNS)) + "|")
    for method, ratio in cases:
        row = [cells.get((method, ratio, column)) for column in COLUMNS]
        texts = [f"{sum(values) / len(values):.3f}" if values else "" for values in row]
        print(f"| {method} | {ratio:g} | {' | '.join(texts)} |")


if __name__ == "__main__":
    main()
