"""The stages of a call: their times, and a bar on a terminal."""

from __future__ import annotations

import time

from tqdm import tqdm

STAGES = ("trace", "norms", "select", "masks")
DELAY = 1.0  # seconds before progress is shown


class Stages:
    """Times the stages of a call, and shows them on a terminal if they take seconds."""

    def __init__(self, progress: bool | None) -> None:
        self.seconds: dict[str, float] = {}
        disable = None if progress is None else not progress
        self._bar = tqdm(
            total=len(STAGES),
            bar_format="{desc} |{bar}| {n}/{total} [{elapsed}]",
            delay=DELAY,
            leave=False,
            disable=disable,
        )
        self._current: str | None = None
        self._began = time.perf_counter()

    def __enter__(self) -> Stages:
        return self

    def start(self, stage: str) -> None:
        """Begin a stage, which ends the one before."""
        self._stop()
        self._current, self._since = stage, time.perf_counter()
        self._show(stage, now=self._since - self._began > DELAY)

    def compiling(self) -> None:
        """Say why this stage takes longer than it will the next time."""
        self._show(f"{self._current}, compiling for the first time", now=True)

    def _show(self, text: str, *, now: bool) -> None:
        self._bar.set_description_str(f"fxlean: {text}", refresh=now)

    def _stop(self) -> None:
        if self._current is not None:
            self.seconds[self._current] = time.perf_counter() - self._since
            self._bar.update()

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._bar.close()
