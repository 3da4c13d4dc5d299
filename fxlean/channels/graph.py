"""`ChannelGraph`: the channels of a network and the edges between them, as flat arrays.

Channels are numbered so that every edge points from a smaller to a larger number. All edges
into one channel form one *row*; the row's sources and lengths are two slices of shared flat
arrays, so an edge of a convolution costs the four bytes of its length, whatever its layer's
size: the rows of a layer share one list of sources.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from ..pictures import drawing, html_table

if TYPE_CHECKING:
    import scipy.sparse


class Kind(IntEnum):
    """When a channel is zero for every input."""

    LIVE = 0  # never: inputs, constants, what lies behind a sigmoid or a layer norm
    SUM = 1  # when every kept incoming edge starts at a zero channel
    PRODUCT = 2  # when any incoming edge starts at a zero channel
    DEAD = 3  # always: padding, batch norm of a constant


@dataclass(frozen=True)
class Layer:
    """One prunable weight: its kernels are numbered `start` to `start + rows * columns - 1`.

    Kernel `start + o * columns + j` leads from the j-th input channel (of the group of output
    `o`) to output channel `o`. Their elements are those of `parameter`.
    """

    name: str
    parameter: str
    start: int
    rows: int
    columns: int

    @property
    def kernels(self) -> slice:
        """The layer's kernels, as a slice of any array over all kernels."""
        return slice(self.start, self.start + self.rows * self.columns)


@dataclass(frozen=True)
class Call:
    """One use of a weight, prunable or not, which makes channels `first` to `first + count - 1`."""

    layer: str
    parameter: str
    first: int
    count: int


