"""Processor time of `longest_chains` and `complete_paths` on synthetic graphs, as a table.

    python benchmarks/chains.py [--repeat 3] [--only resnet50] [--hard]

Lengths are log-normal, which is about what operator norms of trained networks look like; the
share above 1 is chosen. `resnet50` has the wiring of ResNet50 (stem, 16 bottlenecks, joins and
downsample branches, 13.4 million kernels), with 0.14 % of the lengths above 1. Beside every time
stands its ratio to one `numpy.argsort` of as many float32 numbers, measured in the same run: an
argsort is what ranking the kernels one by one would take. `--hard` adds graphs far from any
trained network, which take minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from statistics import NormalDist
from time import process_time

import numpy as np

from fxlean.channels.graph import ChannelGraph, Kind
from fxlean.selection.chains import longest_chains
from fxlean.selection.paths import complete_paths

Lengths = Callable[[int], np.ndarray]


class Builder:
    """Grows a graph, row by row; channels are plain lists of numbers."""

    def __init__(self, lengths: Lengths) -> None:
        self.draw = lengths
        self.kinds: list[Kind] = []
        self.rows: list[tuple[int, int, int, int]] = []
        self.sources: list[list[int]] = []
        self.lengths: list[np.ndarray] = []
        self.num_sources = self.num_lengths = self.num_kernels = 0

    def inputs(self, count: int) -> list[int]:
        """New channels without edges."""
        self.kinds += [Kind.LIVE] * count
        self.rows += [(0, 0, 0, -1)] * count
        return list(range(len(self.rows) - count, len(self.rows)))

    def convolution(self, sources: list[int], count: int) -> list[int]:
        """New channels, each with a kernel from every source."""
        size = len(sources)
        for _ in range(count):
            self.kinds.append(Kind.SUM)
            self.rows.append((size, self.num_sources, self.num_lengths, self.num_kernels))
            self.num_lengths += size
            self.num_kernels += size
        self.sources.append(sources)
        self.num_sources += size
        self.lengths.append(self.draw(size * count))
        return list(range(len(self.rows) - count, len(self.rows)))

    def join(self, first: list[int], second: list[int]) -> list[int]:
        """The sums of two lists of channels."""
        for pair in zip(first, second, strict=True):
            self.kinds.append(Kind.SUM)
            self.rows.append((2, self.num_sources, self.num_lengths, -1))
            self.sources.append(list(pair))
            self.num_sources += 2
            self.num_lengths += 2
        self.lengths.append(np.ones(2 * len(first), dtype=np.float32))
        return list(range(len(self.rows) - len(first), len(self.rows)))

    def graph(self, outputs: list[int]) -> ChannelGraph:
        """The finished graph."""
        n = len(self.rows)
        sizes, source_start, length_start, kernel_start = np.array(self.rows, dtype=np.int64).T
        ends = np.zeros(n, dtype=bool)
        ends[outputs] = True
        return ChannelGraph(
            kinds=np.array(self.kinds, dtype=np.uint8),
            sizes=sizes.copy(),
            source_start=source_start.copy(),
            length_start=length_start.copy(),
            kernel_start=kernel_start.copy(),
            sources=np.concatenate([np.array(part, dtype=np.int32) for part in self.sources]),
            lengths=np.concatenate(self.lengths),
            outputs=ends,
            opaque=np.zeros(n, dtype=bool),
            ties=np.arange(n, dtype=np.int32),
            alive=np.ones(self.num_kernels, dtype=bool),
        )


def log_normal(above: float, sigma: float = 1.0) -> Lengths:
    """Log-normal lengths of which the given share is above 1."""
    generator = np.random.default_rng(0)
    mean = sigma * NormalDist().inv_cdf(above)
    return lambda count: np.exp(
        mean + sigma * generator.standard_normal(count, dtype=np.float32), dtype=np.float32
    )


def sequential(widths: list[int], lengths: Lengths) -> ChannelGraph:
    """Fully connected layers, one after the other."""
    builder = Builder(lengths)
    channels = builder.inputs(widths[0])
    for width in widths[1:]:
        channels = builder.convolution(channels, width)
    return builder.graph(channels)


def resnet50(lengths: Lengths, blocks: tuple[int, ...] = (3, 4, 6, 3)) -> ChannelGraph:
    """The convolutions of ResNet50 and its joins."""
    builder = Builder(lengths)
    channels = builder.convolution(builder.inputs(3), 64)
    for stage, repeats in enumerate(blocks):
        width = 64 * 2**stage
        for block in range(repeats):
            branch = builder.convolution(channels, width)
            branch = builder.convolution(builder.convolution(branch, width), 4 * width)
            if block == 0:
                channels = builder.convolution(channels, 4 * width)
            channels = builder.join(channels, branch)
    return builder.graph(channels)


def constant(value: float) -> Lengths:
    """Lengths that are all equal."""
    return lambda count: np.full(count, value, dtype=np.float32)


WIDE = [128] * 21
CASES: dict[str, tuple[Callable[[], ChannelGraph], float]] = {
    "resnet50, 0.14 % above 1": (lambda: resnet50(log_normal(18_600 / 13.4e6)), 0.1),
    "resnet50, none above 1": (lambda: resnet50(log_normal(1e-12, sigma=0.3)), 0.1),
    "resnet50, 1 % above 1": (lambda: resnet50(log_normal(0.01)), 0.1),
    "resnet50, all equal": (lambda: resnet50(constant(1.5)), 0.01),
    "20 x 128, 26 % above 1": (lambda: sequential(WIDE, log_normal(0.26)), 0.2),
    "20 x 128, 99 % above 1": (lambda: sequential(WIDE, log_normal(0.99)), 0.2),
}
HARD: dict[str, tuple[Callable[[], ChannelGraph], float]] = {
    "resnet50, 10 % above 1": (lambda: resnet50(log_normal(0.1)), 0.1),
    "resnet50, 99 % above 1": (lambda: resnet50(log_normal(0.99, sigma=0.5)), 0.01),
}


def fastest(function: Callable[[], object], repeat: int) -> float:
    """Processor seconds of the fastest of some calls; both functions use one thread."""
    times = []
    for _ in range(repeat):
        start = process_time()
        function()
        times.append(process_time() - start)
    return min(times)


def first_calls() -> None:
    """Print the seconds of the first call of both functions in this process."""
    graph = sequential([8, 8, 8], log_normal(0.3))
    for function in (longest_chains, complete_paths):
        print(fastest(lambda function=function: function(graph, 40), 1))  # type: ignore[misc]


def report_compilation() -> None:
    """Run `first_calls` in two new processes, with an empty cache and with a filled one."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        for state in ("cold", "warm"):
            output = subprocess.run(
                [sys.executable, __file__, "--first-calls"],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            chains, paths = map(float, output.split())
            print(f"first call, {state} cache: lean {chains:.2f} s, path {paths:.2f} s")


def report_case(name: str, build: Callable[[], ChannelGraph], ratio: float, repeat: int) -> None:
    """Print one line of the table."""
    graph = build()
    budget = int(ratio * graph.num_kernels)
    sort = fastest(lambda: np.argsort(graph.lengths), repeat)
    lean = fastest(lambda: longest_chains(graph, budget), repeat)
    path = fastest(lambda: complete_paths(graph, budget), repeat)
    print(
        f"{name:25}{graph.num_kernels:11,}{ratio:6.0%}{longest_chains(graph, budget)[1]:9,}"
        f"{sort:9.3f}{lean:9.3f}{lean / sort:7.1f}{path:9.3f}{path / sort:7.1f}",
        flush=True,
    )


def main() -> None:
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3, help="take the fastest of so many runs")
    parser.add_argument("--only", default="", help="only graphs whose name contains this")
    parser.add_argument("--hard", action="store_true", help="graphs far from any trained network")
    parser.add_argument("--first-calls", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.first_calls:
        first_calls()
        return
    report_compilation()
    print(
        f"{'graph':25}{'kernels':>11}{'keep':>6}{'chains':>9}"
        f"{'argsort':>9}{'lean':>9}{'ratio':>7}{'path':>9}{'ratio':>7}"
    )
    for name, (build, ratio) in {**CASES, **(HARD if arguments.hard else {})}.items():
        if arguments.only in name:
            report_case(name, build, ratio, arguments.repeat)


if __name__ == "__main__":
    main()
