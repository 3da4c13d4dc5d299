"""Makes the simulated Circle-Square images: TIFF files with noise, without, and labels.

    python examples/generate_cs_data.py [--scale paper]

The folder gets `data/train`, `data/validation` and `data/test`. Equal seeds make equal images.
"""

from __future__ import annotations

from collections.abc import Sequence

from circle_square import arguments, begin, claim, write_data


def main(argv: Sequence[str] | None = None) -> None:
    """Make the images, unless they are there."""
    options = arguments(__doc__).parse_args(argv)
    scale, folder = begin(options)
    folder = folder / "data"
    if folder.exists() and claim(folder, scale, options.seed):
        print(f"The images are in {folder} already.")
        return
    write_data(folder, scale, options.seed)
    print(f"Wrote {' + '.join(map(str, scale.images))} images to {folder}.")


if __name__ == "__main__":
    main()
