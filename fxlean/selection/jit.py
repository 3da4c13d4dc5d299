"""Functions that numba compiles, once after every installation.

Numba takes longer to import than all the rest of fxlean, so modules that import this one are
imported where they are first needed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numba
from numba.core import event

jit: Callable[..., Any] = numba.njit(cache=True)
inlined: Callable[..., Any] = numba.njit(cache=True, inline="always")


class _Listener(event.Listener):
    """Calls a function when a compilation begins."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call

    def on_start(self, event: event.Event) -> None:
        self.call()

    def on_end(self, event: event.Event) -> None:
        pass


def when_compiling(call: Callable[[], object]) -> AbstractContextManager[Any]:
    """A context in which `call` is called whenever a function is not in the cache."""
    manager: AbstractContextManager[Any] = event.install_listener("numba:compile", _Listener(call))
    return manager
