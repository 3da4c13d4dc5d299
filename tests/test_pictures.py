"""Figures, tables in HTML, and short texts of results, reports and graphs."""

import ast
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

import fxlean
from fxlean.calibration.corrections import LayerError
from fxlean.calibration.repair_result import RepairResult
from fxlean.channels.graph import Kind
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
        layer, parameter, row, _ = graph.kernel(int(kernel))
        assert names[target] == f"{layer}[{row}]"
        assert (layer, parameter) in {(call.layer, call.parameter) for call in graph.calls}
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
            layer, parameter, row, column = graph.kernel(int(kernel))
            assert (layer, parameter) == ("0", "0.weight")
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


def legend_of(figure):
    """The labels of the legend, with the colour and the style of each."""
    (legend,) = figure.legends
    assert not legend.get_frame_on()
    return {
        text.get_text(): (line.get_color(), line.get_linestyle())
        for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }


@pytest.mark.parametrize("name", ["residual_padded", "product_gate", "swish_gate", "two_inputs"])
@pytest.mark.parametrize("numbered", [False, True])
def test_the_legend_has_what_is_drawn_and_nothing_else(name, numbered):
    graph = fxlean.trace(*make(name))
    number = np.arange(graph.num_kernels) % 3
    figure = graph.plot(number if numbered else number == 1)
    (axes,) = figure.axes
    legend = legend_of(figure)
    sources, targets, _ = graph.edges()
    kinds = {Kind(graph.kinds[c]).name.lower() for c in {*sources, *targets}}
    wanted = {"chain 1", "chain 2"} if numbered else {"kept"}
    assert set(legend) == kinds | wanted | {"not kept", "fixed"}
    dots = {to_hex(colour) for colour in axes.collections[0].get_facecolors()}
    assert dots == {legend[kind][0] for kind in kinds}
    lines = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
    assert lines == {style for label, style in legend.items() if label not in kinds}


def test_no_legend_speaks_of_pruned_kernels_where_there_are_none():
    graph = fxlean.trace(*make("plain"), prune_outputs=True)
    assert set(legend_of(graph.plot())) == {"live", "sum", "kept"}


@pytest.mark.parametrize("name", ["plain", "residual", "u_net"])
def test_a_higher_ratio_keeps_the_chains_of_a_lower_one(name):
    alive = []
    for ratio in (0.05, 0.2, 0.5):
        model, inputs = make(name)
        fxlean.prune(model, ratio, inputs, redundancy=False)
        alive.append(fxlean.trace(model, inputs).alive)
    for fewer, more in itertools.pairwise(alive):
        assert fewer.sum() < more.sum()
        assert more[fewer].all()


def test_chains_have_colours_of_their_own_until_those_begin_again():
    graph = fxlean.trace(*make("plain"))
    number = np.arange(graph.num_kernels) % 10
    figure = graph.plot(number.astype(np.uint8))
    legend = legend_of(figure)
    colours = [line.get_color() for line in figure.axes[0].lines]
    chains = {label: colour for label, (colour, _) in legend.items() if label.startswith("chain")}
    assert list(chains) == [
        *(f"chain {n}, {n + 6}" for n in (1, 2, 3)),
        *map("chain {}".format, (4, 5, 6)),
    ]
    assert len(set(chains.values())) == 6
    for label, colour in chains.items():
        members = [int(word) for word in label.removeprefix("chain ").split(",")]
        assert colours.count(colour) == np.isin(number, members).sum()


@pytest.mark.parametrize("name", ["residual", "residual_padded", "swish_gate", "two_inputs"])
def test_the_first_column_is_called_input(name):
    (axes,) = fxlean.trace(*make(name)).plot().axes
    words = [text.get_text() for text in axes.texts]
    assert words[0] == "input"
    assert "live" not in words
    assert name != "swish_gate" or "sigmoid" in words


@pytest.mark.parametrize("keep", [np.ones(3), np.ones(3, dtype=bool), np.ones((2, 9), dtype=int)])
def test_kernels_to_draw_are_one_for_each_kernel(keep):
    graph = fxlean.trace(*make("plain"))
    found = re.escape(f"shape {keep.shape} and type {keep.dtype}")
    with pytest.raises(fxlean.ArgumentError, match=rf"{found}.*shape \({graph.num_kernels},\)"):
        graph.plot(keep)


def test_kernels_to_draw_are_no_fractions():
    graph = fxlean.trace(*make("plain"))
    with pytest.raises(fxlean.ArgumentError, match=r"type float64\. Pass booleans"):
        graph.plot(np.ones(graph.num_kernels))


def test_graphs_too_large_to_look_at_are_refused():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 400, 1), torch.nn.Conv2d(400, 2, 1))
    graph = fxlean.trace(model, torch.zeros(1, 3, 4, 4))
    with pytest.raises(fxlean.ArgumentError, match=r"405 channels.*up to 300.*graph\.adjacency"):
        graph.plot()
    assert len(cells(graph._repr_html_())) == 2


def test_texts_are_short():
    model, inputs, result = pruned()
    repaired = fxlean.repair(model, [inputs])
    for thing in (result, fxlean.report(model, inputs), fxlean.trace(model, inputs), repaired):
        assert len(repr(thing)) < 120
        assert "\n" not in repr(thing)
    kept = f"{result.kept:,} of {result.total:,} kernels kept in {len(result.layers)} layers"
    assert repr(result) == f"PruneResult(l1: {kept})"


def test_a_repair_as_a_short_text_and_as_a_table():
    layers = (LayerError("a", 0.5, 0.25), LayerError("<b>", 1.0, 0.125))
    result = RepairResult(layers, 0.3125, 0.05, 48, 1600, {"c": "no reason"}, 1.5)
    short = "RepairResult(2 layers; error of the outputs 0.31 -> 0.05 on 1,600 held-out samples)"
    assert repr(result) == short
    assert cells(result._repr_html_())[1:] == [
        ["a", "0.5000", "0.2500"],
        ["&lt;b&gt;", "1.0000", "0.1250"],
        ["outputs", "0.3125", "0.0500"],
    ]
    for line in str(result).splitlines()[-2:]:
        assert f"<div>{line}</div>" in result._repr_html_()
    assert "skipped: c: no reason" in str(result)


def test_only_one_file_imports_matplotlib():
    for path in PACKAGE.rglob("*.py"):
        found = [
            node.module or ""
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
        ]
        assert path.name == "pictures.py" or not any(name.startswith("matplot") for name in found)
