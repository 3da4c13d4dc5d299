"""Accuracy of networks that lost whole channels, at equal multiply-accumulates.

    python benchmarks/channels.py [--networks residual U-Net] [--jobs 2] [--stages once rounds]

The networks of `trained.py` are pruned by whole channels to fractions of their
multiply-accumulates: by fxlean's methods and by Torch-Pruning (group magnitude, layers ranked
together or each by itself).
Stages: `once` is pruning, batch norm statistics measured anew, and one repair; `rounds` are rounds
of pruning and repair, and distillation without labels after them; `tuned` is equal fine-tuning with
labels, of what pruning leaves and of what rounds leave; `speed` is the time of a batch on this
machine, which must be idle, as a fraction of the unpruned network's; not by default. Measurements
go to `benchmarks/channels.json` one by one, so that an interrupted run goes on where it stopped,
and from it to the tables of `docs/results.md` and the figure in `docs/images` (`--publish` alone
makes these).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from compaction import medians
from matplotlib.figure import Figure
from measurements import Case, Found, parser, run
from oneshot_tables import cell, heading, values
from peers import torch_pruned
from results import insert
from torch import nn
from trained import NETWORKS, ROOT, Task, remeasured

from circle_square import replacing  # isort: skip

import fxlean

METHODS = ("relevance", "l1", "lean", "path", "random")
PEERS = {"Torch-Pruning, global": True, "Torch-Pruning, local": False}
RATIOS = (0.7, 0.5, 0.35, 0.25, 0.15)
TUNED = (0.5, 0.25, 0.15)  # what is fine-tuned
ROUNDS = 3
STEPS = 200  # of distillation
EPOCHS = (1, 3, 10)
RATES = {"full rate": 1.0, "low rate": 0.1}  # fractions of the rate of the training
STAGES = ("once", "rounds", "tuned", "speed")
RUNS = 31  # of every network whose time is taken
COLUMNS = {
    "once": ("as pruned", "statistics", "repaired"),
    "rounds": ("rounds", "distilled"),
    "tuned": tuple(f"{n} epoch{'s' * (n > 1)}, {rate}" for rate in RATES for n in EPOCHS),
    "speed": ("time",),
}
LAST = {stage: names[-1] for stage, names in COLUMNS.items()} | {"once": "statistics"}
MEASURED = ROOT / "benchmarks" / "channels.json"
FIGURE = ROOT / "docs" / "images" / "channels.png"
LINES = (  # method, column, label and style
    ("relevance", "rounds", "fxlean, three rounds", "C0-"),
    ("relevance", "distilled", "fxlean, distilled", "C0--"),
    ("Torch-Pruning, global", "statistics", "Torch-Pruning, global; statistics anew", "C1-"),
    ("Torch-Pruning, local", "statistics", "Torch-Pruning, local; statistics anew", "C2-"),
)
MARKS = ("<!-- tables: benchmarks/channels.py -->", "<!-- end of tables of channels.py -->")


def cases(stages: Sequence[str]) -> Iterator[Case]:
    """Stage, method and ratio of all that is measured, what matters most first."""
    for stage in stages:
        for method in (*METHODS, *PEERS):
            for ratio in RATIOS:
                if {
                    "once": method in ("relevance", "l1", *PEERS) or ratio in TUNED,
                    "rounds": method == "relevance",
                    "tuned": method in ("relevance", *PEERS) and ratio in TUNED,
                    "speed": method in ("relevance", *PEERS),
                }[stage]:
                    yield stage, method, ratio


def measure(task: Task, stage: str, method: str, ratio: float) -> Iterator[tuple[str, float]]:
    """Columns and the accuracies in them."""
    x = task.batches[0][:1]
    if method in PEERS:
        found = torch_pruned(task.model, x, ratio, everywhere=PEERS[method])
        if found is None:
            return
        model = found
    else:
        model = copy.deepcopy(task.model)
        options: dict[str, Any] = {"method": method, "granularity": "channel", "of": "macs"}
        options |= {"progress": False, "calibration": task.batches}
        if stage == "once":
            fxlean.prune(model, ratio, x, **options)
        else:
            list(fxlean.iterate(model, ratio, ROUNDS, x, repair=True, **options))
    if stage == "once":
        yield "as pruned", task.accuracy(model)
        yield "statistics", task.accuracy(remeasured(model, task))
        if method not in PEERS:
            fxlean.repair(model, task.batches, task.model, progress=False)
            yield "repaired", task.accuracy(model)
    elif stage == "rounds":
        yield "rounds", task.accuracy(model)
        fxlean.distill(model, task.batches, task.model, STEPS, progress=False)
        yield "distilled", task.accuracy(model)
    elif stage == "speed":
        small = model.eval() if method in PEERS else fxlean.compact(model, x)
        dense, time = medians([task.model, small], task.batches[0], RUNS)
        yield "time", time / dense
    else:
        for column in COLUMNS["tuned"]:
            count, _, rate = column.split(" ", 2)
            torch.manual_seed(0)
            network: nn.Module = copy.deepcopy(model)
            if method not in PEERS:
                network = fxlean.compact(network, x)
            task.tune(network, int(count), RATES[rate])
            yield column, task.accuracy(network)


def format_network(found: Found, network: str) -> str:
    """The table of one network."""
    names = [name for stage in STAGES for name in COLUMNS[stage]]
    lines = [heading(found, network), ""]
    lines += [f"| method | MACs | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for method in (*METHODS, *PEERS):
        for ratio in RATIOS:
            cells = [cell(values(found, network, method, ratio, name)) for name in names]
            if any(cells):
                lines.append(f"| {method} | {ratio:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: Found, networks: Sequence[str]) -> None:
    """Accuracy against speed-up, without a label, of fxlean's networks and of Torch-Pruning's."""
    figure = Figure(figsize=(2 + 3.4 * len(networks), 3.8), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(networks)))
    for axes, network in zip(panels, networks, strict=True):
        dense = np.mean(values(found, network, "", 1.0, "unpruned"))
        axes.axhline(dense, color="grey", lw=0.8)
        for method, column, label, style in LINES:
            times = [values(found, network, method, ratio, "time") for ratio in RATIOS]
            marks = [values(found, network, method, ratio, column) for ratio in RATIOS]
            points = [
                (1 / np.mean(t), np.mean(m)) for t, m in zip(times, marks, strict=True) if t and m
            ]
            axes.plot(*zip((1.0, dense), *points, strict=True), style, marker=".", label=label)
        axes.set(title=network, xlabel="times as fast as the unpruned network")
    figure.axes[0].set_ylabel("accuracy, without labels")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    with replacing(FIGURE) as partial:
        figure.savefig(partial, format="png", dpi=110)


def main() -> None:
    """Measure what is missing, then publish."""
    networks = [name for name in NETWORKS if name != "MS-D"]  # its layers are one channel wide
    options = parser(__doc__, networks, STAGES, STAGES[:3]).parse_args()
    found = run(options, list(cases(options.stages)), LAST, measure, MEASURED)
    known = [name for name in networks if values(found, name, "", 1.0, "unpruned")]
    timed = [name for name in known if values(found, name, "relevance", RATIOS[0], "time")]
    if timed:
        draw(found, timed)
    insert(MARKS, "\n\n".join(format_network(found, name) for name in known))


if __name__ == "__main__":
    main()
