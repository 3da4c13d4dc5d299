"""Longest-chain extraction (LEAN): which kernels lie on the longest chains of a graph.

A chain is a path of edges, its length is the product of the edge lengths, and it starts with a
prunable edge. Usable edges have a positive length and, where prunable, are alive and not taken.
For every channel `v`, where `best(u)` may or may not exist,

    best(v) = max( over usable prunable edges (u, v, w):  max(1, best(u)) * w,
                   over usable fixed edges    (u, v, w):  best(u) * w  where best(u) exists )

    and best(v) does not exist where that maximum is below 1.

`longest_chains` takes the kernels behind the largest `best`, again and again. Values only ever
fall, so whatever was computed earlier is an upper bound, and the search is lazy on three levels: a
heap over channels, a bound on the second-best edge of every row, and the longest edges of a row
sorted (its head). docs/chains.md derives what each bound means, and carries an example through.

Lengths are base-2 logarithms in float64: no product overflows, and a product of exactly 1 (its
factors are powers of two) is exactly 0.
"""

from __future__ import annotations

from math import log2

import numpy as np
from numpy.typing import NDArray

from ..channels.graph import ChannelGraph
from .jit import jit
from .ranking import fill_largest, kernel_scores
from .rows import NONE, log2_ceiling, rows_of

_BELOW = -1e-300  # just below 0: whatever exceeds it is a product of at least 1
_SLACK = 0.25  # how much farther than needed today a head reaches, in log2

# What is known of a channel and of its row, what is used most first. The value of a channel, the
# logarithm of best(v), stands in an array of its own; it is an upper bound until found exact.
_CHANNEL = np.dtype(
    [
        ("epoch", np.int32),  # number of chains extracted when last found exact
        ("prunable", np.int32),  # 1 or 0
        ("edge", np.int32),  # the strongest edge, -1 where there is none
        ("source", np.int32),  # the channel where it starts
        ("step", np.float64),  # the logarithm of its length
        ("held", np.float64),  # the value of its source when the row was evaluated
        ("second", np.float64),  # upper bound of what any other edge gives
        ("kernel_start", np.int64),
        ("source_start", np.int64),
        ("head_start", np.int64),
        ("head_size", np.int32),  # entries of the head in use, of `room`
        ("bundle", np.int32),  # one number for consecutive rows that share their sources
        ("cutoff", np.float64),  # every edge of at least this logarithm is in the head
        ("size", np.int32),
        ("room", np.int32),
        ("length_start", np.int64),
        ("may_end", np.int64),  # 1 or 0
    ]
)
_ENTRY = np.dtype([("key", np.float64), ("id", np.int32)])
# The largest value of its sources, an upper bound too, and the source that had it.
_BUNDLE = np.dtype([("leader", np.int64), ("largest", np.float64)])


def longest_chains(graph: ChannelGraph, budget: int) -> tuple[NDArray[np.bool_], int]:
    """Kernels on the longest chains, filled up with the largest single kernels.

    The last chain may overshoot the budget. What chains leave of the budget goes to the kernels
    with the largest `kernel_scores`. Of equal chains, the one that ends at the smallest channel
    is taken; of equal edges into a channel, the first; of equal kernels, the smallest.

    A chain does not end at a channel of `graph.outputs` whose edges are fixed, though it may
    pass through: the layers that produce the model's output are not pruned, and must not decide
    which chains are long.

    Args:
        graph: channels, edges and lengths.
        budget: number of kernels to keep.

    Returns:
        Keep mask over the kernels, and the number of chains extracted.

    Source: Schoonhoven, Hendriksen, Pelt and Batenburg (2020), arXiv 2011.06923, algorithm 1.
    """
    if budget >= np.count_nonzero(graph.alive):
        return graph.alive.copy(), 0
    taken = ~graph.alive
    rows = rows_of(graph)
    heads = np.empty(graph.num_edges, dtype=_ENTRY)
    chains = _extract(_records(graph), rows.sources, rows.lengths, rows.bits, taken, budget, heads)
    keep = taken & graph.alive
    fill_largest(keep, graph.alive, kernel_scores(graph), budget)
    return keep, int(chains)


