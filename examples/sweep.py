"""Compares methods, ratios and seeds on the quickstart's network, many at a time, with Ray Tune.

    python examples/sweep.py
    RAY_ADDRESS=auto python examples/sweep.py --folder /shared/sweep

The first uses the cores of this machine, the second those of the Ray cluster that it belongs to, on
whose nodes fxlean and this folder are installed; they all must see the folder of results. Every
combination trains a network, prunes it in steps with fine-tuning, compacts it, and leaves a file.
What has its file is not run again: the same command goes on after a break, and more methods,
ratios or seeds add to what is there.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import ray
import torch
from quickstart import DigitNet, accuracy, load_data, size, train
from ray import tune

import fxlean

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
Row = dict[str, Any]


def file_of(case: Row, folder: Path) -> Path:
    """Where the result of a combination is written; its name holds all of its settings."""
    return folder / "rows" / ("-".join(f"{key}={case[key]}" for key in sorted(case)) + ".json")


def run(config: Row, folder: Path) -> None:
    """Train, prune, fine-tune and compact one network, and write down what it has become."""
    case, file = config["case"], file_of(config["case"], folder)
    torch.set_num_threads(1)
    torch.manual_seed(case["seed"])
    training, test = load_data()
    model, images = DigitNet(), training[0]
    train(model, training, case["epochs"], peak_rate=0.01)
    row = {**case, "unpruned": accuracy(model, test)}
    options: Row = {"method": case["method"]}
    if case["method"] == "relevance":
        options["calibration"] = images[:256]
    for result in fxlean.iterate(model, case["ratio"], case["steps"], images[:1], **options):
        train(model, training, case["epochs"], peak_rate=0.01)
        row["kept"] = result.ratio
    small = fxlean.compact(model.eval(), images[:1])
    row |= {"parameters": size(small), "accuracy": accuracy(small, test)}
    half = file.with_suffix(".part")
    half.write_text(json.dumps(row))
    half.replace(file)  # whole or not at all, whenever it is killed
    tune.report({key: row[key] for key in ("accuracy", "kept", "parameters")})


def run_missing(cases: Sequence[Row], folder: Path, workers: int | None) -> None:
    """Run the combinations that have no result yet, one on each core."""
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    missing = [case for case in cases if not file_of(case, folder).exists()]
    print(f"{len(cases) - len(missing)} of {len(cases)} combinations are done")
    if not missing:
        return
    ray.init(num_cpus=workers, include_dashboard=False, runtime_env={"working_dir": str(HERE)})
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run, folder=folder), {"cpu": 1}),
        param_space={"case": tune.grid_search(missing)},
        run_config=tune.RunConfig(storage_path=str(folder / "ray"), verbose=1),
    )
    errors = tuner.fit().errors
    ray.shutdown()
    if errors:
        print(errors[0], file=sys.stderr)
        sys.exit(f"{len(errors)} combinations failed; the same command tries them again.")


def table(rows: Sequence[Row]) -> str:
    """Test accuracies by method and ratio: means over seeds, with standard errors if there are."""
    ratios = sorted({row["ratio"] for row in rows}, reverse=True)
    lines = ["method    " + "".join(f"{ratio:>16.1%}" for ratio in ratios)]
    for method, ratio in itertools.product(dict.fromkeys(row["method"] for row in rows), ratios):
        if ratio == ratios[0]:
            lines.append(f"{method:<10}")
        centre, error = summary(rows, method, ratio)
        spread = "" if error is None else f" ± {error:.1%}"
        lines[-1] += f"{centre:.1%}{spread}".rjust(16)
    return "\n".join([*lines, f"unpruned: {mean(row['unpruned'] for row in rows):.1%}"])


def summary(rows: Sequence[Row], method: str, ratio: float) -> tuple[float, float | None]:
    """Mean accuracy over seeds, and its standard error, of which one seed tells nothing."""
    found = [row["accuracy"] for row in rows if (row["method"], row["ratio"]) == (method, ratio)]
    return mean(found), stdev(found) / len(found) ** 0.5 if len(found) > 1 else None


def plot(rows: Sequence[Row], file: Path) -> None:
    """Draw test accuracy over the fraction of kernels, a line for each method."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    ratios = sorted({row["ratio"] for row in rows})
    for method in dict.fromkeys(row["method"] for row in rows):
        centres, errors = zip(*[summary(rows, method, ratio) for ratio in ratios], strict=True)
        axes.errorbar(
            ratios, centres, None if None in errors else errors, label=method, marker="o", capsize=3
        )
    axes.axhline(
        mean(row["unpruned"] for row in rows), color="grey", linestyle=":", label="unpruned"
    )
    axes.set(xscale="log", xlabel="kernels to keep", ylabel="test accuracy")
    axes.set_xticks(ratios, [f"{ratio:.1%}" for ratio in ratios], minor=False)
    axes.minorticks_off()
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing; write and show the table and the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("sweep"), help="of the results")
    parser.add_argument("--methods", nargs="+", default=["lean", "path", "relevance", "l1"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.1, 0.05, 0.02])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6, help="of training, and after each step")
    parser.add_argument("--steps", type=int, default=5, help="pruning steps")
    parser.add_argument("--workers", type=int, help="processes on this machine, else one a core")
    options = parser.parse_args(arguments)
    folder, fixed = options.folder.resolve(), {"epochs": options.epochs, "steps": options.steps}
    grid = itertools.product(options.methods, options.ratios, options.seeds)
    cases = [{"method": m, "ratio": ratio, "seed": seed, **fixed} for m, ratio, seed in grid]
    run_missing(cases, folder, options.workers)
    rows = [json.loads(file_of(case, folder).read_text()) for case in cases]
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, folder / "accuracy.png")
    print(table(rows), f"written to {folder}: results.csv, accuracy.png", sep="\n")


if __name__ == "__main__":
    main()
