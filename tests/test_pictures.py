"""Figures, tables in HTML, and short texts of results, reports and graphs."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fxlean
from tests.support.zoo import ZOO, make

PACKAGE = Path(fxlean.__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore::fxlean.PruneWarning")


def cells(html):
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def bars_of(axes):
    """Widths of the bars, first those behind and then those in front, with the names of rows."""
    behind, front = ([bar.get_width() for bar in group] for group in axes.containers)
    return behind, front


def pruned():
    model, inputs = make("u_net")
    return model, inputs, fxlean.prune(model, 0.2, inputs, method="l1")


def test_a_result_as_a_figure_and_as_a_table_has_the_same_numbers():
    _, _, result = pruned()
    (axes,) = result.plot().axes
    behind, front = bars_of(axes)
    assert behind == [layer.total for layer in result.layers]
    assert front == [layer.kept for layer in result.layers]
    assert [label.get_text() for label in axes.get_yticklabels()] == [x.name for x in result.layers]
    assert axes.get_title() == f"kernels: {result.ratio:.1%} left"
    *rows, total = cells(result._repr_html_())[1:]
    assert [row[:2] for row in rows] == [[x.name, f"{x.kept:,}"] for x in result.layers]
    assert total[1:3] == [f"{result.kept:,}", f"{result.total:,}"]


@pytest.mark.parametrize("compared", [False, True])
def test_a_report_as_a_figure_and_as_a_table_has_the_same_numbers(compared):
    model, inputs, _ = pruned()
    if compared:
        report = fxlean.report(fxlean.compact(model, inputs), inputs, before=model)
        old, new, suffix = report.before, report, ""
    else:
        old = new = report = fxlean.report(model, inputs)
        suffix = "_left"
    for axes, count in zip(report.plot().axes, ("parameters", "macs"), strict=True):
        behind, front = bars_of(axes)
        assert sum(behind) == sum(getattr(layer, count) for layer in old.layers)
        assert sum(front) == sum(getattr(layer, count + suffix) for layer in new.layers)
    found = [line.split() for line in str(report).splitlines() if not line.startswith("-")]
    table = [row for row in cells(report._repr_html_())[1:]]
    assert table == [line for line in found if len(line) == 7 and line[0] != "layer"]


def test_names_are_escaped():
    model = torch.nn.Sequential()
    model.add_module("<b>", torch.nn.Conv2d(3, 4, 3))
    model.add_module("last", torch.nn.Conv2d(4, 2, 1))
    html = fxlean.prune(model, 0.9, torch.zeros(1, 3, 8, 8))._repr_html_()
    assert "&lt;b&gt;" in html
    assert "<b>" not in html


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_edge_of_a_kernel_leads_to_the_channel_of_that_name(name):
    model, inputs = make(name)
    graph = fxlean.trace(model, inputs)
    names, kernels = graph.names(), graph.kernels()
    sources, targets, lengths = graph.edges()
    assert len(kernels) == graph.num_edges
    assert set(kernels) - {-1} == set(range(graph.num_kernels))
    for target, kernel in zip(targets[kernels >= 0], kernels[kernels >= 0], strict=True):
        layer, row, _ = graph.kernel(int(kernel))
        assert names[target] == f"{layer}[{row}]"
    for number in np.flatnonzero(kernels >= 0)[:20]:
        assert graph.kernel_start[targets[number]] <= kernels[number]
    parameters = {key for key, _ in [*model.named_parameters(), *model.named_buffers()]}
    assert {call.parameter for call in graph.calls} <= parameters
    assert len(sources) == len(lengths)


def test_kernels_come_from_the_channels_that_their_weights_read():
    weight = torch.arange(1.0, 7.0).reshape(3, 2, 1, 1)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1, bias=False), torch.nn.Conv2d(3, 1, 1))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    graph = fxlean.trace(model, torch.zeros(1, 2, 4, 4))
    for length, kernel in zip(graph.edges()[2], graph.kernels(), strict=True):
        if kernel >= 0:
            layer, row, column = graph.kernel(int(kernel))
            assert layer == "0"
            assert length == weight[row, column]
    with pytest.raises(fxlean.ArgumentError, match="kernel 6 is none of 6, counted from 0"):
        graph.kernel(6)


def test_a_drawing_has_the_edges_that_are_kept_in_colour():
    model, inputs = make("residual")
    fxlean.prune(model, 0.3, inputs, method="random")
    graph = fxlean.trace(model, inputs)
    keep = np.arange(graph.num_kernels) % 3 == 0
    for figure, count in (
        (graph.plot(), int(graph.alive.sum())),
        (graph.plot(keep), int(keep.sum())),
    ):
        (axes,) = figure.axes
        colours = [line.get_color() for line in axes.lines]
        assert len(colours) == graph.num_edges
        assert colours.count("#e6862b") == count
        assert "1.branches.0.0" in [text.get_text() for text in axes.texts]


def test_graphs_too_large_to_look_at_are_refused():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 400, 1), torch.nn.Conv2d(400, 2, 1))
    graph = fxlean.trace(model, torch.zeros(1, 3, 4, 4))
    with pytest.raises(fxlean.ArgumentError, match=r"405 channels.*up to 300.*graph\.adjacency"):
        graph.plot()
    assert len(cells(graph._repr_html_())) == 2


def test_texts_are_short():
    model, inputs, result = pruned()
    for thing in (result, fxlean.report(model, inputs), fxlean.trace(model, inputs)):
        assert len(repr(thing)) < 120
        assert "\n" not in repr(thing)
    kept = f"{result.kept:,} of {result.total:,} kernels kept in {len(result.layers)} layers"
    assert repr(result) == f"PruneResult(l1: {kept})"


def test_only_one_file_imports_matplotlib():
    for path in PACKAGE.rglob("*.py"):
        found = [
            node.module or ""
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
        ]
        assert path.name == "pictures.py" or not any(name.startswith("matplot") for name in found)
