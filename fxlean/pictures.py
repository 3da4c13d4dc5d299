"""Results as figures of matplotlib and as tables in HTML, from plain numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ArgumentError, some

GREY, BLUE, ORANGE = "#c8ccd0", "#1f77b4", "#e6862b"
KINDS = {"live": "#2b8a3e", "sum": BLUE, "product": "#9467bd", "dead": GREY}  # of channels
CHAINS = (ORANGE, "#d62728", "#17becf", "#8c564b", "#e377c2", "#bcbd22")
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
    _write_legend(figure, axes[0].containers, 2)
    return figure


def _write_legend(figure: Any, handles: Sequence[Any], columns: int) -> None:
    """A small legend below, without a frame."""
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )


def _short(value: float) -> str:
    """A large number in a few characters: 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def drawing(
    kinds: NDArray[np.uint8],
    edges: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]],
    kept: NDArray[np.bool_ | np.integer],
    fixed: NDArray[np.bool_],
    names: Sequence[str],
) -> Any:
    """A figure of a small graph: channels from left to right by their longest way from an input.

    Args:
        kinds: of the channels.
        edges: source, target and length of each edge.
        kept: shape (edges,), True for those in colour, the wider the longer; or integers, of which
            each positive one has a colour of its own, until the colours begin again.
        fixed: shape (edges,), True for those that are no kernel, drawn dashed.
        names: of the channels; the commonest of each column is written, without its index.

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
    depth, height = _places(used, sources, targets, len(kinds))
    width = 2 + 1.3 * depth.max()
    legend = _legend(kinds[used], kept, fixed)
    columns = max(1, int(width / (0.45 + 0.06 * max(map(len, legend), default=1))))
    lines = -(-len(legend) // columns)
    figure, (ax,) = _subplots(1, width, 1.5 + 0.3 * np.ptp(height) + 0.2 * lines)
    longest = lengths[~fixed].max(initial=1e-12)
    for number in np.argsort(kept, kind="stable"):  # those in colour on top
        u, v = sources[number], targets[number]
        style = _line(kept[number], fixed[number], lengths[number] / longest)
        ax.plot(*_curve((depth[u], -height[u]), (depth[v], -height[v])), zorder=1, **style)
    colours = np.array(list(KINDS.values()))[kinds[used]]
    ax.scatter(depth[used], -height[used], s=36, c=colours, zorder=2, edgecolors="white")
    base = height.max() + 0.7
    for column in np.unique(depth[used]):
        words = [re.split(r"[\[ ]", names[c])[0] for c in used[depth[used] == column]]
        word = max(reversed(words), key=words.count)  # the last of equals, as constants come first
        ax.text(column, -base, word, ha="center", va="top", fontsize=10)
    ax.set_ylim(-base - 0.6, base)
    ax.margins(x=0.08)
    ax.set_axis_off()
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=label, **style) for label, style in legend.items()]
    _write_legend(figure, handles, columns)
    return figure


def _places(
    used: NDArray[np.int32], sources: NDArray[np.int32], targets: NDArray[np.int32], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Of every channel in use its column, and its height in the column."""
    depth = np.zeros(count, dtype=np.int64)
    for u, v in zip(sources, targets, strict=True):  # by target, so depths of sources are known
        depth[v] = max(depth[v], depth[u] + 1)
    height = np.zeros(count)
    for column in np.unique(depth[used]):
        here = used[depth[used] == column]
        height[here] = np.arange(len(here)) - (len(here) - 1) / 2
    return depth, height


def _line(kept: int, fixed: bool, length: float) -> dict[str, Any]:
    """How an edge is drawn; its length is a fraction of the longest."""
    if fixed:
        return {"color": GREY, "linewidth": 1.0, "linestyle": "--"}
    if kept <= 0:
        return {"color": GREY, "linewidth": 0.5}
    return {"color": _chain_colour(kept), "linewidth": 0.3 + 2.2 * length}


def _chain_colour(number: int) -> str:
    """The colour of a positive number."""
    return CHAINS[(int(number) - 1) % len(CHAINS)]


def _legend(
    kinds: NDArray[np.uint8], kept: NDArray[np.bool_ | np.integer], fixed: NDArray[np.bool_]
) -> dict[str, dict[str, Any]]:
    """What there is among channels and edges, and how it is drawn."""
    dot = {"marker": "o", "linestyle": "", "markeredgecolor": "white"}
    found = {
        name: {"color": colour, **dot}
        for kind, (name, colour) in enumerate(KINDS.items())
        if kind in kinds
    }
    chains: dict[str, list[int]] = {}
    for number in np.unique(kept[kept > 0]).tolist():
        chains.setdefault(_chain_colour(number), []).append(number)
    for numbers in chains.values():
        label = "kept" if kept.dtype == bool else f"chain {some([str(n) for n in numbers])}"
        found[label] = _line(numbers[0], False, 0.6)
    if (~fixed & (kept <= 0)).any():
        found["not kept"] = _line(0, False, 0.6)
    if fixed.any():
        found["fixed"] = _line(0, True, 0.6)
    return found


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
