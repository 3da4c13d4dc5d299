"""Longest-chain extraction (LEAN): which kernels lie on the longest chains of a graph.

A chain is a path of edges, its length is the product of the edge lengths, and it starts with a
prunable edge. For every channel `v`, with `best(u)` existing or not,

    best(v) = max( over live prunable edges (u, v, w):  max(1, best(u)) * w,
                   over live fixed edges    (u, v, w):  best(u) * w  where best(u) exists )

    and best(v) does not exist where that maximum is below 1.

`longest_chains` takes the largest `best` again and again, and extracts the kernels behind it.

The exact values are found lazily. Values only ever fall, so a value computed earlier is an upper
bound. A heap over channels holds such bounds, and only the chain behind the top of the heap is
checked: from its start to its end, every channel whose strongest edge was extracted, or whose
strongest source has fallen, is evaluated again. When nothing on the chain had to be, it is the
longest one. Everything else stays stale until it reaches the top, which is seldom.

Lengths are added as base-2 logarithms in float64: no product can overflow, and a product that is
exactly 1 (its factors are powers of two) is exactly 0.
"""

from __future__ import annotations

from math import log2

import numba
import numpy as np
from numpy.typing import NDArray

from .graph import ChannelGraph

# Edges compared at a time: long enough for vector instructions, short enough that finding the
# first edge of the maximum within one block costs nothing.
_BLOCK = 64

_NONE = -np.inf  # the logarithm of a length that does not exist


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
    may_end = ~(graph.outputs & (graph.kernel_start < 0))
    chains = 0
    if budget > 0:
        chains = int(
            _extract(graph.sizes, graph.source_start, graph.length_start, graph.kernel_start,        graph.sources.view(np.uint32), graph.lengths, graph.lengths.view(np.int32), may_end, taken, budget)
        )
    keep = taken & graph.alive
    fill_largest(keep, graph.alive, kernel_scores(graph), budget)
    return keep, chains


def kernel_scores(graph: ChannelGraph) -> NDArray[np.float32]:
    """Largest length over all edges of each kernel, shape (k,); 0 where it has no edge."""
    scores = np.zeros(graph.num_kernels, dtype=np.float32)
    _maximum_lengths(
        graph.sizes, graph.length_start, graph.kernel_start, graph.lengths, scores
    )
    return scores


def fill_largest(
    keep: NDArray[np.bool_],
    alive: NDArray[np.bool_],
    scores: NDArray[np.floating],
    budget: int,
) -> None:
    """Fill `keep` up to `budget` with the alive kernels of largest score, in place.

    Of equal scores the smaller kernel numbers come first.
    """
    missing = budget - int(np.count_nonzero(keep))
    if missing <= 0:
        return
    free = alive & ~keep
    values = scores[free]
    if missing >= len(values):
        keep |= alive
        return
    values.partition(len(values) - missing)
    threshold = values[len(values) - missing]
    above = free & (scores > threshold)
    keep |= above
    equal = np.flatnonzero(free & (scores == threshold))
    keep[equal[: missing - int(np.count_nonzero(above))]] = True


@numba.njit(cache=True, inline="always")
def log2_ceiling(bits):
    """Upper bound of the logarithm of a float32 length, given its bits; 0.0861 too much at most.

    The bits of a float are its logarithm, interpolated linearly between powers of two. That
    takes a tenth of the time of `log2`, and settles nearly every comparison.
    """
    return (bits - 0x3F800000) * 2.0**-23 + 0.0861


@numba.njit(cache=True)
def _maximum_lengths(sizes, length_start, kernel_start, lengths, scores):
    """Write into `scores` the largest length over all edges of each kernel."""
    for v in range(len(sizes)):
        start, first = kernel_start[v], length_start[v]
        if start >= 0:
            for j in range(sizes[v]):
                if lengths[first + j] > scores[start + j]:
                    scores[start + j] = lengths[first + j]


_SMALL = 16
_JUST_BELOW = -1e-300


@numba.njit(cache=True)
def _scan_row(sources, lengths, bits, kernel, taken, values):
    """All edges"""
    most, edge = _JUST_BELOW, -1
    for j in range(len(sources)):
        value = values[sources[j]]
        if log2_ceiling(bits[j]) + value > most:
            if lengths[j] > 0 and not (kernel >= 0 and taken[kernel + j]):
                x = log2(np.float64(lengths[j])) + value
                if x > most:
                    most, edge = x, j
    return most, edge


@numba.njit(cache=True)
def _scan_head(logs, edges, sources, kernel, taken, values):
    """All edges"""
    while True:
        most, place = _JUST_BELOW, -1
        for i in range(len(logs)):
            value = logs[i] + values[sources[edges[i]]]
            if value > most:
                most, place = value, i
        if place < 0:
            return most, -1
        j = edges[place]
        if kernel < 0 or not taken[kernel + j]:
            return most, j
        logs[place] = _NONE


@numba.njit(cache=True)
def _build_head(lengths, bits, kernel, taken, logs, edges, cutoff):
    """All edges"""
    count = 0
    for j in range(len(bits)):
        if log2_ceiling(bits[j]) >= cutoff and lengths[j] > 0 and not (kernel >= 0 and taken[kernel + j]):
            if count == len(logs):
                return -1
            logs[count] = log2(np.float64(lengths[j]))
            edges[count] = j
            count += 1
    return count


