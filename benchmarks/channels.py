"""Accuracy of networks that lost whole channels, at equal multiply-accumulates.

    python benchmarks/channels.py [--networks residual U-Net] [--seeds 3] [--stages once rounds]

The networks of `trained.py` are pruned by whole channels to fractions of their
multiply-accumulates: by fxlean's methods and by Torch-Pruning (group magnitude, layers ranked
together or each by itself).
Stages: `once` is pruning, batch norm statistics measured anew, and one repair; `rounds` are rounds
of pruning and repair, and distillation without labels after them; `tuned` is equal fine-tuning with
labels, of what pruning leaves and of what rounds leave. Measurements go to
`benchmarks/channels.json` one by one, so that an interrupted run goes on where it stopped, and from
it to the tables of `docs/results.md` (`--publish` alone makes these).
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from oneshot import Key, read, write
from oneshot_tables import cell, insert, values
from peers import torch_pruned
from torch import nn
from tqdm import tqdm
from trained import NETWORKS, ROOT, Task, trained

import fxlean
from fxlean.calibration.statistics import measure_statistics

METHODS = ("relevance", "l1", "lean", "path", "random")
PEERS = {"Torch-Pruning, global": True, "Torch-Pruning, local": False}
RATIOS = (0.7, 0.5, 0.35, 0.25, 0.15)
TUNED = (0.5, 0.25, 0.15)  # what is fine-tuned
ROUNDS = 3
STEPS = 200  # of distillation
EPOCHS = (1, 3)
RATES = {"full rate": 1.0, "low rate": 0.1}  # fractions of the rate of the training
STAGES = ("once", "rounds", "tuned")
COLUMNS = {
    "once": ("as pruned", "statistics", "repaired"),
    "rounds": ("rounds", "distilled"),
    "tuned": tuple(f"{n} epoch{'s' * (n > 1)}, {rate}" for rate in RATES for n in EPOCHS),
}
MEASURED = ROOT / "benchmarks" / "channels.json"
MARKS = ("<!-- tables: benchmarks/channels.py -->", "<!-- end of tables of channels.py -->")


def cases(stages: Sequence[str]) -> Iterator[tuple[str, str, float]]:
    """Stage, method and ratio of all that is measured, what matters most first."""
    for stage in stages:
        for method in (*METHODS, *PEERS):
            for ratio in RATIOS:
                if {
                    "once": method in ("relevance", "l1", *PEERS) or ratio in TUNED,
                    "rounds": method == "relevance",
                    "tuned": method in ("relevance", *PEERS) and ratio in TUNED,
                }[stage]:
                    yield stage, method, ratio


def measure(task: Task, stage: str, method: str, ratio: float) -> Iterator[tuple[str, float]]:
    """Columns and the accuracies in them."""
    x = task.batches[0][:1]
    if method in PEERS:
        model = torch_pruned(task.model, x, ratio, everywhere=PEERS[method])
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
        again = copy.deepcopy(model)
        measure_statistics(again, [(torch.cat(task.batches),)])
        yield "statistics", task.accuracy(again)
        if method not in PEERS:
            fxlean.repair(model, task.batches, task.model, progress=False)
            yield "repaired", task.accuracy(model)
    elif stage == "rounds":
        yield "rounds", task.accuracy(model)
        fxlean.distill(model, task.batches, task.model, STEPS, progress=False)
        yield "distilled", task.accuracy(model)
    else:
        for column in COLUMNS["tuned"]:
            count, _, rate = column.split(" ", 2)
            torch.manual_seed(0)
            network: nn.Module = copy.deepcopy(model)
            if method not in PEERS:
                network = fxlean.compact(network, x)
            task.tune(network, int(count), RATES[rate])
            yield column, task.accuracy(network)


def run(networks: Sequence[str], seed: int, stages: Sequence[str], folder: Path) -> None:
    """Measure what is missing of one seed."""
    found = read(MEASURED)
    for network in networks:
        done = {key[2:] for key in found if key[:2] == (network, seed)}
        missing = [case for case in cases(stages) if (*case[1:], COLUMNS[case[0]][0]) not in done]
        if not missing:
            continue
        task = trained(network, seed, folder)
        found[network, seed, "", 1.0, "unpruned"] = task.accuracy(task.model)
        for case in tqdm(missing, f"{network}, seed {seed}", disable=None):
            _, method, ratio = case
            for column, value in measure(task, *case):
                found[network, seed, method, ratio, column] = value
            write(found, MEASURED)


def format_network(found: dict[Key, float], network: str) -> str:
    """The table of one network."""
    unpruned = values(found, network, "", 1.0, "unpruned")
    names = [name for stage in STAGES for name in COLUMNS[stage]]
    seeds = "1 seed" if len(unpruned) == 1 else f"{len(unpruned)} seeds"
    lines = [f"**{network}**, {seeds}, unpruned {cell(unpruned)}:", ""]
    lines += [f"| method | MACs | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for method in (*METHODS, *PEERS):
        for ratio in RATIOS:
            cells = [cell(values(found, network, method, ratio, name)) for name in names]
            if any(cells):
                lines.append(f"| {method} | {ratio:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, then publish."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    choices = [name for name in NETWORKS if name != "MS-D"]  # its layers are one channel wide
    parser.add_argument("--networks", nargs="+", choices=choices, default=choices)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--folder", type=Path, default=Path("trained"), help="for the networks")
    parser.add_argument("--publish", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", fxlean.PruneWarning)
    for seed in range(0 if options.publish else options.seeds):
        run(options.networks, seed, options.stages, options.folder)
    found = read(MEASURED)
    known = [name for name in choices if values(found, name, "", 1.0, "unpruned")]
    insert(MARKS, "\n\n".join(format_network(found, name) for name in known))


if __name__ == "__main__":
    main()
