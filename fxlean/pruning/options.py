"""Checks of the arguments of `prune`, `iterate` and `trace`, before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from inspect import signature
from numbers import Real
from typing import Any

from ..errors import ArgumentError
from ..norms.operator import ORDERS
from ..selection.methods import METHODS, SHARE
from ..tracing.arguments import check_model, resolve_ignored, unwrapped


def check(
    model: Any,
    ratio: Any = 1.0,
    *,
    method: Any = "lean",
    norm: Any = "spectral",
    ignore: Any = (),
    progress: Any = None,
    calibration: Any = None,
    **flags: Any,
) -> None:
    """Reject arguments that make no sense, before anything is touched.

    Batches for calibration are looked at when they are read.
    """
    check_model(model)
    check_ratio(ratio)
    norms = (*ORDERS, SHARE)
    for name, value, known in (("method", method, METHODS), ("norm", norm, norms)):
        if not isinstance(value, str) or value not in known:
            raise ArgumentError(f"{name} is {value!r}. Pass one of {', '.join(known)}.")
    for name, value in {**flags, "progress": progress is not None and progress}.items():
        if not isinstance(value, bool):
            raise ArgumentError(f"{name} is {value!r}. Pass True or False.")
    resolve_ignored(unwrapped(model), ignore)


def check_ratio(ratio: Any) -> None:
    """Reject what is no fraction of kernels to keep."""
    number = isinstance(ratio, Real) and not isinstance(ratio, bool)
    if not number or math.isnan(ratio) or not 0 < ratio <= 1:
        raise ArgumentError(
            f"ratio is {ratio!r}. Pass the fraction of kernels to keep, above 0 and at most 1: "
            "0.05 keeps 5 %."
        )


def check_names(options: Iterable[str], function: Callable[..., Any]) -> None:
    """Reject names of options that a function does not know."""
    known = [p.name for p in signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            close = get_close_matches(name, known, 1)
            meant = f" Did you mean {close[0]}?" if close else ""
            raise ArgumentError(f"{name} is no option.{meant} Pass any of {', '.join(known)}.")