def _records(graph: ChannelGraph) -> NDArray[np.void]:
    """A `_CHANNEL` record for each channel, nothing evaluated yet."""
    channels = np.zeros(graph.num_channels, dtype=_CHANNEL)
    channels["size"] = graph.sizes
    channels["source_start"] = graph.source_start
    channels["length_start"] = graph.length_start
    channels["kernel_start"] = graph.kernel_start
    channels["prunable"] = graph.kernel_start >= 0
    channels["may_end"] = ~graph.outputs | (graph.kernel_start >= 0)
    channels["edge"] = channels["epoch"] = -1
    channels["cutoff"] = np.inf
    changes = np.zeros(graph.num_channels, dtype=bool)
    for name in ("size", "source_start", "prunable"):
        changes[1:] |= channels[name][1:] != channels[name][:-1]
    channels["bundle"] = np.cumsum(changes)
    return channels


@jit
def _extract(channels, sources, lengths, bits, taken, budget, heads):
    """Extract longest chains until `budget` kernels are taken; returns how many chains.

    `heads` is room for one entry per edge. Numbers have explicit types throughout, since numba
    compiles a function anew for every combination of types.
    """
    zero = np.int64(0)
    n = len(channels)
    # What an edge multiplies: row 0 for fixed edges, row 1 (at least 0) for prunable ones.
    values = np.empty((2, n))
    ends = np.empty(n, dtype=_ENTRY)
    count = zero
    for v in range(n):
        _compare_row(channels[v], v, values, sources, lengths, bits, taken)
        if values[0, v] >= 0 and channels[v].may_end == 1:
            ends[count].key, ends[count].id = values[0, v], v
            count += 1
    for place in range(count // 2 - 1, -1, -1):
        _sift_down(ends, zero, count, place)
    bundles = np.empty(n, dtype=_BUNDLE)
    for b in range(n):
        bundles[b].leader, bundles[b].largest = 0, np.inf
    used = zero  # entries of `heads` in use
    chain = np.empty(n, dtype=np.int32)
    chains = found = zero
    while count > 0 and found < budget:
        end = np.int64(ends[0].id)
        if ends[0].key > values[0, end]:
            ends[0].key = values[0, end]
            if values[0, end] < 0:
                count -= 1
                ends[0].key, ends[0].id = ends[count].key, ends[count].id
            _sift_down(ends, zero, count, zero)
        elif channels[end].epoch == chains:
            found += _take(channels, end, values, taken)
            chains += 1
        else:
            v = _refresh(channels, end, values, sources, taken, bundles, heads, chains, chain)
            if v >= 0 and not _lower_bound(channels[v], values, sources, bundles):
                c = channels[v]
                _compare_row(c, v, values, sources, lengths, bits, taken)
                if values[0, v] >= 0:
                    largest = bundles[c.bundle].largest
                    c.cutoff = max(values[0, v] - _SLACK, 0.0) - largest
                    used = _sort_head(c, lengths, bits, taken, heads, used)
    return chains


@jit
def _take(channels, v, values, taken):
    """Take the kernels of the chain that ends at channel v; returns how many."""
    count = 0
    while values[0, v] >= 0:
        c = channels[v]
        if c.prunable == 1 and not taken[c.kernel_start + c.edge]:
            taken[c.kernel_start + c.edge] = True
            count += 1
        v = np.int64(c.source)
    return count


@jit
def _refresh(channels, v, values, sources, taken, bundles, heads, epoch, chain):
    """Bring the chain that ends at channel v up to date, from its start to its end.

    Channels found exact are marked with the epoch. Returns -1, or the first channel whose head
    cannot decide, and whose row must be compared before the rest of the chain can be done; see
    docs/chains.md. This is one long function because numba counts references to every array
    passed to another one, which takes longer than the work itself.
    """
    length, stale = 0, -1
    while values[0, v] >= 0 and channels[v].epoch != epoch:
        c = channels[v]
        chain[length] = v
        if c.held != values[c.prunable, c.source] or (
            c.prunable == 1 and taken[c.kernel_start + c.edge]
        ):
            stale = length
        length += 1
        v = c.source
    for i in range(stale + 1, length):
        channels[chain[i]].epoch = epoch
    for i in range(stale, -1, -1):
        v = chain[i]
        c = channels[v]
        value = c.step + values[c.prunable, c.source]
        if value <= c.second or (c.prunable == 1 and taken[c.kernel_start + c.edge]):
            largest = bundles[c.bundle].largest
            rest = c.cutoff + largest  # upper bound of what the head does not contain
            value, second, edge, step = _BELOW, _BELOW, -1, 0.0
            for place in range(c.head_start, c.head_start + c.head_size):
                log, j = heads[place].key, heads[place].id
                if log + largest < second or (log + largest == second and j > edge >= 0):
                    rest = NONE
                    break
                other = log + values[c.prunable, sources[c.source_start + j]]
                if other >= second and not (c.prunable == 1 and taken[c.kernel_start + j]):
                    if other > value or (other == value and j < edge):
                        value, second, edge, step = other, value, j, log
                    else:
                        second = other
            if rest >= 0 and rest >= value:
                return v
            if edge >= 0:
                c.edge, c.step, c.second = edge, step, max(second, rest)
                c.source = sources[c.source_start + edge]
        if value < 0:
            values[0, v], values[1, v] = NONE, 0.0
        else:
            values[0, v], values[1, v], c.held = value, value, values[c.prunable, c.source]
            if values[0, c.source] < 0 or channels[c.source].epoch == epoch:
                c.epoch = epoch
    return -1


@jit
def _lower_bound(c, values, sources, bundles):
    """Lower the largest source value of a row to what it is now; False if it is already."""
    bundle = bundles[c.bundle]
    if values[c.prunable, bundle.leader] == bundle.largest:
        return False
    bundle.largest = NONE
    for j in range(c.source_start, c.source_start + c.size):
        u = sources[j]
        if values[c.prunable, u] > bundle.largest:
            bundle.leader, bundle.largest = u, values[c.prunable, u]
    return True


@jit
def _compare_row(c, v, values, sources, lengths, bits, taken):
    """Evaluate channel v from all edges of its row."""
    prunable, start, first, kernel = c.prunable, c.source_start, c.length_start, c.kernel_start
    most, second, edge = _BELOW, _BELOW, -1
    for j in range(c.size):
        value = values[prunable, sources[start + j]]
        if log2_ceiling(bits[first + j]) + value > second and lengths[first + j] > 0:
            log = log2(np.float64(lengths[first + j]))
            value += log
            if value > second and not (prunable == 1 and taken[kernel + j]):
                if value > most:
                    most, second, edge, c.step = value, most, j, log
                else:
                    second = value
    if edge < 0:
        values[0, v], values[1, v] = NONE, 0.0
    else:
        c.edge, c.second, c.source = edge, second, sources[start + edge]
        c.held = values[prunable, c.source]
        values[0, v], values[1, v] = most, most


@jit
def _sort_head(c, lengths, bits, taken, heads, used):
    """Sort the edges of at least the cutoff, longest first, of equal ones the first first.

    The head moves behind the entries in use if it needs more room; returns how many are in use.
    """
    first, kernel, cutoff = c.length_start, c.kernel_start, c.cutoff
    if used + c.size > len(heads):
        c.head_size, c.cutoff = 0, np.inf
        return used
    count = np.int64(0)
    for j in range(c.size):
        if log2_ceiling(bits[first + j]) >= cutoff and lengths[first + j] > 0:
            log = log2(np.float64(lengths[first + j]))
            if log >= cutoff and not (c.prunable == 1 and taken[kernel + j]):
                # Negative, because heap sort puts the smallest key first.
                heads[used + count].key, heads[used + count].id = -log, -j
                count += 1
    for place in range(count // 2 - 1, -1, -1):
        _sift_down(heads, used, count, place)
    top = np.int64(0)
    for last in range(used + count - 1, used, -1):
        key, name = heads[last].key, heads[last].id
        heads[last].key, heads[last].id = heads[used].key, heads[used].id
        heads[used].key, heads[used].id = key, name
        _sift_down(heads, used, last - used, top)
    begin = used
    if count > c.room:
        c.head_start, c.room = used, count
        used += count
    c.head_size = count
    for i in range(count):
        heads[c.head_start + i].key = -heads[begin + i].key
        heads[c.head_start + i].id = -heads[begin + i].id
    return used


@jit
def _sift_down(heap, first, count, place):
    """Restore heap `first:first + count` below a place: larger keys, then smaller ids on top."""
    key, name = heap[first + place].key, heap[first + place].id
    while 2 * place + 1 < count:
        child = 2 * place + 1
        c = heap[first + child]
        if child + 1 < count:
            d = heap[first + child + 1]
            if d.key > c.key or (d.key == c.key and d.id < c.id):
                child, c = child + 1, d
        if c.key < key or (c.key == key and c.id > name):
            break
        heap[first + place].key, heap[first + place].id = c.key, c.id
        place = child
    heap[first + place].key, heap[first + place].id = key, name
