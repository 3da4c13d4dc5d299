"""The errors that fxlean raises, all descendants of `FxleanError`, and its warnings."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType

from torch import Tensor

# Frames that are not a caller's: ours, and those of our decorators.
INSIDE = ("fxlean.", "contextlib", "torch.utils._contextlib")

_told: ContextVar[set[str] | None] = ContextVar("told", default=None)  # in the current call


class FxleanError(Exception):
    """Something that fxlean cannot do; the message says what, where and what to do next."""


class ArgumentError(FxleanError, ValueError):
    """An argument that makes no sense; raised before anything is touched."""


class TraceError(FxleanError, RuntimeError):
    """The model could not be run on the example inputs, so there is no graph to prune."""


class CompactionError(FxleanError, RuntimeError):
    """The compacted model does not compute what the pruned one does; nothing was changed."""


class PruneWarning(UserWarning):
    """The result is right, but may surprise: operators without a rule, or nothing left."""


class CompactionWarning(UserWarning):
    """Part of the model stays as large as it was; the result is right."""


def some(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are; for messages."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def counted(number: int, noun: str) -> str:
    """A number of things; for messages.

    >>> counted(1, "sample"), counted(1600, "sample")
    ('1 sample', '1,600 samples')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def by_reason(skipped: Mapping[str, str]) -> list[str]:
    """One line for each reason, with the layers that were left alone for it."""
    layers: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        layers.setdefault(reason, []).append(name)
    return [f"{some(names)}: {reason}" for reason, names in layers.items()]


def shown(value: object) -> str:
    """A value in a message: tensors, and whatever is as long, by what they are."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"


def first_line(err: BaseException) -> str:
    """The type of an error that is not ours, and the first line of its message."""
    lines = str(err).strip().splitlines()
    if isinstance(err, FxleanError):
        return lines[0]
    return f"{type(err).__name__}: {lines[0][:300]}" if lines else type(err).__name__


@contextmanager
def telling_once() -> Iterator[None]:
    """Give no warning twice: for a call that traces or copies several times."""
    token = None if _told.get() is not None else _told.set(set())
    try:
        yield
    finally:
        if token is not None:
            _told.reset(token)


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line outside of the library that has called it."""
    told = _told.get()
    if told is not None:
        if message in told:
            return
        told.add(message)
    warnings.warn(message, category, stacklevel=_outside()[1] + 1)


def place_of_call() -> tuple[str, int]:
    """File and line outside of the library that has called it, for a warning later on."""
    frame, _ = _outside()
    return (frame.f_code.co_filename, frame.f_lineno) if frame else ("sys", 1)


def _outside() -> tuple[FrameType | None, int]:
    """The frame that has called the library, and how far it is above the caller of this."""
    frame: FrameType | None = sys._getframe(1)
    level = 0
    while frame is not None and frame.f_globals.get("__name__", "").startswith(INSIDE):
        frame, level = frame.f_back, level + 1
    return frame, level
