"""Accuracy without labels: pruned, repaired, repaired in rounds, and distilled.

    python benchmarks/oneshot.py [--networks residual MS-D] [--jobs 2] [--stages once rounds]

The networks of `trained.py`, each seed with data and weights of its own, are pruned by every method
to every ratio without a label or a training step. Measurements go to `benchmarks/oneshot.json`, one
by one, so that an interrupted run goes on where it stopped; from it come the figure in
`docs/images` and the tables of `docs/results.md`, between the marks there (`--publish` alone makes
these). Stages: `once` is pruning, batch norm statistics measured anew, and one repair; `rounds` are
rounds of both, and `distilled` the same where little is left, with distillation after them; `noise`
is rounds of relevance on noise in place of images; `counts` are fewer and more rounds, and `tuned`
is fine-tuning with labels, neither by default.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from measurements import Case, parser, run
from oneshot_tables import publish
from trained import NETWORKS, ROOT, Task, remeasured

import fxlean
from fxlean.calibration.repair_model import repair_towards

METHODS = ("relevance", "path", "lean", "l1", "random")
RATIOS = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
LITTLE = (0.2, 0.1, 0.05)  # what is distilled
ROUNDS = 4
COUNTS = (2, 8)  # of rounds, beside these
STEPS = 200  # of distillation
EPOCHS = (1, 3, 10)  # of fine-tuning
LAST = {  # column of every stage
    "once": "repaired",
    "rounds": "rounds",
    "distilled": "distilled",
    "noise": "rounds on noise",
    "counts": f"{COUNTS[-1]} rounds",
    "tuned": f"rounds, {EPOCHS[-1]} epochs",
}
MEASURED = ROOT / "benchmarks" / "oneshot.json"


def cases(stages: Sequence[str]) -> Iterator[Case]:
    """Stage, method and ratio of all that is measured."""
    for stage in stages:
        for method in METHODS:
            for ratio in RATIOS:
                if {
                    "once": True,
                    "rounds": ratio not in LITTLE,
                    "distilled": ratio in LITTLE,
                    "noise": method == "relevance",
                    "counts": method == "relevance" and ratio == 0.1,
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
        yield "statistics", task.accuracy(remeasured(model, task))
        batches = [(batch,) for batch in task.batches]
        repair_towards(model, batches, task.model, task.known, progress=False)
        yield "repaired", task.accuracy(model)
    elif stage in ("rounds", "distilled"):
        list(fxlean.iterate(model, ratio, ROUNDS, repair=True, **options))
        yield "rounds", task.accuracy(model)
        if stage == "distilled":
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


def main() -> None:
    """Measure what is missing, then publish."""
    options = parser(__doc__, list(NETWORKS), list(LAST), list(LAST)[:4]).parse_args()
    found = run(options, list(cases(options.stages)), LAST, measure, MEASURED)
    publish(found, METHODS, RATIOS)


if __name__ == "__main__":
    main()
