"""Accuracy without labels: pruned, repaired, repaired in rounds, and distilled.

    python benchmarks/oneshot.py [--networks residual MS-D] [--seeds 3] [--stages once rounds]

The networks of `trained.py`, each seed with data and weights of its own, are pruned by every method
to every ratio without a label or a training step. Measurements go to `benchmarks/oneshot.json`, one
by one, so that an interrupted run goes on where it stopped; from it come the figure in
`docs/images` and the tables of `docs/results.md`, between the marks there (`--publish` alone makes
these). Stages: `once` is pruning, batch norm statistics measured anew, and one repair; `rounds` are
rounds of both, with distillation after them for relevance; `noise` is rounds on noise in place of
images; `counts` are fewer and more rounds, and `tuned` is fine-tuning with labels, neither by
default.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from oneshot_tables import publish
from tqdm import tqdm
from trained import NETWORKS, ROOT, Task, trained  # first: it makes the examples importable

from circle_square import replacing  # isort: skip

import fxlean
from fxlean.calibration.repair_model import repair_towards
from fxlean.calibration.statistics import measure_statistics

METHODS = ("relevance", "path", "lean", "l1", "random")
RATIOS = (0.8, 0.5, 0.3, 0.2, 0.1, 0.05)
FEWER = (0.5, 0.2, 0.1)  # what other methods are asked for
LITTLE = (0.1, 0.05)  # what is distilled
ROUNDS = 4
COUNTS = (2, 8)  # of rounds, beside these
STEPS = 200  # of distillation
EPOCHS = (1, 3, 10)  # of fine-tuning
LAST = {  # column of every stage
    "once": "repaired",
    "rounds": "rounds",
    "noise": "rounds on noise",
    "counts": f"{COUNTS[-1]} rounds",
    "tuned": f"rounds, {EPOCHS[-1]} epochs",
}
MEASURED = ROOT / "benchmarks" / "oneshot.json"
Case = tuple[str, str, float]  # stage, method and ratio
Key = tuple[str, int, str, float, str]  # network, seed, method, ratio and column


def cases(stages: Sequence[str]) -> Iterator[Case]:
    """Stage, method and ratio of all that is measured, what matters most first."""
    for stage in stages:
        for method in METHODS:
            for ratio in RATIOS:
                relevant = method == "relevance"
                if {
                    "once": relevant or ratio in FEWER,
                    "rounds": ratio <= 0.2 if relevant else method != "random" and ratio == 0.1,
                    "noise": relevant and ratio == 0.2,
                    "counts": relevant and ratio == 0.1,
                    "tuned": method in ("relevance", "lean", "l1") and ratio == 0.1,
                }[stage]:
                    yield stage, method, ratio


def measure(task: Task, stage: str, method: str, ratio: float) -> Iterator[tuple[str, float]]:
    """Columns and the accuracies in them."""
    options: dict[str, Any] = {"method": method, "progress": False, "calibration": task.batches}
    model = copy.deepcopy(task.model)
    if stage == "once":
        fxlean.prune(model, ratio, **options)
        yield "as pruned", task.accuracy(model)
        again = copy.deepcopy(model)
        measure_statistics(again, [(torch.cat(task.batches),)])
        yield "statistics", task.accuracy(again)
        batches = [(batch,) for batch in task.batches]
        repair_towards(model, batches, task.model, task.known, progress=False)
        yield "repaired", task.accuracy(model)
    elif stage == "rounds":
        list(fxlean.iterate(model, ratio, ROUNDS, repair=True, **options))
        yield "rounds", task.accuracy(model)
        if method == "relevance" and ratio in LITTLE:
            fxlean.distill(model, task.batches, task.model, STEPS, progress=False)
            yield "distilled", task.accuracy(model)
    elif stage == "noise":
        example = task.batches[0][:1]
        options["calibration"] = None
        list(fxlean.iterate(model, ratio, ROUNDS, example, repair=True, **options))
        yield "rounds on noise", task.accuracy(model)
    elif stage == "counts":
        for count in COUNTS:
            again = copy.deepcopy(model)
            list(fxlean.iterate(again, ratio, count, repair=True, **options))
            yield f"{count} rounds", task.accuracy(again)
    else:
        fxlean.prune(model, ratio, **options)
        repaired = copy.deepcopy(task.model)
        list(fxlean.iterate(repaired, ratio, ROUNDS, repair=True, **options))
        for name, start in (("pruned", model), ("rounds", repaired)):
            for epochs in EPOCHS:
                torch.manual_seed(0)
                network = fxlean.compact(start, task.batches[0][:1])
                task.tune(network, epochs, 1.0)
                yield f"{name}, {epochs} epochs", task.accuracy(network)


def read(measured: Path = MEASURED) -> dict[Key, float]:
    """What was measured before."""
    if not measured.exists():
        return {}
    rows = json.loads(measured.read_text())
    return {
        (network, seed, method, ratio, name): v for network, seed, method, ratio, name, v in rows
    }


def write(found: dict[Key, float], measured: Path = MEASURED) -> None:
    """Everything measured so far, one line each."""
    lines = [json.dumps([*key, round(value, 5)]) for key, value in sorted(found.items())]
    with replacing(measured) as partial:
        partial.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def run(
    networks: Sequence[str],
    seed: int,
    chosen: Sequence[Case],
    last: Mapping[str, str],
    measure: Callable[..., Iterator[tuple[str, float]]],
    folder: Path,
    measured: Path = MEASURED,
) -> None:
    """Measure what is missing of one seed; `last` is the last column of every stage."""
    found = read(measured)
    for network in networks:
        done = {key[2:] for key in found if key[:2] == (network, seed)}
        missing = [case for case in chosen if (case[1], case[2], last[case[0]]) not in done]
        if not missing:
            continue
        task = trained(network, seed, folder)
        found[network, seed, "", 1.0, "unpruned"] = task.accuracy(task.model)
        for case in tqdm(missing, f"{network}, seed {seed}", disable=None):
            _, method, ratio = case
            for column, value in measure(task, *case):
                found[network, seed, method, ratio, column] = value
            write(found, measured)


def main() -> None:
    """Measure what is missing, then publish."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stages", nargs="+", choices=LAST, default=list(LAST)[:3])
    parser.add_argument("--folder", type=Path, default=Path("trained"), help="for the networks")
    parser.add_argument("--publish", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", fxlean.PruneWarning)  # where a method cuts the network apart
    for seed in range(0 if options.publish else options.seeds):
        run(options.networks, seed, list(cases(options.stages)), LAST, measure, options.folder)
    publish(read(), METHODS, RATIOS)


if __name__ == "__main__":
    main()
