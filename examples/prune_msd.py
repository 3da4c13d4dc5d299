"""Prunes the trained MS-D network step by step with several methods, as in the LEAN paper.

    python examples/prune_msd.py [--methods lean l1] [--scale paper]

At the small scale, data and network are made first if they are missing, which takes a minute.
`pruned_msd` gets the network after each step, a table and a plot of accuracy against the
fraction of kernels kept. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from circle_square import SPLITS, arguments, begin, claim, load_data, write_data
from train_msd import name_of, trained_msd
from training import draw_plot, format_table, prune_and_tune

from fxlean.selection.methods import METHODS


def main(argv: Sequence[str] | None = None) -> None:
    """Prune with every method, and show what is left of the accuracy."""
    parser = arguments(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args(argv)
    scale, folder = begin(options)
    if options.scale == "small" and not (folder / "data").exists():
        write_data(folder / "data", scale, options.seed)
    splits = {split: load_data(folder / "data", split, scale) for split in SPLITS}
    if options.scale != "small" and not (folder / "msd.pt").exists():
        raise SystemExit(
            f"There is no network at {folder / 'msd.pt'}. Train it first, which takes hours "
            f"without a GPU: python examples/train_msd.py --scale {options.scale}"
        )
    model = trained_msd(folder, scale, splits, options.seed)
    results = folder / "pruned_msd"
    claim(results, scale, options.seed)
    rows = prune_and_tune(
        model, name_of(scale), options.methods, splits, scale, results, options.seed
    )
    print(format_table(rows))
    draw_plot(rows, results / "accuracy.png", name_of(scale))
    print(f"Networks, results.csv and accuracy.png are in {results}.")


if __name__ == "__main__":
    main()
