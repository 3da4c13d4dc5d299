"""Rules of operators that mix positions: pooling, padding, resampling, reductions, patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from ...norms.operator import operator_norms
from ..builder import Bias
from ..flow import Flow, make_flow, reshape
from ..graph import Kind
from ..site import Site

aten = torch.ops.aten

WINDOWS = {
    1: (
        aten.adaptive_avg_pool1d,
        aten.adaptive_max_pool1d,
        aten.reflection_pad1d,
        aten.replication_pad1d,
        aten.upsample_linear1d,
        aten.upsample_nearest1d,
        aten._upsample_nearest_exact1d,
    ),
    2: (
        aten._adaptive_avg_pool2d,
        aten.adaptive_max_pool2d,
        aten.fractional_max_pool2d,
        aten.max_pool2d_with_indices,
        aten.reflection_pad2d,
        aten.replication_pad2d,
        aten.upsample_bicubic2d,
        aten.upsample_bilinear2d,
        aten.upsample_nearest2d,
        aten._upsample_bicubic2d_aa,
        aten._upsample_bilinear2d_aa,
        aten._upsample_nearest_exact2d,
    ),
    3: (
        aten._adaptive_avg_pool3d,
        aten.adaptive_max_pool3d,
        aten.max_pool3d_with_indices,
        aten.reflection_pad3d,
        aten.replication_pad3d,
        aten.upsample_nearest3d,
        aten.upsample_trilinear3d,
        aten._upsample_nearest_exact3d,
    ),
}
MEETING = 2**16  # positions of two matrices that are looked at one by one
AVERAGES = {1: aten.avg_pool1d, 2: aten.avg_pool2d, 3: aten.avg_pool3d}
WINDOWED = frozenset(
    {operator for each in WINDOWS.values() for operator in each} | {*AVERAGES.values()}
)
ATTENTIONS = (
    aten.scaled_dot_product_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_fused_attention_overrideable,
)
REDUCTIONS = (
    aten.all,
    aten.amax,
    aten.amin,
    aten.aminmax,
    aten.any,
    aten.argmax,
    aten.argmin,
    aten.linalg_vector_norm,
    aten.logsumexp,
    aten.max,
    aten.mean,
    aten.median,
    aten.min,
    aten.nansum,
    aten.prod,
    aten.std,
    aten.sum,
    aten.var,
    aten.var_mean,
)


def window(spatial: int, gain: Callable[[Site], float] | None = None) -> Callable[[Site], Any]:
    """Pooling, padding or resampling over the last `spatial` dimensions."""

    def rule(site: Site) -> Any:
        """Pooling, padding or resampling: the channel stays, and so does a dead one."""
        flow = site.flow()
        rank = len(flow.shape)
        flow = site.wiring.merge(flow, range(rank - spatial))
        scale = flow.gain * (gain(site) if gain else 1.0)
        return _results(site, [make_flow(flow.ids, scale, shape) for shape in site.shapes()])

    return rule


def average_gain(spatial: int) -> Callable[[Site], float]:
    """Operator norm of an average pooling: 0.5 for 2x2 with stride 2."""

    def gain(site: Site) -> float:
        size = list(site.argument("kernel_size"))
        size *= spatial // len(size)
        stride = list(site.argument("stride")) or size
        kernel = torch.full((1, 1, *size), 1 / float(torch.tensor(size).prod()))
        return operator_norms(kernel, stride * (spatial // len(stride))).item()

    return gain


def reduction(site: Site) -> Any:
    """A mean, sum or maximum over dimensions; channels that differ along them are merged."""
    flow, left = _merged(site)
    rank = len(flow.shape)
    results = []
    at_zero = site.run(lambda node: torch.zeros((2,) * rank))
    several = isinstance(at_zero, tuple | list)
    for shape, value in zip(site.shapes(), at_zero if several else [at_zero], strict=True):
        if len(shape) == rank:
            result = make_flow(flow.ids, flow.gain, shape)
        else:
            ids = flow.ids.reshape([flow.ids.shape[dim] for dim in left])
            gain = flow.gain.reshape([flow.gain.shape[dim] for dim in left])
            result = make_flow(ids, gain, shape)
        zero = torch.zeros if not value.any() else torch.ones
        results.append(site.wiring.shift(result, Bias(zero((1,) * len(shape)))))
    return _results(site, results)


def reduced(site: Site) -> set[int]:
    """The dimensions over which a reduction, a softmax or a transform goes."""
    rank, dims = len(site.flow().shape), site.argument("dim")
    dims = [dims] if isinstance(dims, int) else dims
    return {dim % rank for dim in dims} if dims else set(range(rank))


def _merged(site: Site) -> tuple[Flow, list[int]]:
    """The value with all positions along these dimensions taken together, and the others."""
    flow, along = site.flow(), reduced(site)
    left = [dim for dim in range(len(flow.shape)) if dim not in along]
    return site.wiring.merge(flow, left), left


def real_parts(site: Site) -> Flow:
    """`view_as_real`: the real and imaginary part of every value, in a last dimension."""
    flow = site.flow()
    return make_flow(flow.ids[..., None], flow.gain[..., None], site.shape)


def complex_values(site: Site) -> Flow:
    """`view_as_complex`: the other way round."""
    flow = site.flow()
    flow = site.wiring.merge(flow, range(len(flow.shape) - 1))
    return make_flow(flow.ids[..., 0], flow.gain[..., 0], site.shape)


def unpool(site: Site) -> Flow:
    """`max_unpool`: zero where its input is, placed by indices that are never dead."""
    flow, indices = site.flows()
    spatial = list(range(2))
    flow = site.wiring.merge(flow, spatial)
    live = site.wiring.derive(Kind.LIVE, site.wiring.merge(indices, spatial))
    return site.wiring.join(Kind.PRODUCT, [flow, live], site.shape)


def mixed(site: Site) -> Any:
    """Along some dimensions every result depends on every position: sorting, sums up to there."""
    return _mixed(site, 1.0)


def transform(site: Site) -> Any:
    """A discrete Fourier transform: the norm is that of the whole transform.

    One from half of a spectrum to real numbers counts all but the first and last frequency twice.
    """
    dims = list(site.argument("dim"))
    half = site.packet is aten._fft_c2r
    shape = site.shape if half else site.flow().shape
    length = prod(shape[dim] for dim in dims)
    scale = length ** (0.5 - 0.5 * site.argument("normalization"))
    return _mixed(site, scale * (sqrt(2) if half and shape[dims[-1]] > 2 else 1.0))


def _mixed(site: Site, gain: float) -> Any:
    flow, _ = _merged(site)
    return _results(site, [make_flow(flow.ids, flow.gain * gain, shape) for shape in site.shapes()])


def product(site: Site) -> Flow:
    """A product of two matrices of flows: a sum, over what they share, of products that meet."""
    left, right = site.flow(site.argument("self")), site.flow(site.argument("mat2"))
    (batch, rows, shared), columns = left.shape, right.shape[2]
    sizes = torch.broadcast_shapes(left.ids[..., None].shape, right.ids[:, None].shape)
    if torch.Size(sizes).numel() > MEETING:
        # As if all rows and columns were one, or all that they share, whichever leaves less.
        inner = sizes[2] <= sizes[1] * sizes[3]
        left = site.wiring.merge(left, [0, 2] if inner else [0, 1])
        right = site.wiring.merge(right, [0, 1] if inner else [0, 2])
    flows = [
        make_flow(left.ids[..., None], left.gain[..., None], (batch, rows, shared, 1)),
        make_flow(right.ids[:, None], right.gain[:, None], (batch, 1, shared, columns)),
    ]
    met = site.wiring.join(Kind.PRODUCT, flows, (batch, rows, shared, columns))
    summed = site.wiring.merge(met, [0, 1, 3])
    return make_flow(summed.ids.squeeze(2), summed.gain.squeeze(2), site.shape)


def attention(site: Site) -> Any:
    """Attention: scores depend on all of queries and keys, and mix values over their positions."""
    names = ("query", "key", "value", "attn_mask", "attn_bias")
    query, key, value, *masks = (site.argument(name) for name in names)
    shape = site.shape
    heads = range(len(shape) - 2)
    shapes = [tuple(node.meta["val"].shape) for node in (query, key, value)]
    if not site.is_constant(masks) or len({tuple(s[d] for d in heads) for s in shapes}) > 1:
        return site.opaque()
    asked = [site.wiring.merge(site.flow(operand), heads) for operand in (query, key)]
    asked = [make_flow(flow.ids, flow.gain, (*shape[:-2], 1, 1)) for flow in asked]
    scores = site.wiring.join(Kind.LIVE, asked, (*shape[:-2], 1, 1))
    values = site.wiring.merge(site.flow(value), [*heads, -1])
    values = make_flow(values.ids, values.gain, (*shape[:-2], 1, shape[-1]))
    met = site.wiring.join(Kind.PRODUCT, [scores, values], (*shape[:-2], 1, shape[-1]))
    return make_flow(met.ids, met.gain, shape)


def _results(site: Site, flows: Sequence[Flow]) -> Any:
    """One flow, or several; the integers among several are places, and never dead."""
    value = site.node.meta["val"]
    if isinstance(value, Tensor):
        return flows[0]
    read = {user.args[1] for user in site.node.users}
    return tuple(
        site.wiring.derive(Kind.LIVE, flow)
        if number in read and not item.is_floating_point()
        else flow
        for number, (flow, item) in enumerate(zip(flows, value, strict=True))
    )


def sampled(site: Site) -> Flow:
    """`grid_sample`: zero where its input is, taken at places that are never dead."""
    flow = site.wiring.merge(site.flow(site.argument("input")), [0, 1])
    grid = site.wiring.merge(site.flow(site.argument("grid")), [])
    grid = make_flow(grid.ids, grid.gain, (site.shape[0], *[1] * (len(site.shape) - 1)))
    return site.wiring.join(Kind.PRODUCT, [flow, site.wiring.derive(Kind.LIVE, grid)], site.shape)


def unfolded(site: Site) -> Flow:
    """`unfold`: the patches of an image, laid out along the channel dimension."""
    flow = site.flow()
    flow = site.wiring.merge(flow, range(len(flow.shape) - 2))
    size = site.shape[-2] // flow.shape[-3]
    ids, gain = (t.squeeze(-1).repeat_interleave(size, -2) for t in (flow.ids, flow.gain))
    return make_flow(ids, gain, site.shape)


def folded(site: Site) -> Flow:
    """`fold`: patches, laid out along the channel dimension, added up to an image."""
    flow, channels = site.flow(), site.shape[-3]
    shape = flow.shape[:-2]
    flow = reshape(flow, (*shape, channels, flow.shape[-2] // channels, flow.shape[-1]))
    flow = site.wiring.merge(flow, range(len(shape) + 1))
    return make_flow(flow.ids, flow.gain, site.shape)
