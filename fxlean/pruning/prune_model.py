"""The front door: `prune`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..calibration.reference import fingerprint, is_unpruned, remember
from ..channels.walk import wire
from ..errors import PruneWarning, warn
from ..ranks import agreed
from ..selection.methods import METHODS, SHARE
from ..tracing.arguments import check_finite, unwrapped
from ..tracing.sandbox import ordinary, paused_collection, untouched
from ..tracing.tracer import trace_model
from .choice import choose_channels, choose_kernels
from .latency import latency_on
from .masks import apply_masks, check_outputs, parameter_masks
from .networks import example_and_data, network_of, with_lengths
from .options import LATENCY, check
from .progress import Stages
from .prunable import Network
from .result import LayerCount, PruneResult, times
from .targets import Problem, Target, least_of


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
    include_linear: bool | None = None,
    calibration: Any = None,
    granularity: str = "kernel",
    of: str | Callable[[nn.Module], float] = "kernels",
    at_least: float | Mapping[Any, float] | None = None,
    round_to: int | None = None,
    progress: bool | None = None,
) -> PruneResult:
    """Prune a model in place to a fraction of its convolution kernels, with masks.

    Or to a fraction of what it costs (`of`), by single kernels or by whole channels, which make
    networks faster (`granularity`).

    The masks are those of `torch.nn.utils.prune`: train on to fine-tune, `prune.remove` makes
    them permanent. A model that fails to be pruned is left as it was. In a process group every rank
    must prune, before or after wrapping in `DistributedDataParallel`, and all get the masks of the
    first.

    Args:
        model: any convolutional network, on any device, in any floating-point type.
        ratio: fraction to keep, in (0, 1], of the prunable kernels, or of what `of` says; kernels
            that earlier masks removed count as pruned. 0.05 keeps 5 %.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments
            that the model accepts; if left out, common sizes are tried.
        method: "lean" (longest chains), "path" (complete chains), "relevance" (what most of the
            outputs flows through, on `calibration`), "spectral" and "l1" (kernels with the
            largest norms), or "random".
        ignore: layers to leave alone: names of modules or parameters, glob patterns, modules or
            module types.
        norm: length of a kernel for "lean", "path" and "spectral": "spectral", "frobenius",
            "nuclear" or "l1".
        redundancy: whether to remove kernels that read only zeros, or that nothing reads.
        prune_outputs: whether to prune the layers that make the model's output; one that the
            model reads itself as well is pruned anyway.
        include_linear: whether to prune linear layers, feature by feature; if left out, with whole
            channels only.
        calibration: unlabelled batches for "relevance": one, or an iterable such as a
            `DataLoader`, of tensors, tuples of arguments or dicts; labels beside the only input
            are left out. Without them, noise of the shape of the example inputs. In a process
            group those of all ranks count.
        granularity: "kernel", or "channel" for whole channels: at once all that can only go
            together.
        of: what the ratio is a fraction of: "kernels", the network's "parameters" or "macs"
            (with single kernels, those that the prunable kernels have), or its "latency": measured
            on this machine, compacted, in eval mode, on the example inputs. Or a function that
            measures a compacted model.
        at_least: the fraction of its kernels or channels that every layer keeps; or a mapping from
            layers, named as for `ignore`, to fractions, of which the last that matches counts. A
            layer keeps at least one channel.
        round_to: numbers of channels are multiples of it; for whole channels. If left out, where
            more than 64 can go one by one, multiples of 16 stay, which computers are faster with.
        progress: show a bar; by default on a terminal, if it takes seconds.

    Returns:
        What was kept, layer by layer.

    Raises:
        ArgumentError: an argument makes no sense, the model rejects the example inputs, there
            is nothing to prune, the ratio cannot be reached, weights hold NaN or infinity, or the
            outputs would. It is a ValueError.
        TraceError: no example inputs were given and none that were tried fit.

    Warns:
        PruneWarning: operators without a rule were treated as reading and writing everything,
            the model was traced in parts, something outside of it has kept tensors of the trace,
            or so few kernels are kept that the output does not depend on the input any more.

    Source: Schoonhoven, Hendriksen, Pelt and Batenburg, arXiv 2011.06923.
    """
    check(
        model,
        ratio,
        method=method,
        norm=norm,
        ignore=ignore,
        progress=progress,
        redundancy=redundancy,
        prune_outputs=prune_outputs,
        include_linear=include_linear,
        granularity=granularity,
        of=of,
        at_least=at_least,
        round_to=round_to,
    )
    model = unwrapped(model)
    chosen = METHODS[method]
    order = chosen.norm or norm
    by_channel = granularity == "channel"
    linear = by_channel if include_linear is None else include_linear
    from ..selection.jit import when_compiling  # here, because numba takes long to import
    from ..selection.liveness import used_kernels, zero_channels

    with (
        ordinary(),
        paused_collection(),
        Stages(progress) as stages,
        when_compiling(stages.compiling),
    ):
        stages.start("trace")
        example_inputs, batches = example_and_data(model, example_inputs, order, calibration)
        trace = trace_model(model, example_inputs)
        wired = wire(model, trace)
        network = network_of(model, wired, ignore, prune_outputs, linear)
        stages.start("norms")
        overlaps: dict[int, NDArray[np.float64]] = {}
        graph = with_lengths(
            *(model, trace, wired, network, batches, order),
            gains=chosen.gains,
            overlaps=overlaps if by_channel and chosen.norm == SHARE else None,
        )
        check_finite(model, network.used)
        stages.start("select")
        names = [layer.name for layer in graph.layers]
        measured = latency_on(trace.arguments) if of == LATENCY else of
        target = Target(float(ratio), measured, least_of(model, at_least, names), round_to)
        found = replace(network, graph=graph)
        problem = Problem(found, chosen, _generator(method), target, overlaps)
        choice = (choose_channels if by_channel else choose_kernels)(model, trace, problem)
        keep, selected = choice.keep, int(choice.keep.sum())
        del problem  # its lengths are as large as the model
        graph = network.graph
        if redundancy:
            keep = used_kernels(graph, keep)
        zero = zero_channels(graph, keep, redundancy=redundancy)
        maskable = zero_channels(graph, np.zeros_like(keep))
        keep, zero, selected, choice = agreed((keep, zero, selected, choice))
        stages.start("masks")
        masks = parameter_masks(model, network, keep, zero, maskable)
        unpruned = fingerprint(model) if is_unpruned(model) else None
        with untouched(model, always=False):
            apply_masks(model, masks, trace.called)
            check_outputs(model, trace)
        remember(model, unpruned)
    result = PruneResult(
        method=method,
        kept=int(keep.sum()),
        total=graph.num_kernels,
        selected=selected,
        chains=choice.chains,
        layers=tuple(
            LayerCount(layer.name, int(keep[layer.kernels].sum()), layer.rows * layer.columns)
            for layer in graph.layers
        ),
        share=_share(model, network),
        opaque_ops=network.opaque_ops,
        skipped=network.skipped,
        timings=stages.seconds,
        calibration=_kind(order, calibration),
        left=choice.left,
        pinned=choice.pinned,
    )
    _warn(result)
    return result


def _kind(order: str, calibration: Any) -> str:
    """Which data were asked for lengths of an order."""
    if order != SHARE:
        return ""
    return "noise" if calibration is None else "batches"


def _share(model: nn.Module, network: Network) -> float:
    """The fraction of the elements of all parameters that prunable kernels hold."""
    prunable = sum(weight.value.numel() for weight in network.weights)
    return prunable / sum(parameter.numel() for parameter in model.parameters())


def _generator(method: str) -> np.random.Generator:
    """Random numbers that follow `torch.manual_seed`; other methods leave torch's RNG alone."""
    seed = int(torch.randint(2**62, (), device="cpu")) if method == "random" else 0
    return np.random.default_rng(seed)


def _warn(result: PruneResult) -> None:
    if result.opaque_ops:
        ops = ", ".join(f"{op} ({times(count)})" for op, count in result.opaque_ops.items())
        warn(
            f"no rule for {ops}: treated as reading and writing every channel, so nothing before "
            "them counts as redundant. The masks are right; fxlean.register adds a rule.",
            PruneWarning,
        )
    if result.selected == 0:
        warn(
            f"the ratio leaves none of the {result.total} kernels, so the output is constant. "
            "Keep more.",
            PruneWarning,
        )
    elif result.kept == 0:
        warn(
            f"the {result.selected} kernels that {result.method} selected connect no input to an "
            "output, so all of them were redundant and the output is constant. Keep more, prune "
            "in several steps with fxlean.iterate, or use method='path', which keeps chains whole.",
            PruneWarning,
        )
