"""Tables of `docs/results.md` and a figure, from what `oneshot.py` has measured."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from measurements import Found
from trained import NETWORKS, ROOT  # first: it makes the examples importable

from circle_square import replacing  # isort: skip
from results import insert  # isort: skip

COLUMNS = ("as pruned", "statistics", "repaired", "rounds", "distilled", "rounds on noise")
MARKS = ("<!-- tables: benchmarks/oneshot.py -->", "<!-- end of tables of oneshot.py -->")
STYLES = {"as pruned": ":", "repaired": "-", "rounds": "--"}  # of lines, by column
TICKS = (0.8, 0.4, 0.2, 0.1, 0.05)
FIGURE = ROOT / "docs" / "images" / "oneshot.png"


def values(found: Found, network: str, method: str, ratio: float, column: str) -> list[float]:
    """What was measured of all seeds."""
    wanted = (network, method, ratio, column)
    return [value for (name, _, *rest), value in found.items() if (name, *rest) == wanted]


def cell(numbers: Sequence[float]) -> str:
    """Mean and standard error, as far as they are known."""
    if not numbers:
        return ""
    if len(numbers) < 2:
        return f"{np.mean(numbers):.3f}"
    return f"{np.mean(numbers):.3f} ± {np.std(numbers, ddof=1) / len(numbers) ** 0.5:.3f}"


def heading(found: Found, network: str) -> str:
    """The line above the table of a network."""
    unpruned = values(found, network, "", 1.0, "unpruned")
    seeds = "1 seed" if len(unpruned) == 1 else f"{len(unpruned)} seeds"
    return f"**{network}**, {seeds}, unpruned {cell(unpruned)}:"


def format_network(
    found: Found, network: str, methods: Sequence[str], ratios: Sequence[float]
) -> str:
    """The table of one network."""
    lines = [heading(found, network), ""]
    lines += [f"| method | kept | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for method in methods:
        for ratio in ratios:
            cells = [cell(values(found, network, method, ratio, name)) for name in COLUMNS]
            if any(cells):
                lines.append(f"| {method} | {ratio:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_rounds(found: Found) -> str:
    """Accuracies by the number of rounds that led to a tenth of the kernels."""
    columns = {"1": "repaired", "2": "2 rounds", "4": "rounds", "8": "8 rounds"}
    networks = [name for name in NETWORKS if values(found, name, "relevance", 0.1, "8 rounds")]
    lines = [f"| network | unpruned | {' | '.join(columns)} |", "|---" * 6 + "|"]
    for name in networks:
        cells = [cell(values(found, name, "relevance", 0.1, column)) for column in columns.values()]
        unpruned = cell(values(found, name, "", 1.0, "unpruned"))
        lines.append(f"| {name} | {unpruned} | {' | '.join(cells)} |")
    return "\n".join(["**A tenth of the kernels, by the number of rounds**:", "", *lines])


def format_tuning(found: Found) -> str:
    """Accuracies after fine-tuning, in columns by where it began and for how long."""
    names = list(dict.fromkeys(key[4] for key in found if key[4].endswith("epochs")))
    rows = sorted({(key[0], key[3], key[2]) for key in found if key[4].endswith("epochs")})
    if not rows:
        return ""
    names.sort(key=lambda name: (name.split(",")[0], int(name.split()[1])))
    lines = [f"| network | kept | method | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for network, ratio, method in rows:
        cells = [cell(values(found, network, method, ratio, name)) for name in names]
        lines.append(f"| {network} | {ratio:g} | {method} | {' | '.join(cells)} |")
    return "\n".join(
        ["**Fine-tuned with labels**, after pruning alone and after rounds:", "", *lines]
    )


def draw(found: Found, methods: Sequence[str], ratios: Sequence[float]) -> None:
    """Accuracy against kept kernels, a panel for each network and one for what the lines mean."""
    networks = [name for name in NETWORKS if any(key[0] == name for key in found)]
    rows = len(networks) // 2 + 1
    figure = Figure(figsize=(8, 3.2 * rows), layout="constrained")
    panels = list(figure.subplots(rows, 2).flat)
    for axes, network in zip(panels, networks, strict=False):
        axes.axhline(np.mean(values(found, network, "", 1.0, "unpruned")), color="grey", lw=0.8)
        for (number, method), column in product(enumerate(methods), STYLES):
            if column == "rounds" and method != "relevance":
                continue
            points = {r: values(found, network, method, r, column) for r in ratios}
            points = {r: np.mean(v) for r, v in points.items() if v}
            style = {"color": f"C{number}", "linestyle": STYLES[column], "marker": "."}
            axes.plot(list(points), list(points.values()), **style)
        axes.set(xscale="log", title=network, xlabel="fraction of kernels kept")
        axes.set_ylabel("accuracy, without training")
        axes.set_xticks(TICKS, labels=[f"{ratio:g}" for ratio in TICKS])
        axes.minorticks_off()
        axes.invert_xaxis()
    handles = [
        Line2D([], [], color=f"C{number}", label=name) for number, name in enumerate(methods)
    ]
    handles += [Line2D([], [], color="k", linestyle=STYLES[name], label=name) for name in STYLES]
    handles += [Line2D([], [], color="grey", lw=0.8, label="unpruned")]
    panels[len(networks)].legend(handles=handles, loc="center", fontsize=12)
    for axes in panels[len(networks) :]:
        axes.set_axis_off()
    with replacing(FIGURE) as partial:
        figure.savefig(partial, format="png", dpi=110)


def publish(found: Found, methods: Sequence[str], ratios: Sequence[float]) -> None:
    """The figure, and the tables between the marks of the page."""
    draw(found, methods, ratios)
    networks = [name for name in NETWORKS if any(key[0] == name for key in found)]
    tables = [format_network(found, network, methods, ratios) for network in networks]
    insert(MARKS, "\n\n".join(filter(None, [*tables, format_rounds(found), format_tuning(found)])))
