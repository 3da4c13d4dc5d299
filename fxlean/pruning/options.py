"""Checks of the arguments of `prune`, `iterate` and `trace`, before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from inspect import signature
from numbers import Real
from typing import Any

from ..errors import ArgumentError, shown
from ..norms.operator import ORDERS
from ..selection.methods import METHODS, SHARE
from ..tracing.arguments import check_count, check_model, resolve_ignored, unwrapped
from .targets import COUNTED

GRANULARITIES = ("kernel", "channel")
LATENCY = "latency"


def check(
    model: Any,
    ratio: Any = 1.0,
    *,
    method: Any = "lean",
    norm: Any = "spectral",
    ignore: Any = (),
    progress: Any = None,
    calibration: Any = None,
    granularity: Any = "kernel",
    of: Any = "kernels",
    at_least: Any = None,
    round_to: Any = None,
    include_linear: Any = None,
    **flags: Any,
) -> None:
    """Reject arguments that make no sense, before anything is touched.

    Batches for calibration are looked at when they are read.
    """
    check_model(model)
    check_ratio(ratio)
    choices: dict[str, tuple[Any, Collection[str]]] = {
        "method": (method, METHODS),
        "norm": (norm, (*ORDERS, SHARE)),
        "granularity": (granularity, GRANULARITIES),
    }
    if not callable(of):
        choices["of"] = (of, (*COUNTED, LATENCY))
    for name, (value, known) in choices.items():
        if not isinstance(value, str) or value not in known:
            more = ", or a function that measures a model" if name == "of" else ""
            raise ArgumentError(f"{name} is {shown(value)}. Pass one of {', '.join(known)}{more}.")
    _check_limits(at_least, round_to, granularity)
    optional = {"progress": progress, "include_linear": include_linear}
    for name, value in {**flags, **{k: v is not None and v for k, v in optional.items()}}.items():
        if not isinstance(value, bool):
            raise ArgumentError(f"{name} is {shown(value)}. Pass True or False.")
    resolve_ignored(unwrapped(model), ignore)
    if isinstance(at_least, Mapping):
        resolve_ignored(unwrapped(model), at_least, "at_least")


def check_ratio(ratio: Any) -> None:
    """Reject what is no fraction to keep."""
    number = isinstance(ratio, Real) and not isinstance(ratio, bool)
    if not number or math.isnan(ratio) or not 0 < ratio <= 1:
        raise ArgumentError(
            f"ratio is {shown(ratio)}. Pass the fraction to keep, above 0 and at most 1: "
            "0.05 keeps 5 %."
        )


def _check_limits(at_least: Any, round_to: Any, granularity: str) -> None:
    """Reject what is no fraction and no multiple."""
    fractions = (
        at_least.values()
        if isinstance(at_least, Mapping)
        else [0 if at_least is None else at_least]
    )
    for fraction in fractions:
        number = isinstance(fraction, Real) and not isinstance(fraction, bool)
        if not number or not 0 <= fraction <= 1:
            raise ArgumentError(
                f"at_least is {shown(at_least)}. Pass the fraction that every layer keeps, from 0 "
                "to 1, or a mapping from names of layers, patterns or types to fractions."
            )
    if round_to is None:
        return
    check_count("round_to", round_to)
    if round_to > 1 and granularity != "channel":
        raise ArgumentError(
            f'round_to is {round_to}, but single kernels are pruned. Pass granularity="channel" as '
            "well, or leave it out."
        )


def check_names(options: Iterable[str], function: Callable[..., Any]) -> None:
    """Reject names of options that a function does not know."""
    known = [p.name for p in signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            close = get_close_matches(name, known, 1)
            meant = f" Did you mean {close[0]}?" if close else ""
            raise ArgumentError(f"{name} is no option.{meant} Pass any of {', '.join(known)}.")
