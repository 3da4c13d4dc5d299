"""Accuracy against the fraction of kernels kept: every method, one-shot and iterative.

    python benchmarks/results.py [--seeds 5]

For each seed: new Circle-Square images of the small scale and a new MS-D network, trained once.
Every method then prunes copies of it, either in one step without training (one-shot), or ratio
after ratio with fine-tuning after each (iterative). Measurements go to `benchmarks/results.csv`,
seed by seed, so that an interrupted run goes on where it stopped; from it come the plots in
`docs/images` and the tables of `docs/results.md`, between the marks there.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

from circle_square import CLASSES, SCALES, SPLITS, Data, Scale, draw_image, replacing  # noqa: E402
from training import pixel_accuracy, train_epoch  # noqa: E402

import fxlean  # noqa: E402
from adapters.msd import MSD  # noqa: E402
from fxlean.selection.methods import METHODS  # noqa: E402

RATIOS = (0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05)
MODES = ("one-shot", "iterative")
MARKS = ("<!-- tables: benchmarks/results.py -->", "<!-- end of tables -->")
MEASURED = ROOT / "benchmarks" / "results.csv"
PAGE, IMAGES = ROOT / "docs" / "results.md", ROOT / "docs" / "images"


@dataclass(frozen=True)
class Point:
    """Test accuracy of one network; `ratio` was asked for, `kept` is what was left."""

    seed: int
    mode: str
    method: str
    ratio: float
    kept: float
    accuracy: float


def make_data(scale: Scale, seed: int) -> dict[str, Data]:
    """Images in noise and labels, for training, validation and test."""
    rng = np.random.default_rng([77, seed])
    splits = {}
    for split, count in zip(SPLITS, scale.images, strict=True):
        drawn = [draw_image(rng, scale) for _ in range(count)]
        clean, labels = (np.stack(arrays) for arrays in zip(*drawn, strict=True))
        noisy = torch.from_numpy(clean + rng.normal(0, scale.noise, clean.shape)).float()
        splits[split] = (noisy[:, None], torch.from_numpy(labels).long())
    return splits


def train_once(scale: Scale, splits: dict[str, Data], seed: int) -> MSD:
    """A network with the weights of its best validation."""
    torch.manual_seed(seed)
    model = MSD(1, CLASSES, scale.depth)
    optimizer = torch.optim.Adam(model.parameters(), scale.rate)
    best, weights = -1.0, model.state_dict()
    for epoch in range(scale.epochs):
        train_epoch(model, splits["train"], optimizer, scale.batch, epoch)
        accuracy = pixel_accuracy(model, splits["validation"])
        if accuracy > best:
            best, weights = accuracy, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    return model


def measure(seed: int, scale: Scale) -> Iterator[Point]:
    """All points of one seed."""
    splits = make_data(scale, seed)
    trained = train_once(scale, splits, seed)
    for mode in MODES:
        for method in METHODS:
            accuracy = pixel_accuracy(trained, splits["test"])
            yield Point(seed, mode, method, 1.0, 1.0, accuracy)
            model = copy.deepcopy(trained)
            for step, ratio in enumerate(RATIOS):
                torch.manual_seed(1000 * seed + step)
                if mode == "one-shot":
                    model = copy.deepcopy(trained)
                result = fxlean.prune(model, ratio, splits["train"][0][:1], method=method)
                if mode == "iterative":
                    tune(model, splits["train"], scale, seed=100 * step)
                accuracy = pixel_accuracy(model, splits["test"])
                yield Point(seed, mode, method, ratio, result.ratio, accuracy)


def tune(model: nn.Module, data: Data, scale: Scale, seed: int) -> None:
    """Fine-tune after pruning."""
    optimizer = torch.optim.Adam(model.parameters(), scale.rate)
    for epoch in range(scale.tuning):
        train_epoch(model, data, optimizer, scale.batch, seed + epoch)


def read_points() -> list[Point]:
    """What was measured before."""
    if not MEASURED.exists():
        return []
    with MEASURED.open(newline="") as file:
        return [
            Point(
                int(line["seed"]),
                line["mode"],
                line["method"],
                *(float(line[key]) for key in ("ratio", "kept", "accuracy")),
            )
            for line in csv.DictReader(file)
        ]


def write_points(points: Sequence[Point]) -> None:
    """Everything measured so far."""
    with replacing(MEASURED) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Point)])
        writer.writeheader()
        for point in points:
            short = replace(point, kept=round(point.kept, 5), accuracy=round(point.accuracy, 5))
            writer.writerow(asdict(short))


def column(
    points: Sequence[Point], mode: str, method: str, ratio: float, field: str = "accuracy"
) -> np.ndarray:
    """What was measured for all seeds, in their order."""
    wanted = (mode, method, ratio)
    chosen = [p for p in points if (p.mode, p.method, p.ratio) == wanted]
    return np.array([getattr(p, field) for p in sorted(chosen, key=lambda p: p.seed)])


def format_table(
    title: str, ratios: Sequence[float], methods: Sequence[str], cell: Callable[[str, float], str]
) -> str:
    """A line for each ratio and a column for each method."""
    lines = [f"{title}:", "", f"| ratio | {' | '.join(methods)} |", f"|---|{'---|' * len(methods)}"]
    for ratio in ratios:
        cells = " | ".join(cell(method, ratio) for method in methods)
        lines.append(f"| {ratio:g} | {cells} |")
    return "\n".join(lines)


def format_mode(points: Sequence[Point], mode: str) -> str:
    """Accuracies, kernels left, and how often `lean` is ahead."""
    seeds = len({point.seed for point in points})

    def accuracy(method: str, ratio: float) -> str:
        values = column(points, mode, method, ratio)
        return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"

    def kept(method: str, ratio: float) -> str:
        return f"{column(points, mode, method, ratio, 'kept').mean():.3f}"

    def wins(method: str, ratio: float) -> str:
        ahead = column(points, mode, "lean", ratio) - column(points, mode, method, ratio)
        return f"{(ahead > 0).sum()} : {(ahead < 0).sum()}"

    title = f"**{mode}**, mean ± standard deviation of the accuracy over {seeds} seeds"
    others = [method for method in METHODS if method != "lean"]
    return "\n\n".join(
        [
            format_table(title, (1.0, *RATIOS), list(METHODS), accuracy),
            format_table("Kernels that are left, mean", RATIOS, list(METHODS), kept),
            format_table("Seeds in which `lean` is better : worse", RATIOS, others, wins),
        ]
    )


def background(points: Sequence[Point]) -> str:
    """What a network would reach that always says background."""
    seeds = sorted({point.seed for point in points})
    labels = [make_data(SCALES["small"], seed)["test"][1] for seed in seeds]
    share = float(np.mean([float((label == 0).float().mean()) for label in labels]))
    return f"A network that says background everywhere is right on {share:.3f} of the pixels."


def draw(points: Sequence[Point], mode: str, path: Path) -> None:
    """Mean accuracy against ratio, with the standard deviation as a band."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method in METHODS:
        found = [column(points, mode, method, ratio) for ratio in (1.0, *RATIOS)]
        mean = np.array([values.mean() for values in found])
        spread = np.array([values.std(ddof=1) for values in found])
        (line,) = axes.plot((1.0, *RATIOS), mean, marker=".", label=method)
        color = line.get_color()
        axes.fill_between((1.0, *RATIOS), mean - spread, mean + spread, color=color, alpha=0.15)
    axes.set(xscale="log", xlabel="fraction of kernels kept", ylabel="pixel accuracy", title=mode)
    axes.set_xticks((1.0, *RATIOS), labels=[f"{ratio:g}" for ratio in (1.0, *RATIOS)])
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.legend()
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def publish(points: Sequence[Point]) -> None:
    """Plots, and the tables between the marks of the page."""
    for mode in MODES:
        draw(points, mode, IMAGES / f"results_{mode.replace('-', '_')}.png")
    insert(MARKS, "\n\n".join([background(points), *(format_mode(points, m) for m in MODES)]))


def insert(marks: tuple[str, str], tables: str, page: Path = PAGE) -> None:
    """Put tables between two marks of a page, that of the results unless told otherwise."""
    before, _, rest = page.read_text().partition(marks[0])
    _, found, after = rest.partition(marks[1])
    if not found:
        raise SystemExit(f"{page} has no {marks[0]} ... {marks[1]} for the tables to go to.")
    with replacing(page) as partial:
        partial.write_text(f"{before}{marks[0]}\n\n{tables}\n\n{marks[1]}{after}")


def main() -> None:
    """Measure the seeds that are missing, then publish."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", fxlean.PruneWarning)
    points = read_points()
    done = {point.seed for point in points}
    for seed in tqdm([seed for seed in range(options.seeds) if seed not in done], unit="seed"):
        points += measure(seed, SCALES["small"])
        write_points(points)
    publish(points)


if __name__ == "__main__":
    main()
