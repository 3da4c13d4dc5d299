"""Trains a mixed-scale dense network on the Circle-Square images.

    python examples/train_msd.py [--scale paper]

The network of the best validation goes to `msd.pt`. A run that was interrupted goes on where
it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from circle_square import (
    CLASSES,
    SPLITS,
    Data,
    Scale,
    arguments,
    begin,
    best_device,
    load_data,
)
from training import pixel_accuracy, train

from adapters.msd import MSD


def trained_msd(folder: Path, scale: Scale, splits: Mapping[str, Data], seed: int) -> MSD:
    """The network of a folder, trained as far as it is not yet."""
    torch.manual_seed(seed)
    model = MSD(1, CLASSES, scale.depth).to(best_device())
    train(model, name_of(scale), splits, scale, folder / "msd.pt", seed)
    return model


def name_of(scale: Scale) -> str:
    """The network's name in checkpoints."""
    return f"MS-D of depth {scale.depth}"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and say how good the network is."""
    options = arguments(__doc__).parse_args(argv)
    scale, folder = begin(options)
    splits = {split: load_data(folder / "data", split, scale) for split in SPLITS}
    model = trained_msd(folder, scale, splits, options.seed)
    accuracy = pixel_accuracy(model, splits["test"])
    print(f"{folder / 'msd.pt'}: accuracy {accuracy:.3f} on the test images")


if __name__ == "__main__":
    main()
