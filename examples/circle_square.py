"""The Circle-Square experiment of the LEAN paper: sizes, images and files.

Source: Schoonhoven, Hendriksen, Pelt and Batenburg, arXiv 2011.06923. Objects of four shapes
lie in strong noise; the task is to label every pixel with its object's shape, or 0.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from torch import Tensor

# The adapters are no part of the package that is installed: find them beside this folder.
sys.path.append(str(Path(__file__).resolve().parents[1]))

Images = NDArray[np.float32]
Labels = NDArray[np.uint8]
Data = tuple[Tensor, Tensor]

CLASSES = 5  # background, square, hollow square, disc, ring
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Scale:
    """How large the experiment is.

    Attributes:
        size: width and height of an image.
        objects: how many lie in it.
        side: of an object.
        noise: standard deviation.
        images: how many for training, validation and test.
        depth: layers of the MS-D network.
        epochs: of training before pruning.
        rate: learning rate of Adam.
        batch: images in a step of Adam.
        ratio: fraction of the kernels that is kept in the end.
        steps: pruning steps to get there.
        tuning: epochs after each of them.
    """

    size: int
    objects: int
    side: int
    noise: float
    images: tuple[int, int, int]
    depth: int
    epochs: int
    rate: float
    batch: int
    ratio: float
    steps: int
    tuning: int


SCALES = {
    # Half the side leaves a quarter of the pixels to average over, so half the noise.
    "small": Scale(64, 6, 16, 0.5, (128, 16, 32), 20, 30, 1e-2, 8, 0.05, 6, 2),
    "paper": Scale(256, 24, 32, 1.0, (500, 100, 50), 50, 200, 1e-3, 1, 0.05, 15, 3),
}


def draw_image(rng: np.random.Generator, scale: Scale) -> tuple[Images, Labels]:
    """An image without noise, and its labels, both of shape (size, size).

    Objects do not overlap; each has an intensity between 0.2 and 1. Hollow objects are labelled
    over their full outline, the hole included.
    """
    clean = np.zeros((scale.size, scale.size), dtype=np.float32)
    labels = np.zeros((scale.size, scale.size), dtype=np.uint8)
    shapes = _shapes(scale.side)
    for number, (row, column) in enumerate(_corners(rng, scale)):
        body, outline = shapes[number % len(shapes)]
        place = slice(row, row + scale.side), slice(column, column + scale.side)
        clean[place][body] = rng.uniform(0.2, 1)
        labels[place][outline] = 1 + number % len(shapes)
    return clean, labels


def _shapes(side: int) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """What is bright, and what is labelled, of square, hollow square, disc and ring."""
    offset = np.abs(np.arange(side) - (side - 1) / 2)
    across = np.maximum(offset[:, None], offset)
    radius = np.hypot(offset[:, None], offset)
    square, disc = across < side / 2, radius < side / 2
    hollow, ring = square & (across >= side / 4), disc & (radius >= side / 4)
    return [(square, square), (hollow, square), (disc, disc), (ring, disc)]


def _corners(rng: np.random.Generator, scale: Scale) -> list[tuple[int, int]]:
    """Upper left corners of objects that do not overlap; starts afresh when none fits any more."""
    while True:
        corners: list[tuple[int, int]] = []
        for _ in range(100 * scale.objects):
            row, column = rng.integers(0, scale.size - scale.side + 1, 2).tolist()
            if all(max(abs(row - r), abs(column - c)) >= scale.side for r, c in corners):
                corners.append((row, column))
            if len(corners) == scale.objects:
                return corners


def write_data(folder: Path, scale: Scale, seed: int) -> None:
    """The three sets of images as TIFF: clean, with noise, and labels; all of it or nothing."""
    with replacing(folder) as partial:
        for number, (split, count) in enumerate(zip(SPLITS, scale.images, strict=True)):
            (partial / split).mkdir(parents=True)
            rng = np.random.default_rng([seed, number])
            for image in range(count):
                clean, labels = draw_image(rng, scale)
                noise = rng.normal(0, scale.noise, clean.shape).astype(np.float32)
                for kind, array in (("clean", clean), ("noisy", clean + noise), ("label", labels)):
                    tifffile.imwrite(partial / split / f"{kind}_{image:04d}.tif", array)
        claim(partial, scale, seed)


def claim(folder: Path, scale: Scale, seed: int) -> bool:
    """Note in a folder which settings its results belong to; whether they were there before.

    Results of other settings are neither mixed with nor overwritten.
    """
    settings = json.dumps(asdict(scale) | {"seed": seed}, indent=2)
    path = folder / "settings.json"
    if not path.exists():
        with replacing(path) as partial:
            partial.write_text(settings)
        return False
    if path.read_text() != settings:
        raise SystemExit(
            f"{folder} was made with other settings, see {path}. Remove it, pass the same --scale "
            "and --seed, or another --folder."
        )
    return True


def load_data(folder: Path, split: str, scale: Scale) -> Data:
    """Images with noise, shape (n, 1, size, size), and labels, shape (n, size, size)."""
    files = sorted((folder / split).glob("noisy_*.tif"))
    if not files:
        raise SystemExit(
            f"There are no images in {folder / split}. Make them with "
            "`python examples/generate_cs_data.py`, or name their folder with --folder."
        )
    images = [_read(file, scale) for file in files]
    labels = [_read(file.with_name(file.name.replace("noisy", "label")), scale) for file in files]
    device = best_device()
    return (
        torch.from_numpy(np.stack(images)).float()[:, None].to(device),
        torch.from_numpy(np.stack(labels)).long().to(device),
    )


def _read(file: Path, scale: Scale) -> NDArray[Any]:
    if not file.exists():
        raise SystemExit(f"{file} is missing. Remove {file.parent.parent} and make the data anew.")
    try:
        array: NDArray[Any] = tifffile.imread(file)
    except (OSError, ValueError) as err:  # tifffile's own errors are ValueErrors
        raise SystemExit(f"{file} is no TIFF image ({err}). Make the data anew.") from err
    if array.shape != (scale.size, scale.size):
        raise SystemExit(
            f"{file} has shape {array.shape}, and this scale needs {(scale.size, scale.size)}. "
            "Pass the --scale that the data was made with, or another --folder."
        )
    return array


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path` if the block succeeds, else it is removed."""
    partial = path.with_name(f"{path.name}.partial")
    _remove(partial)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def best_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def save(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, all of it or nothing."""
    with replacing(path) as partial:
        torch.save(content, partial)


def load(path: Path, network: str) -> dict[str, Any]:
    """Read a checkpoint of a network of this name."""
    try:
        content: dict[str, Any] = torch.load(path, map_location=best_device(), weights_only=True)
        found = content["network"]
    except Exception as err:
        raise SystemExit(f"{path} is no checkpoint ({err}). Remove it to start anew.") from err
    if found != network:
        raise SystemExit(
            f"{path} holds {found}, and this run needs {network}. Pass the --scale that it was "
            "made with, or another --folder."
        )
    return content


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="small", help="small runs on a laptop")
    parser.add_argument(
        "--folder", type=Path, help="for data, networks and results; circle_square/SCALE if absent"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


def begin(options: argparse.Namespace) -> tuple[Scale, Path]:
    """The scale and the folder of a run."""
    if options.scale == "small":
        torch.set_num_threads(1)  # so small that threads only wait for each other
    return SCALES[options.scale], Path(options.folder or Path("circle_square") / options.scale)
