"""What repair does at one layer: measure what it lacks, solve, and write the correction down."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, isnan, sqrt

import torch
from torch import Tensor, fx, nn

from ..channels.weights import Weight
from ..errors import ArgumentError
from ..ranks import summed
from .elements import Elements, elements_of
from .least_squares import correct
from .shares import data_of
from .side_by_side import Side, Stop
from .statistics import is_frozen_mean
from .systems import Sample, in_layout, operator_of
from .uses import Uses, mean_behind

OTHER_DATA = "reads data of another shape than in the reference"


@dataclass(frozen=True)
class LayerError:
    """The held-out error of a layer, relative to the standard deviation of what it should give.

    Of the output channels that have kernels left.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Pair:
    """The same batch in the network that is repaired and in its reference.

    Attributes:
        mine, theirs: the two networks.
        held: fraction of the samples, the last ones, that are held out.
        pending: numbers of the stops that are layers still to be corrected; one set for all pairs.
    """

    mine: Side
    theirs: Side
    held: float
    pending: set[int]

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The leading part of values to solve for, and the rest to choose by."""
        first = round(values.shape[0] * (1 - self.held))
        return values[:first], values[first:]

    def forked(self) -> Pair:
        """The same batch, run as far, to be run on by itself."""
        return replace(self, mine=self.mine.forked(), theirs=self.theirs.forked())

    def foresee(self, stop: Stop, result: Tensor, target: Tensor) -> None:
        """Go past a layer as if what is left of it gave its target already."""
        assert stop.block is not None
        left = stop.block.weight.kernels(stop.block.weight.value).flatten(1).any(1)
        if result.shape == target.shape:
            result = torch.where(left.reshape(-1, *[1] * (result.dim() - 2)), target, result)
        self.mine.take(result)


def visits(pairs: Sequence[Pair], uses: Uses) -> Iterator[tuple[Pair, fx.Node, fx.Node]]:
    """Meet at every use of a layer: yields a pair that has run as far, and its two calls.

    Pairs themselves run up to the first use only, since what is corrected there changes what comes
    behind; to see the later uses, copies run ahead. There, layers still to be corrected give what
    they should: their errors are not what the layer will meet, and pile up in its own results.
    """
    for pair in pairs:
        if len(uses) > 1:
            pair = pair.forked()
        for previous, number in zip((uses[0], *uses), uses, strict=False):
            for between in sorted(pair.pending & {*range(previous + 1, number)}):
                node, _ = pair.mine.advance(between), pair.theirs.advance(between)
                result, target = pair.mine.running.compute(node), pair.theirs.run()
                pair.foresee(pair.mine.stops[between], result, target)
            yield pair, pair.mine.advance(number), pair.theirs.advance(number)


class OtherDataError(Exception):
    """A layer reads data of another shape than in the reference."""


def correct_layer(
    model: nn.Module,
    pairs: Sequence[Pair],
    uses: Uses,
    elements: Elements,
    shared: Container[str],
    steps: int,
) -> LayerError:
    """Correct a convolution or linear layer in place, for all its uses.

    Args:
        model: whose layer it is.
        pairs: at least one of them holds samples out.
        uses: the stops that are this layer.
        elements: of the weight.
        shared: parameters that must stay, because other layers read them as well.
        steps: conjugate gradient steps.
    """
    side = pairs[0].mine
    stop = side.stops[uses[0]]
    assert stop.block is not None
    weight = stop.block.weight
    linear = weight.columns is not None
    mask = _kept(weight, elements)
    alive = mask.flatten(1).any(1)  # a channel without kernels stays dead
    fit, held, spreads = _samples(pairs, uses, linear=linear)
    constant, sign = _constant(model, side, uses, shared)
    free = mask.new_zeros(len(mask)) if constant is None else constant.kept & alive
    found = correct(operator_of(weight, stop.node), mask, free, fit, held, steps=steps)
    elements.add(in_layout(weight, found.kernels[..., 0] if linear else found.kernels))
    if constant is not None:
        constant.add(sign * found.bias)
    before, after, spread = (
        float(values[alive].sum()) for values in (found.before, found.after, spreads)
    )
    return LayerError(weight.layer_name, relative(before, spread), relative(after, spread))


def _kept(weight: Weight, elements: Elements) -> Tensor:
    """True for the elements that may change, shape (out, in, *size); not in kernels of zeros.

    Those have been pruned without masks, or before `prune.remove`.
    """
    kept, value = weight.kernels(elements.kept), weight.kernels(elements.value())
    if weight.columns is not None:
        return (kept & (value != 0))[..., None]
    alive = value.flatten(2).any(2)
    return kept & alive.reshape(*alive.shape, *[1] * (kept.dim() - 2))


def _samples(
    pairs: Sequence[Pair], uses: Uses, *, linear: bool
) -> tuple[list[Sample], list[Sample], Tensor]:
    """What a layer reads and lacks, to solve for and held out; and the spreads of its target."""
    fit: list[Sample] = []
    held: list[Sample] = []
    targets: list[Tensor] = []
    for pair, node, _ in visits(pairs, uses):
        target = pair.theirs.run()
        x, result = pair.mine.running.value(data_of(node)), pair.mine.running.compute(node)
        if result.shape != target.shape:
            raise OtherDataError
        _check_finite(pair.mine.stops[uses[0]], target)
        if len(uses) > 1:
            pair.foresee(pair.mine.stops[uses[0]], result, target)
        wide = torch.promote_types(x.dtype, torch.float32)
        values = [t.to(wide)[..., None] if linear else t.to(wide) for t in (x, target, result)]
        (x, x_held), (target, y_held), (result, result_held) = map(pair.split, values)
        if len(x):
            fit.append(Sample(x, target - result))
        if len(x_held):
            held.append(Sample(x_held, y_held - result_held))
            targets.append(y_held)
    return fit, held, spreads_of(targets)


def _constant(
    model: nn.Module, side: Side, uses: Uses, shared: Container[str]
) -> tuple[Elements | None, float]:
    """What adds a constant to every output channel of a layer, and its sign.

    The bias; without one, the running mean of the batch norm that alone reads the layer, unless
    that is frozen.
    """
    bias = side.stops[uses[0]].bias
    if isinstance(bias, fx.Node):
        found = elements_of(model, side.running.origin(bias), side.running.value(bias), shared)
        return (None if isinstance(found, str) else found), 1.0
    name = mean_behind(side, uses)
    if name is None or is_frozen_mean(model, name):
        return None, 1.0
    mean = dict(model.named_buffers())[name]
    index = torch.arange(len(mean), device=mean.device)
    return Elements(mean, index, torch.ones_like(index, dtype=torch.bool)), -1.0


def spreads_of(targets: Sequence[Tensor]) -> Tensor:
    """Squared deviations of each channel (dimension 1) from its mean, added up on all ranks."""
    flat = [target.double().transpose(0, 1).flatten(1) for target in targets]
    mean = mean_of(flat)[:, None]
    return summed(torch.stack([(part - mean).square().sum(1) for part in flat]).sum(0))


def mean_of(parts: Sequence[Tensor]) -> Tensor:
    """The mean of every row of parts of shape (rows, any number), over all ranks, in float64."""
    total = summed(torch.stack([part.sum(1, dtype=torch.float64) for part in parts]).sum(0))
    return total / summed(torch.tensor(sum(part.shape[1] for part in parts)))


def relative(error: float, spread: float) -> float:
    """The root of a squared error over the spread of what it is an error of; NaN if it is."""
    if isnan(error):
        return error
    return sqrt(error / spread) if spread > 0 else inf if error > 0 else 0.0


def _check_finite(stop: Stop, target: Tensor) -> None:
    assert stop.block is not None
    if not target.isfinite().all():
        raise ArgumentError(
            f"the reference gives NaN or infinity at {stop.block.weight.layer_name}. Pass a "
            "reference with finite weights, and batches in their usual range."
        )