@dataclass(frozen=True)
class Maker:
    """An input or a call of an operator, which makes channels `first` to `first + count - 1`.

    `name` is "input", "input2" and so on, or that of the node in the traced graph.
    """

    name: str
    first: int
    count: int


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """Channels and edges of a network; n channels, k kernels.

    Edge number j into channel c (0 <= j < sizes[c]) starts at channel
    `sources[source_start[c] + j]`, has length `lengths[length_start[c] + j]`, and is kernel
    `kernel_start[c] + j`, or a fixed edge where `kernel_start[c]` is -1. One kernel can be
    several edges (a shared layer).

    Attributes:
        kinds: shape (n,), a `Kind` for each channel.
        sizes: shape (n,), number of edges into each channel.
        source_start, length_start, kernel_start: shape (n,), where each row begins.
        sources: flat channel numbers; rows may share a slice.
        lengths: flat float32 edge lengths, at least 0.
        outputs: shape (n,), True for channels that the model returns.
        opaque: shape (n,), True for hubs of operators without a rule; never redundant.
        ties: shape (n,), equal numbers for channels that are tied: they can only be zero together,
            because they share a bias or a batch norm.
        alive: shape (k,), False for kernels that were pruned earlier.
        layers: the prunable weights, in the order of their kernels.
        calls: which channels are made by which weight, in their order.
        makers: which channels are made by which input or operator, in their order; all of them.
    """

    kinds: NDArray[np.uint8]
    sizes: NDArray[np.int64]
    source_start: NDArray[np.int64]
    length_start: NDArray[np.int64]
    kernel_start: NDArray[np.int64]
    sources: NDArray[np.int32]
    lengths: NDArray[np.float32]
    outputs: NDArray[np.bool_]
    opaque: NDArray[np.bool_]
    ties: NDArray[np.int32]
    alive: NDArray[np.bool_]
    layers: tuple[Layer, ...] = ()
    calls: tuple[Call, ...] = ()
    makers: tuple[Maker, ...] = ()

    @property
    def num_channels(self) -> int:
        """Number of channels."""
        return len(self.kinds)

    @property
    def num_kernels(self) -> int:
        """Number of prunable kernels, those pruned earlier included."""
        return len(self.alive)

    @property
    def num_edges(self) -> int:
        """Number of edges, prunable and fixed."""
        return int(self.sizes.sum())

    def __repr__(self) -> str:
        return (
            f"ChannelGraph({self.num_channels:,} channels, {self.num_edges:,} edges, "
            f"{self.num_kernels:,} prunable kernels in {len(self.layers)} layers)"
        )

    def names(self) -> list[str]:
        """A name for each channel, by what makes it.

        "conv1[3]" is output 3 of a layer, "input[0]" comes with the first input, "add_1[5]" is made
        by a node of the traced graph. In a graph made by hand "sum 17" is channel 17.
        """
        found = [f"{Kind(kind).name.lower()} {c}" for c, kind in enumerate(self.kinds)]
        made = [(maker.name, maker.first, maker.count) for maker in self.makers]
        made += [(call.layer, call.first, call.count) for call in self.calls]
        for name, first, count in made:
            found[first : first + count] = [f"{name}[{row}]" for row in range(count)]
        return found

    def kernels(self) -> NDArray[np.int64]:
        """The kernel of every edge, in the order of `edges`; -1 for fixed edges."""
        starts = np.repeat(self.kernel_start, self.sizes)
        kernels: NDArray[np.int64] = np.where(starts < 0, -1, starts + self._within())
        return kernels

    def kernel(self, number: int) -> tuple[str, str, int, int]:
        """Layer, parameter, output channel, and input channel (of its group) of a kernel."""
        for layer in self.layers:
            if number in range(*layer.kernels.indices(self.num_kernels)):
                output, column = divmod(number - layer.start, layer.columns)
                return layer.name, layer.parameter, output, column
        raise ArgumentError(f"kernel {number} is none of {self.num_kernels}, counted from 0.")

    def plot(self, keep: NDArray[np.bool_ | np.integer] | None = None) -> Any:
        """A matplotlib figure of a small graph: channels, edges by length, kept ones in colour.

        Args:
            keep: shape (k,), True for kernels in colour; or integers: the number of the chain that
                a kernel is on, of which each has another colour, and 0 for kernels on none. By
                default all that are alive. docs/how-it-works.md numbers the chains of a graph.

        Raises:
            ArgumentError: the graph is too large to be looked at, or `keep` is of another form.
        """
        keep = np.asarray(self.alive if keep is None else keep)
        if keep.shape != self.alive.shape or keep.dtype.kind not in "biu":
            raise ArgumentError(
                f"keep has shape {keep.shape} and type {keep.dtype}. Pass booleans or integers of "
                f"shape {self.alive.shape}, one for each kernel."
            )
        kernels = self.kernels()
        kept = np.append(keep, False)[kernels]
        return drawing(self.kinds, self.edges(), kept, kernels < 0, self.names())

    def _repr_html_(self) -> str:
        heading = ("layer", "outputs", "inputs", "kernels", "alive")
        rows = [
            (
                layer.name,
                *(f"{n:,}" for n in (layer.rows, layer.columns, layer.rows * layer.columns)),
                f"{int(self.alive[layer.kernels].sum()):,}",
            )
            for layer in self.layers
        ]
        return html_table(heading, rows, [repr(self)])

    def _within(self) -> NDArray[np.int64]:
        """The number of every edge in its row."""
        starts = np.repeat(np.cumsum(self.sizes) - self.sizes, self.sizes)
        within: NDArray[np.int64] = np.arange(self.num_edges) - starts
        return within

    def with_lengths(self, lengths: NDArray[np.float32]) -> ChannelGraph:
        """The same wiring with other edge lengths."""
        return replace(self, lengths=lengths)

    def edges(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """Source, target and length of every edge, each of shape (num_edges,), row by row."""
        within = self._within()
        targets = np.repeat(np.arange(self.num_channels, dtype=np.int32), self.sizes)
        sources = self.sources[self.source_start[targets] + within]
        return sources, targets, self.lengths[self.length_start[targets] + within]

    def adjacency(self) -> scipy.sparse.csr_array:
        """Lengths as a sparse matrix, entry [source, target]; the longest of parallel edges."""
        import scipy.sparse  # here, because it takes a third of the time to import fxlean

        sources, targets, lengths = self.edges()
        order = np.lexsort((lengths, targets, sources))
        sources, targets, lengths = sources[order], targets[order], lengths[order]
        last = np.ones(len(order), dtype=bool)
        last[:-1] = (np.diff(sources) != 0) | (np.diff(targets) != 0)
        shape = (self.num_channels, self.num_channels)
        return scipy.sparse.csr_array((lengths[last], (sources[last], targets[last])), shape=shape)
