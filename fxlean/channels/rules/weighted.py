"""Rules of the operators with weights: convolution, linear, and the norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..flow import Flow, distinct, make_flow, reduce_to, scalar_gain
from ..graph import Kind
from ..site import Site
from ..weights import Origin, Weight
from ..wiring import Block

aten = torch.ops.aten
BATCH_NORMS = frozenset(
    {
        aten._batch_norm_no_update,
        aten._batch_norm_with_update,
        aten._native_batch_norm_legit,
        aten._native_batch_norm_legit_no_training,
        aten.cudnn_batch_norm,
        aten.miopen_batch_norm,
        aten.native_batch_norm,
    }
)
LOW_VARIANCE = 1e-10  # below it a batch norm's input is constant; the paper's threshold


def convolution(site: Site) -> Any:
    """Any convolution: one new channel for each output channel, one edge for each kernel."""
    node = site.argument("weight")
    if not site.is_constant([node, site.argument("bias")]):
        return site.opaque()
    groups = site.argument("groups")
    origin, scale = _origins(site, node)
    weight = Weight(
        name=site.constants.name(node),
        value=site.value(node),
        transposed=site.argument("transposed"),
        origin=origin,
        scale=scale,
        stride=tuple(site.argument("stride")),
        dilation=tuple(site.argument("dilation")),
        groups=groups,
    )
    flow = site.wiring.merge(site.flow(site.argument("input")), [1])
    sources = _along(flow.ids, flow.shape[1]).reshape(groups, -1)
    gain = _along(flow.gain, flow.shape[1]).reshape(groups, -1)
    result, site.blocks[site.node] = _connect(site, weight, site.argument("bias"), sources, gain)
    return result


def linear(site: Site) -> Any:
    """A matrix product of a flow with a weight; features of one channel form one edge."""
    added = site.packet is aten.addmm
    data, node = site.argument("mat1" if added else "self"), site.argument("mat2")
    bias = site.argument("self") if added else None
    if site.is_constant(data) or not site.is_constant([node, bias]):
        return site.opaque()
    flipped = getattr(node.target, "overloadpacket", None) is aten.t
    inner = node.args[0] if flipped else node
    flow = site.wiring.merge(site.flow(data), [1])
    features = _along(flow.ids, flow.shape[1])
    sources, columns = distinct(features)
    origin, scale = _origins(site, inner)
    weight = Weight(
        name=site.constants.name(inner),
        value=site.value(inner),
        transposed=not flipped,
        origin=origin,
        scale=scale,
        columns=columns,
    )
    gain = torch.zeros(len(sources), dtype=torch.float64)
    gain.scatter_reduce_(0, columns, _along(flow.gain, flow.shape[1]), "amax")
    return _connect(site, weight, bias, sources[None], gain[None])[0]


def _origins(site: Site, node: fx.Node) -> tuple[Origin | None, Origin | None]:
    """Where the kernels of a weight can be zeroed, and the scales of a weight norm."""
    origin = site.origin(node)
    try:
        return origin, site.constants.scale(node, origin) if origin else None
    except LookupError:
        return None, None


def _connect(
    site: Site, weight: Weight, bias: fx.Node | None, sources: Tensor, gain: Tensor
) -> tuple[Flow, Block]:
    """New channels along dimension 1 of the result, fed by the weight and shifted by the bias."""
    rows = site.shape[1]
    masks = None if bias is None else site.masks([bias], torch.zeros(rows))
    shifted = bias is not None and masks is None and bool(site.value(bias).any())
    kind = Kind.LIVE if shifted else Kind.SUM
    block = site.wiring.add_block(weight, kind, sources, gain, rows)
    block.biased = bias is not None
    ids = torch.arange(block.first, block.first + rows)
    for parameter, index in masks or []:
        site.wiring.attach(parameter, index, ids)
    shape = site.shape
    return make_flow(ids.reshape(_channel_shape(shape)), scalar_gain(len(shape)), shape), block


def batch_norm(site: Site) -> Flow:
    """A scale for each channel, folded into the convolution before if that feeds nothing else."""
    flow = site.wiring.merge(site.flow(site.argument("input")), [1])
    affine = [site.argument("weight"), site.argument("bias")]
    gamma, beta = (_double(site, argument) for argument in affine)
    gamma = torch.ones(flow.shape[1], dtype=torch.float64) if gamma is None else gamma
    beta = torch.zeros_like(gamma) if beta is None else beta
    mean = _double(site, site.argument("running_mean"))
    variance = _double(site, site.argument("running_var"))
    if site.argument("training", default=False) or mean is None or variance is None:
        return _affine(site, flow, gamma, beta, affine)
    scale = gamma / (variance + site.argument("eps", "epsilon")).sqrt()
    return _affine(site, flow, scale, beta - mean * scale, affine, variance < LOW_VARIANCE)


def _affine(
    site: Site,
    flow: Flow,
    scale: Tensor,
    at_zero: Tensor,
    arguments: Sequence[Any],
    dead: Tensor | None = None,
) -> Flow:
    """The flow after `scale * x + at_zero`, shape (channels,); `dead` channels are dropped."""
    shape = _channel_shape(flow.shape)
    constants = [argument for argument in arguments if argument is not None]
    masks = site.masks(constants, at_zero) if constants else None
    if masks is not None:
        masks = [(parameter, index.reshape(shape)) for parameter, index in masks]
    before = site.nodes()[0]
    if before in site.blocks and len(before.users) == 1:
        site.blocks[before].gain_out *= scale.abs().numpy()
    else:
        flow = make_flow(flow.ids, flow.gain * scale.abs().reshape(shape), flow.shape)
    if dead is not None and dead.any() and masks is not None:
        flow = site.wiring.derive(Kind.DEAD, flow, dead.reshape(shape))
    return site.shift(flow, at_zero.reshape(shape), masks)


def layer_norm(site: Site) -> Flow:
    """Normalisation over the last dimensions."""
    flow = site.flow()
    dims = range(len(flow.shape) - len(site.argument("normalized_shape")), len(flow.shape))
    gamma = _double(site, site.argument("weight"))
    sets = torch.zeros((1,) * len(flow.shape), dtype=torch.int64)
    alone = not any(flow.varies(dim) for dim in dims)
    return _normalised(site, flow, gamma, None if alone else sets)


def group_norm(site: Site) -> Flow:
    """Normalisation over groups of channels."""
    flow = site.wiring.merge(site.flow(), [1])
    channels, groups = flow.shape[1], site.argument("group")
    gamma = _double(site, site.argument("weight"))
    gamma = None if gamma is None else gamma.reshape(_channel_shape(flow.shape))
    sets = torch.arange(channels) // (channels // groups)
    return _normalised(site, flow, gamma, sets.reshape(_channel_shape(flow.shape)))


def softmax(site: Site) -> Flow:
    """A normalised exponential: never zero, and along its dimension everything matters."""
    flow = site.flow()
    sets = torch.zeros((1,) * len(flow.shape), dtype=torch.int64)
    return _normalised(site, flow, None, sets if flow.varies(site.argument("dim")) else None)


def _normalised(site: Site, flow: Flow, gamma: Tensor | None, sets: Tensor | None) -> Flow:
    """The flow after a normalisation: live, and dependent on everything in the same set.

    The data-dependent scale is unknown, so the gain is that of the affine part alone. Without
    sets each channel is normalised by itself.
    """
    if gamma is not None:
        gain = reduce_to(flow.gain * gamma.abs(), flow.ids, torch.amax)
        flow = make_flow(flow.ids, gain, flow.shape)
    if sets is None:
        return site.wiring.derive(Kind.LIVE, flow)
    ids, member = torch.broadcast_tensors(flow.ids, sets)
    hubs = torch.zeros(int(sets.max()) + 1, dtype=torch.int64)
    for number in range(len(hubs)):
        hubs[number] = site.wiring.hub(ids[member == number], opaque=False)
    nothing = torch.zeros((1,) * len(flow.shape), dtype=torch.float64)
    return site.wiring.join(
        Kind.LIVE, [flow, make_flow(hubs[sets], nothing, flow.shape)], flow.shape
    )


def _double(site: Site, argument: Any) -> Tensor | None:
    value = site.value(argument)
    return value.double().cpu() if isinstance(value, Tensor) else None


def _along(tensor: Tensor, channels: int) -> Tensor:
    """Ids or gains that vary along dimension 1 at most, shape (channels,)."""
    return tensor.reshape(-1).expand(channels)


def _channel_shape(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(-1 if dim == 1 else 1 for dim in range(len(shape)))
