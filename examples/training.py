"""Training, and pruning step by step: what the scripts of the experiment share."""

from __future__ import annotations

import copy
import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from circle_square import Data, Scale, load, replacing, save
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils import prune
from tqdm import tqdm

import fxlean


def train_epoch(
    model: nn.Module, data: Data, optimizer: torch.optim.Optimizer, batch: int, seed: int
) -> float:
    """One pass over the images in an order that the seed decides; returns the mean loss."""
    images, labels = data
    model.train()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    total = 0.0
    for chosen in order.to(images.device).split(batch):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
        total += loss.item() * len(chosen)
    return total / len(images)


@torch.no_grad()
def pixel_accuracy(model: nn.Module, data: Data) -> float:
    """Fraction of the pixels that get their right label."""
    images, labels = data
    model.eval()
    right = sum(
        int((model(image[None]).argmax(1) == label).sum())
        for image, label in zip(images, labels, strict=True)
    )
    return right / labels.numel()


def train(
    model: nn.Module, network: str, splits: Mapping[str, Data], scale: Scale, path: Path, seed: int
) -> None:
    """Train with Adam and load the weights of the best validation; goes on where it stopped.

    Args:
        model: trained in place.
        network: its name, which the checkpoint carries.
        splits: data for "train" and "validation".
        scale: epochs, learning rate and batch size.
        path: the checkpoint, written after every epoch.
        seed: of the order of the images.
    """
    optimizer = torch.optim.Adam(model.parameters(), scale.rate)
    state: dict[str, Any] = {"network": network, "epoch": 0, "accuracy": -1.0}
    if path.exists():
        state = load(path, network)
        model.load_state_dict(state["last"])
        optimizer.load_state_dict(state["optimizer"])
    bar = tqdm(range(state["epoch"], scale.epochs), desc=network, unit="epoch", disable=None)
    for epoch in bar:
        loss = train_epoch(model, splits["train"], optimizer, scale.batch, seed + epoch)
        accuracy = pixel_accuracy(model, splits["validation"])
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.3f}")
        if accuracy > state["accuracy"]:
            best = {key: value.clone() for key, value in model.state_dict().items()}
            state |= {"accuracy": accuracy, "best": best}
        state |= {"epoch": epoch + 1, "last": model.state_dict()}
        save(state | {"optimizer": optimizer.state_dict()}, path)
    model.load_state_dict(state["best"])


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a state dict that may hold masks of `torch.nn.utils.prune`."""
    for key in weights:
        if key.endswith("_mask"):
            module, _, name = key.removesuffix("_mask").rpartition(".")
            prune.custom_from_mask(model.get_submodule(module), name, weights[key])
    model.load_state_dict(weights)


def prune_and_tune(
    trained: nn.Module,
    network: str,
    methods: Sequence[str],
    splits: Mapping[str, Data],
    scale: Scale,
    folder: Path,
    seed: int,
) -> list[Row]:
    """Prune copies of a network step by step, fine-tuning after each; goes on where it stopped.

    Args:
        trained: the network, which stays as it is.
        network: its name, which the checkpoints carry.
        methods: of `fxlean.prune`; each begins with the trained network.
        splits: data for "train" and "test".
        scale: ratio, steps, epochs after each, and how to train.
        folder: gets `results.csv`, and every network with ratio and accuracy in its name.
        seed: of the order of the images, and of the random method.

    Returns:
        What `results.csv` says: one row for each method and step, step 0 before pruning.
    """
    rows = read_rows(folder / "results.csv")
    total = len(methods) * scale.steps
    bar = tqdm(total=total, desc=f"pruning {network}", unit="step", disable=None)
    for method in methods:
        done = [row for row in rows if row.method == method]
        model = copy.deepcopy(trained)
        if done:
            load_weights(model, load(folder / file_name(done[-1]), network)["weights"])
        else:
            rows.append(Row(method, 0, 1.0, pixel_accuracy(model, splits["test"])))
        bar.update(len(done) - bool(done))
        for step in range(max(1, len(done)), scale.steps + 1):
            kept = _prune_step(model, method, step, splits, scale, seed)
            row = Row(method, step, kept, pixel_accuracy(model, splits["test"]))
            rows.append(row)
            save({"network": network, "weights": model.state_dict()}, folder / file_name(row))
            write_rows(rows, folder / "results.csv")
            bar.update()
    bar.close()
    return rows


def _prune_step(
    model: nn.Module, method: str, step: int, splits: Mapping[str, Data], scale: Scale, seed: int
) -> float:
    """Prune and fine-tune once; returns the fraction of kernels that are kept."""
    torch.manual_seed(seed + step)
    ratio = scale.ratio ** (step / scale.steps)
    images = splits["train"][0]
    result = fxlean.prune(model, ratio, images[:1], method=method)
    optimizer = torch.optim.Adam(model.parameters(), scale.rate)
    for epoch in range(scale.tuning):
        order = seed + 1000 * step + epoch
        train_epoch(model, splits["train"], optimizer, scale.batch, order)
    return result.ratio


@dataclass(frozen=True)
class Row:
    """One line of `results.csv`: test accuracy after a step that left this ratio of kernels."""

    method: str
    step: int
    ratio: float
    accuracy: float


def file_name(row: Row) -> str:
    """Of the network that the row is about."""
    return f"{row.method}_step{row.step:02}_ratio{row.ratio:.4f}_accuracy{row.accuracy:.4f}.pt"


def read_rows(path: Path) -> list[Row]:
    """The rows of a run that was interrupted, or none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Row(line["method"], int(line["step"]), float(line["ratio"]), float(line["accuracy"]))
            for line in csv.DictReader(file)
        ]


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """All rows as CSV."""
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def format_table(rows: Sequence[Row]) -> str:
    """Accuracy, one line for each step and one column for each method; kept ratio in brackets."""
    methods = list(dict.fromkeys(row.method for row in rows))
    cells = {(row.method, row.step): f"{row.accuracy:.3f} ({row.ratio:.3f})" for row in rows}
    lines = ["step" + "".join(f"{method:>16}" for method in methods)]
    for step in sorted({row.step for row in rows}):
        line = [cells.get((method, step), "") for method in methods]
        lines.append(f"{step:>4}" + "".join(f"{cell:>16}" for cell in line))
    return "\n".join(lines)


def draw_plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Accuracy against the fraction of kernels that is left, one line for each method."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == method]
        axes.plot([r.ratio for r in mine], [r.accuracy for r in mine], marker=".", label=method)
    axes.set(xscale="log", xlabel="fraction of kernels kept", ylabel="pixel accuracy", title=title)
    axes.invert_xaxis()
    axes.legend()
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
