"""How much each step of a schedule keeps, and schedules that nobody loops over."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from ..errors import ArgumentError, PruneWarning, place_of_call
from ..tracing.arguments import check_count
from .options import check_ratio

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def schedule(ratio: float, steps: int) -> list[float]:
    """The fraction of the kernels that each step keeps: step t of n keeps `ratio ** (t / n)`.

    Args:
        ratio: that the last step keeps, in (0, 1].
        steps: number of steps, at least 1.

    Raises:
        ArgumentError: one of them is out of range.

    Source: Schoonhoven, Hendriksen, Pelt and Batenburg, arXiv 2011.06923.

    >>> schedule(0.125, 3)
    [0.5, 0.25, 0.125]
    """
    check_ratio(ratio)
    check_count("steps", steps)
    return [ratio ** (step / steps) for step in range(1, steps + 1)]


def check_start(start: Any, steps: int, *, repair: bool) -> None:
    """Reject a number of steps that were not, or that cannot be gone on from."""
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start <= steps:
        raise ArgumentError(
            f"start is {start!r}. Pass how many of the {steps} steps are done, 0 to {steps}."
        )
    if start and repair:
        raise ArgumentError(
            f"start is {start} with repair=True, but what is pruned already is no reference to "
            "repair towards. Loop over fxlean.schedule(ratio, steps)[start:], and call "
            "fxlean.prune(model, ratio) and fxlean.repair(model, batches, reference) for each."
        )


class _Steps(Iterator[Result]):
    """Results of steps that are made as somebody loops over them; warns if nobody ever does."""

    def __init__(self, steps: Iterator[Result]) -> None:
        self._steps, self._begun, self._place = steps, False, place_of_call()

    def __next__(self) -> Result:
        self._begun = True
        return next(self._steps)

    def __del__(self) -> None:
        if not self._begun:
            warnings.warn_explicit(  # at the call: where it dies, nothing may run any more
                "nothing was pruned: fxlean.iterate prunes as you loop over what it returns, and "
                "nobody did. Write `for result in fxlean.iterate(...): finetune(model)`.",
                PruneWarning,
                *self._place,
            )


def to_be_looped_over(
    function: Callable[Arguments, Iterator[Result]],
) -> Callable[Arguments, Iterator[Result]]:
    """A function that warns if what it has returned is thrown away unused."""

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Iterator[Result]:
        return _Steps(function(*args, **kwargs))

    return call
