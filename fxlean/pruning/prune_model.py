"""The front door: `prune`, `iterate` and `trace`."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import nn

from ..calibration.batches import example_and_batches, restartable
from ..calibration.reference import copied, fingerprint, is_unpruned, remember
from ..calibration.repair_model import repair as repair_model
from ..calibration.shares import shares_of
from ..channels.graph import ChannelGraph
from ..channels.walk import Wired, wire
from ..errors import ArgumentError, PruneWarning
from ..norms.operator import ORDERS
from ..selection.methods import METHODS, SHARE
from ..tracing.arguments import check_model, resolve_ignored, unwrapped
from ..tracing.sandbox import on_cpu
from ..tracing.tracer import Trace, trace_model
from .lengths import fill_lengths
from .masks import apply_masks, parameter_masks
from .progress import Stages
from .prunable import Prunable, find_prunable
from .result import LayerCount, PruneResult, by_reason, times


def prune(
    model: nn.Module,
    ratio: float,
    example_inputs: Any = None,
    *,
    method: str = "lean",
    ignore: Any = (),
    norm: str = "spectral",
    redundancy: bool = True,
    prune_outputs: bool = False,
    include_linear: bool = False,
    calibration: Any = None,
    progress: bool | None = None,
) -> PruneResult:
    """Prune a model in place to a fraction of its convolution kernels, with masks.

    The masks are those of `torch.nn.utils.prune`: train on to fine-tune, `prune.remove` makes
    them permanent. A model that fails to be pruned is left as it was.

    Args:
        model: any convolutional network, on any device, in any floating-point type.
        ratio: fraction of the prunable kernels to keep, in (0, 1]; kernels that earlier masks
            removed count as pruned. 0.05 keeps 5 %.
        example_inputs: a tensor or a tuple of positional arguments that the model accepts; if
            left out, common sizes are tried.
        method: "lean" (longest chains), "path" (complete chains), "relevance" (what most of the
            outputs flows through, on `calibration`), "spectral" and "l1" (kernels with the
            largest norms), or "random".
        ignore: layers to leave alone: names of modules or parameters, glob patterns, modules or
            module types.
        norm: length of a kernel for "lean", "path" and "spectral": "spectral", "frobenius",
            "nuclear" or "l1".
        redundancy: whether to remove kernels that read only zeros, or that nothing reads.
        prune_outputs: whether to prune the layers that make the model's output.
        include_linear: whether to prune linear layers, feature by feature.
        calibration: unlabelled batches for "relevance": one, or an iterable such as a
            `DataLoader`, of tensors, tuples of arguments or dicts; labels beside the only input
            are left out. Without them, noise of the shape of the example inputs.
        progress: show a bar; by default on a terminal, if it takes seconds.

    Returns:
        What was kept, layer by layer.

    Raises:
        ArgumentError: an argument makes no sense, the model rejects the example inputs, there
            is nothing to prune, or weights hold NaN or infinity. It is a ValueError.
        TraceError: no example inputs were given and none that were tried fit.

    Warns:
        PruneWarning: operators without a rule were treated as reading and writing everything,
            or so few kernels are kept that the output does not depend on the input any more.

    Source: Schoonhoven, Hendriksen, Pelt and Batenburg, arXiv 2011.06923.
    """
    _check(model, ratio, method, norm)
    model = unwrapped(model)
    chosen = METHODS[method]
    order = chosen.norm or norm
    from ..selection.jit import when_compiling  # here, because numba takes long to import
    from ..selection.liveness import used_kernels, zero_channels

    with _paused_collection(), Stages(progress) as stages, when_compiling(stages.compiling):
        stages.start("trace")
        example_inputs, batches = _data(model, example_inputs, order, calibration)
        trace = trace_model(model, example_inputs)
        wired, prunable = _wired(model, trace, ignore, prune_outputs, include_linear)
        stages.start("norms")
        graph = _filled(model, trace, wired, prunable.graph, batches, order, fold=chosen.fold)
        stages.start("select")
        keep, chains = chosen.select(graph, int(ratio * graph.num_kernels), _generator(method))
        graph = prunable.graph  # the same without lengths, which are as large as the model
        selected = int(keep.sum())
        if redundancy:
            keep = used_kernels(graph, keep)
        zero = zero_channels(graph, keep, redundancy=redundancy)
        stages.start("masks")
        masks = parameter_masks(model, prunable, wired.wiring, keep, zero)
        unpruned = fingerprint(model) if is_unpruned(model) else None
        apply_masks(model, masks, trace.called)
        remember(model, unpruned)
    result = PruneResult(
        method=method,
        kept=int(keep.sum()),
        total=graph.num_kernels,
        selected=selected,
        chains=chains,
        layers=tuple(
            LayerCount(layer.name, int(keep[layer.kernels].sum()), layer.rows * layer.columns)
            for layer in graph.layers
        ),
        opaque_ops=wired.wiring.opaque_ops,
        skipped=prunable.skipped,
        timings=stages.seconds,
        calibration=_kind(order, calibration),
    )
    _warn(result)
    return result


def iterate(
    model: nn.Module,
    ratio: float,
    steps: int,
    example_inputs: Any = None,
    *,
    repair: bool = False,
    **options: Any,
) -> Iterator[PruneResult]:
    """Prune step by step: yields the result of each step, after which you fine-tune.

    Step t of n keeps `ratio ** (t / n)` of the kernels, as in the paper. With `repair`, every step
    is repaired towards the network as it was at the call, and the next one scores it anew.

    Args:
        model: pruned in place, further with every step.
        ratio: fraction of the prunable kernels that is kept in the end.
        steps: number of steps, at least 1.
        example_inputs: as for `prune`.
        repair: whether to repair after every step on the batches of `calibration`, or on noise;
            then no training is needed between the steps. See `fxlean.repair`.
        **options: any keyword argument of `prune`.

    Raises:
        ArgumentError: at the call for bad arguments, not at the first step.
    """
    _check(model, ratio, options.get("method", "lean"), options.get("norm", "spectral"))
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ArgumentError(f"steps is {steps!r}. Pass a whole number of at least 1.")
    options["calibration"] = restartable(options.get("calibration"))
    ratios = [ratio ** (step / steps) for step in range(1, steps + 1)]
    if repair:
        return _repaired(model, copied(model), ratios, example_inputs, options)
    return (prune(model, ratio, example_inputs, **options) for ratio in ratios)


def _repaired(
    model: nn.Module,
    reference: nn.Module,
    ratios: Sequence[float],
    example_inputs: Any,
    options: Mapping[str, Any],
) -> Iterator[PruneResult]:
    """Prune to each of these ratios, and repair towards the reference."""
    for ratio in ratios:
        result = prune(model, ratio, example_inputs, **options)
        _, batches = example_and_batches(unwrapped(model), example_inputs, options["calibration"])
        found = repair_model(model, list(batches), reference, progress=options.get("progress"))
        yield replace(result, repair=found)


def trace(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    ignore: Any = (),
    norm: str = "spectral",
    prune_outputs: bool = False,
    include_linear: bool = False,
    calibration: Any = None,
) -> ChannelGraph:
    """The channels of a model, the edges between them, and their lengths.

    Arguments and errors are those of `prune`; the model is not changed. With `norm="share"` the
    lengths are shares of variance, as for the method "relevance".
    """
    _check(model, 1.0, "lean", norm)
    model = unwrapped(model)
    with _paused_collection():
        example_inputs, batches = _data(model, example_inputs, norm, calibration)
        traced = trace_model(model, example_inputs)
        wired, prunable = _wired(model, traced, ignore, prune_outputs, include_linear)
        return _filled(model, traced, wired, prunable.graph, batches, norm, fold=True)


def _check(model: Any, ratio: Any, method: str, norm: str) -> None:
    """Reject arguments that make no sense, before anything is touched."""
    check_model(model)
    number = isinstance(ratio, Real) and not isinstance(ratio, bool)
    if not number or math.isnan(ratio) or not 0 < ratio <= 1:
        raise ArgumentError(
            f"ratio is {ratio!r}. Pass the fraction of kernels to keep, above 0 and at most 1: "
            "0.05 keeps 5 %."
        )
    if method not in METHODS:
        raise ArgumentError(f"method is {method!r}. Pass one of {', '.join(METHODS)}.")
    if norm not in (*ORDERS, SHARE):
        raise ArgumentError(f"norm is {norm!r}. Pass one of {', '.join((*ORDERS, SHARE))}.")


def _data(
    model: nn.Module, example_inputs: Any, order: str, calibration: Any
) -> tuple[Any, Iterator[tuple[Any, ...]]]:
    """Inputs to trace with, and the batches for an order of lengths that asks data."""
    if order != SHARE:
        return example_inputs, iter(())
    return example_and_batches(model, example_inputs, calibration)


def _kind(order: str, calibration: Any) -> str:
    """Which data were asked for lengths of an order."""
    if order != SHARE:
        return ""
    return "noise" if calibration is None else "batches"


def _filled(
    model: nn.Module,
    trace: Trace,
    wired: Wired,
    graph: ChannelGraph,
    batches: Iterator[tuple[Any, ...]],
    order: str,
    *,
    fold: bool,
) -> ChannelGraph:
    """The graph with lengths of an order: norms of kernels, or shares on batches."""
    if order == SHARE:
        return graph.with_lengths(shares_of(model, graph, trace, wired, batches))
    return fill_lengths(graph, wired.wiring, order, fold=fold)


@on_cpu()
def _wired(
    model: nn.Module, trace: Trace, ignore: Any, prune_outputs: bool, include_linear: bool
) -> tuple[Wired, Prunable]:
    """The wiring of a traced model, and which of its kernels can be pruned."""
    ignored = resolve_ignored(model, ignore)
    with torch.no_grad():
        wired = wire(model, trace)
        prunable = find_prunable(
            model, wired, ignored, prune_outputs=prune_outputs, include_linear=include_linear
        )
    if prunable.graph.num_kernels == 0:
        reasons = "; ".join(by_reason(prunable.skipped))
        raise ArgumentError(
            f"{type(model).__name__} has no convolution to prune ({reasons or 'none was found'}). "
            "Pass prune_outputs=True to prune the layers that make the output, or "
            "include_linear=True to prune linear layers."
        )
    return wired, prunable


@contextmanager
def _paused_collection() -> Iterator[None]:
    """No garbage collection: it would look at all objects of torch, again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _generator(method: str) -> np.random.Generator:
    """Random numbers that follow `torch.manual_seed`; other methods leave torch's RNG alone."""
    seed = int(torch.randint(2**62, (), device="cpu")) if method == "random" else 0
    return np.random.default_rng(seed)


def _warn(result: PruneResult) -> None:
    if result.opaque_ops:
        ops = ", ".join(f"{op} ({times(count)})" for op, count in result.opaque_ops.items())
        warnings.warn(
            f"no rule for {ops}: treated as reading and writing every channel, so nothing before "
            "them counts as redundant. The masks are right; fxlean.register adds a rule.",
            PruneWarning,
            stacklevel=3,
        )
    if result.selected == 0:
        warnings.warn(
            f"the ratio leaves none of the {result.total} kernels, so the output is constant. "
            "Keep more.",
            PruneWarning,
            stacklevel=3,
        )
    elif result.kept == 0:
        warnings.warn(
            f"the {result.selected} kernels that {result.method} selected connect no input to an "
            "output, so all of them were redundant and the output is constant. Keep more, prune "
            "in several steps with fxlean.iterate, or use method='path', which keeps chains whole.",
            PruneWarning,
            stacklevel=3,
        )
