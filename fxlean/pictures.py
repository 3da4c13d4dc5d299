"""Results as figures of matplotlib and as tables in HTML, from plain numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ArgumentError

GREY, BLUE, ORANGE = "#c8ccd0", "#1f77b4", "#e6862b"
KINDS = ("#2b8a3e", BLUE, "#9467bd", GREY)  # of channels: live, sum, product, dead
MOST_CHANNELS = 300  # in a drawing of a graph


def _subplots(columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A new figure that no window shows by itself, and its axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as err:
        raise ImportError("figures need matplotlib: pip install matplotlib") from err
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)
    return figure, list(axes[0])


def bars(
    names: Sequence[str], panels: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> Any:
    """A figure with a row for each layer: what is left, in front of what there was.

    Args:
        names: of the layers, from top to bottom.
        panels: by title, what there was and what is left in each layer.
    """
    figure, axes = _subplots(len(panels), 1.5 + 3.0 * len(panels), 1.2 + 0.22 * len(names))
    rows = np.arange(len(names))
    for ax, (title, (before, after)) in zip(axes, panels.items(), strict=True):
        ax.barh(rows, before, color=GREY, label="before")
        ax.barh(rows, after, height=0.5, color=BLUE, label="left")
        share = sum(after) / max(1, sum(before))
        ax.set_title(f"{title}: {share:.1%} left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        ax.xaxis.set_major_formatter(lambda value, _: _short(value))
        ax.locator_params(axis="x", nbins=4)
    axes[0].set_yticks(rows, names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _short(value: float) -> str:
    """A large number in a few characters: 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def drawing(
    kinds: NDArray[np.uint8],
    edges: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]],
    kept: NDArray[np.bool_],
    fixed: NDArray[np.bool_],
    names: Sequence[str],
) -> Any:
    """A figure of a small graph: channels from left to right by their longest way from an input.

    Args:
        kinds: of the channels.
        edges: source, target and length of each edge.
        kept: shape (edges,), True for those in colour, the wider the longer.
        fixed: shape (edges,), True for those that no weight makes, drawn dashed.
        names: of the channels, of which the first of each column is written.

    Raises:
        ArgumentError: more channels than a drawing can show.
    """
    sources, targets, lengths = edges
    used = np.union1d(sources, targets)
    if len(used) > MOST_CHANNELS:
        raise ArgumentError(
            f"the graph has {len(used):,} channels, and a drawing shows up to {MOST_CHANNELS}. "
            "Trace a smaller network, or give graph.adjacency() to a tool for large graphs."
        )
    depth = np.zeros(len(kinds), dtype=np.int64)
    for u, v in zip(sources, targets, strict=True):  # by target, so depths of sources are known
        depth[v] = max(depth[v], depth[u] + 1)
    height = np.zeros(len(kinds))
    for column in np.unique(depth[used]):
        here = used[depth[used] == column]
        height[here] = np.arange(len(here)) - (len(here) - 1) / 2
    figure, (ax,) = _subplots(1, 2 + 1.3 * depth.max(), 1.5 + 0.3 * np.ptp(height))
    longest = lengths[~fixed].max(initial=1e-12)
    for number in np.argsort(kept, kind="stable"):  # those in colour on top
        u, v = sources[number], targets[number]
        chosen = kept[number] and not fixed[number]
        width = 0.3 + 2.2 * lengths[number] / longest if chosen else 0.5
        ax.plot(
            *_curve((depth[u], -height[u]), (depth[v], -height[v])),
            color=ORANGE if chosen else GREY,
            linewidth=1.0 if fixed[number] else width,
            linestyle="--" if fixed[number] else "-",
            zorder=1,
        )
    colours = [KINDS[kind] for kind in kinds[used]]
    ax.scatter(depth[used], -height[used], s=36, c=colours, zorder=2, edgecolors="white")
    base = height.max() + 0.7
    for column in np.unique(depth[used]):
        name = names[used[depth[used] == column][0]]
        ax.text(column, -base, re.split(r"[\[ ]", name)[0], ha="center", va="top", fontsize=10)
    ax.set_ylim(-base - 0.6, base)
    ax.margins(x=0.08)
    ax.set_axis_off()
    return figure


def _curve(start: tuple[float, float], end: tuple[float, float]) -> tuple[Any, Any]:
    """A line to the next column, or a bow around the columns between."""
    along = np.linspace(0, 1, 30)
    bow = 0.4 * (end[0] - start[0] > 1)
    x, y = (a + (b - a) * along for a, b in zip(start, end, strict=True))
    return x, y + bow * np.sin(np.pi * along)


def html_table(
    heading: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()
) -> str:
    """A table in HTML whose last row is the total, and lines below it."""
    body = [[escape(cell) for cell in row] for row in rows]
    lines = ["<table>", _cells(map(escape, heading), "th"), *(_cells(row, "td") for row in body)]
    return "\n".join(
        [*lines, "</table>", *(f"<div>{escape(note)}</div>" for note in notes if note)]
    )


def _cells(cells: Iterable[str], tag: str) -> str:
    first, *others = cells
    right = "".join(f"<{tag} style='text-align:right'>{cell}</{tag}>" for cell in others)
    return f"<tr><{tag} style='text-align:left'>{first}</{tag}>{right}</tr>"
