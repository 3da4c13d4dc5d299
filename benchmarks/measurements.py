"""Measurements of trained networks, several at a time, kept one by one in a file.

A measurement is a number in a column, of a network of `trained.py`, a seed, a method and a ratio.
What the file holds is not measured again, so a run that was broken off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm
from trained import Task, trained  # first: it makes the examples importable

from circle_square import replacing  # isort: skip

import fxlean

Case = tuple[str, str, float]  # stage, method and ratio
Key = tuple[str, int, str, float, str]  # network, seed, method, ratio and column
Found = Mapping[Key, float]
Measure = Callable[[Task, str, str, float], Iterator[tuple[str, float]]]

known_task = cache(trained)


def parser(
    about: str | None, networks: Sequence[str], stages: Sequence[str], usual: Sequence[str]
) -> argparse.ArgumentParser:
    """The options of a benchmark that measures stages of networks, the usual ones by default."""
    result = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    result.add_argument("--networks", nargs="+", choices=networks, default=networks)
    result.add_argument("--seeds", type=int, default=5)
    result.add_argument("--stages", nargs="+", choices=stages, default=usual)
    result.add_argument("--folder", type=Path, default=Path("checkpoints"), help="for the networks")
    result.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    result.add_argument("--device", default="cpu", help="for networks that label pixels")
    result.add_argument("--publish", action="store_true", help="measure nothing")
    return result


def read(measured: Path) -> dict[Key, float]:
    """What was measured before."""
    if not measured.exists():
        return {}
    rows = json.loads(measured.read_text())
    return {
        (network, seed, method, ratio, name): v for network, seed, method, ratio, name, v in rows
    }


def write(found: Found, measured: Path) -> None:
    """Everything measured so far, one line each."""
    lines = [json.dumps([*key, round(value, 5)]) for key, value in sorted(found.items())]
    with replacing(measured) as partial:
        partial.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def run(
    options: argparse.Namespace,
    cases: Sequence[Case],
    last: Mapping[str, str],
    measure: Measure,
    measured: Path,
) -> dict[Key, float]:
    """Measure what is missing, unless told not to; `last` is the last column of every stage."""
    found = read(measured)
    missing = [
        ((network, seed, options.folder, options.device), case)
        for seed in range(0 if options.publish else options.seeds)
        for case in cases
        for network in options.networks
        if (network, seed, *case[1:], last[case[0]]) not in found
    ]
    if not missing:
        return found
    context = get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, initializer=_start) as pool:
        tasks = list(dict.fromkeys(task for task, _ in missing))
        for accuracies in tqdm(pool.map(_unpruned, tasks), "networks", len(tasks), disable=None):
            found |= accuracies
        futures = [pool.submit(_measured, measure, task, case) for task, case in missing]
        for future in tqdm(as_completed(futures), "measurements", len(futures), disable=None):
            found |= future.result()
            write(found, measured)
    return found


def _start() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", fxlean.PruneWarning)  # where a method cuts a network apart


def _unpruned(which: tuple[str, int, Path, str]) -> dict[Key, float]:
    """The accuracy of a network, which is trained if it has not been."""
    task = known_task(*which)
    return {(*which[:2], "", 1.0, "unpruned"): task.accuracy(task.model)}


def _measured(measure: Measure, which: tuple[str, int, Path, str], case: Case) -> dict[Key, float]:
    """The columns of one case."""
    columns = measure(known_task(*which), *case)
    return {(*which[:2], *case[1:], column): value for column, value in columns}