@numba.njit(cache=True)
def _sift_down(keys, ids, count):
    """Move the first entry of a heap down to its place: larger keys, then smaller ids first."""
    key, name = keys[0], ids[0]
    place = 0
    while 2 * place + 1 < count:
        c = 2 * place + 1
        if c + 1 < count and (
            keys[c + 1] > keys[c] or (keys[c + 1] == keys[c] and ids[c + 1] < ids[c])
        ):
            c += 1
        if keys[c] < key or (keys[c] == key and ids[c] > name):
            break
        keys[place], ids[place] = keys[c], ids[c]
        place = c
    keys[place], ids[place] = key, name


@numba.njit(cache=True)
def _extract(sizes,source_start,length_start,kernel_start,all_sources,all_lengths,all_bits, may_end, taken, budget):
    """Extract longest chains until `budget` kernels are taken; returns how many chains."""
    n = len(sizes)
    best,start,used,strongest=np.full(n, _NONE), np.zeros(n), np.zeros(n), np.full(n, -1, dtype=np.int32)
    head_begin=np.cumsum(sizes // 2) - sizes // 2
    head_count=np.full(n, -1, dtype=np.int32)
    cutoffs=np.zeros(n)
    groups=np.zeros(n, dtype=np.int32)
    maxima=        np.full(n, np.inf)
    leaders=np.full(n, -1, dtype=np.int32)
    all_logs=np.empty(np.sum(sizes // 2))
    all_edges=np.empty(np.sum(sizes // 2), dtype=np.int32)
    stats=np.zeros(8,np.int64)
    for v in range(n):
        if v > 0:
            same = source_start[v] == source_start[v - 1] and sizes[v] == sizes[v - 1] and (kernel_start[v] < 0) == (kernel_start[v - 1] < 0)
            groups[v] = groups[v - 1] + (not same)
        values = start if kernel_start[v] >= 0 else best
        size, s, first = sizes[v], source_start[v], length_start[v]
        sources = all_sources[s : s + size]
        most, edge = _scan_row(sources,all_lengths[first:first+size],all_bits[first:first+size],kernel_start[v], taken, values)
        if edge >= 0:
            best[v], start[v], strongest[v], used[v] = most, most, edge, values[sources[edge]]
    order = np.argsort(-best, kind="mergesort")
    heap = np.empty(n, dtype=np.int32)
    bounds = np.empty(n)
    count = 0
    for v in order:
        if best[v] >= 0 and may_end[v]:
            heap[count], bounds[count] = v, best[v]
            count += 1
    path = np.empty(n, dtype=np.int32)
    chains = 0
    found = 0
    while count > 0 and found < budget:
        v = heap[0]
        if bounds[0] > best[v]:
            bounds[0] = best[v]
            if best[v] < 0:
                count -= 1
                heap[0], bounds[0] = heap[count], bounds[count]
            _sift_down(bounds, heap, count)
            continue
        length = 0
        stale = -1
        while True:
            path[length] = v
            j, kernel = strongest[v], kernel_start[v]
            u = all_sources[source_start[v] + j]
            if kernel >= 0:
                if taken[kernel + j] or start[u] != used[v]:
                    stale = length
            elif best[u] != used[v]:
                stale = length
            length += 1
            if best[u] < 0:
                break
            v = u
        if stale < 0:
            chains += 1
            for i in range(length):
                v = path[i]
                kernel = kernel_start[v] + strongest[v]
                if kernel_start[v] >= 0 and not taken[kernel]:
                    taken[kernel] = True
                    found += 1
            continue
        for i in range(stale, -1, -1):
            v = path[i]
            edge, kernel, s, size, first = strongest[v], kernel_start[v], source_start[v], sizes[v], length_start[v]
            if edge < 0:
                continue
            values = start if kernel >= 0 else best
            sources = all_sources[s:s+size]
            if values[sources[edge]] == used[v] and (kernel < 0 or not taken[kernel + edge]):
                continue
            g = groups[v]
            begin = head_begin[v]
            sure = False
            if head_count[v] >= 0:
                logs = all_logs[begin : begin + head_count[v]]
                edges = all_edges[begin : begin + head_count[v]]
                most, edge = _scan_head(logs, edges, sources, kernel, taken, values)
                rest = cutoffs[v] + maxima[g]
                sure = rest < 0 or rest < most
                stats[1]+=1
                stats[2]+=head_count[v]
            if not sure and size > _SMALL:
                if leaders[g] < 0 or values[leaders[g]] != maxima[g]:
                    stats[3]+=1
                    largest, leader = _NONE, sources[0]
                    for u in sources:
                        if values[u] > largest:
                            largest, leader = values[u], u
                    maxima[g], leaders[g] = largest, leader
                rest = cutoffs[v] + maxima[g]
                sure = head_count[v] >= 0 and (rest < 0 or rest < most)
            if not sure:
                stats[4]+=1
                lengths,bits = all_lengths[first:first+size],all_bits[first:first+size]
                most, edge = _scan_row(sources,lengths, bits, kernel, taken, values)
                if edge >= 0 and size > _SMALL:
                    logs = all_logs[begin : begin + size//2]
                    edges = all_edges[begin : begin + size//2]
                    slack = 1.0
                    for _ in range(4):
                        cutoffs[v] = max(most - maxima[g] - slack, -maxima[g])
                        head_count[v] = _build_head(lengths,bits,kernel, taken, logs, edges, cutoffs[v])
                        if head_count[v] >= 0:
                            break
                        slack/=2
            if edge < 0:
                best[v], start[v] = _NONE, 0.0
            else:
                best[v], start[v], used[v] = most, most, values[sources[edge]]
            strongest[v] = edge
    print(chains, found,stats)
    return chains
