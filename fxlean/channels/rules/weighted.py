"""Rules of the operators with weights: convolution, linear, and the norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..builder import Affine
from ..calls import BatchNorm, Convolution, Linear, operator_of, read_call
from ..flow import Flow, distinct, make_flow, reduce_to, scalar_gain
from ..graph import Kind
from ..site import Site
from ..weights import Weight

LOW_VARIANCE = 1e-10  # below it a batch norm's input is constant; the paper's threshold


def convolution(site: Site) -> Any:
    """Any convolution: one new channel for each output channel, one edge for each kernel."""
    call = read_call(site.node)
    assert isinstance(call, Convolution)
    if not site.is_constant([call.weight, call.bias]):
        return site.opaque()
    weight = replace(
        _weight(site, call), stride=call.stride, dilation=call.dilation, groups=call.groups
    )
    flow = site.wiring.merge(site.flow(call.data), [1])
    sources = _along(flow.ids, flow.shape[1]).reshape(call.groups, -1)
    gain = _along(flow.gain, flow.shape[1]).reshape(call.groups, -1)
    return _connect(site, call, weight, sources, gain)


def linear(site: Site) -> Any:
    """A matrix product of a flow with a weight; features of one channel form one edge."""
    call = read_call(site.node)
    assert isinstance(call, Linear)
    if site.is_constant(call.data) or not site.is_constant([call.weight, call.bias]):
        return site.opaque()
    flow = site.wiring.merge(site.flow(call.data), [1])
    sources, columns = distinct(_along(flow.ids, flow.shape[1]))
    gain = torch.zeros(len(sources), dtype=torch.float64)
    gain.scatter_reduce_(0, columns, _along(flow.gain, flow.shape[1]), "amax")
    weight = replace(_weight(site, call), columns=columns)
    return _connect(site, call, weight, sources[None], gain[None])


def _weight(site: Site, call: Convolution | Linear) -> Weight:
    """The weight of a call, and where its kernels can be zeroed."""
    constants = site.constants
    origin, scale, normed = site.origin(call.weight), None, False
    try:
        scale = constants.scale(call.weight, origin) if origin else None
    except LookupError:
        origin, normed = None, True
    return Weight(
        name=constants.name(call.weight),
        value=site.value(call.weight),
        transposed=call.transposed,
        origin=origin,
        scale=scale,
        normed=normed,
        layer=constants.layer(call.weight, call.bias),
    )


def _connect(
    site: Site, call: Convolution | Linear, weight: Weight, sources: Tensor, gain: Tensor
) -> Flow:
    """New channels along dimension 1 of the result, fed by the weight and shifted by the bias."""
    bias = None
    if call.bias is not None:
        bias = site.bias(site.value(call.bias), [call.bias], torch.zeros(site.shape[1]))
    ids = site.wiring.add_block(call, weight, bias, sources, gain)
    return make_flow(
        ids.reshape(_channel_shape(site.shape)), scalar_gain(len(site.shape)), site.shape
    )


def batch_norm(site: Site) -> Flow:
    """A scale for each channel, folded into the convolution before if that feeds nothing else."""
    call = read_call(site.node)
    assert isinstance(call, BatchNorm)
    flow = site.wiring.merge(site.flow(call.data), [1])
    channels, shape = flow.shape[1], _channel_shape(flow.shape)
    scale, shift = call.affine(site.value, channels)
    constant = torch.zeros(channels, dtype=torch.bool)
    if call.by_statistics:
        constant = site.value(call.variance).cpu() < LOW_VARIANCE
    parameters = [node for node in (call.weight, call.bias) if node is not None]
    bias = site.bias(shift.reshape(shape), parameters, shift)
    masks = bias.masks and [(name, index.reshape(shape)) for name, index in bias.masks]
    affine = Affine(
        scale.reshape(shape),
        replace(bias, masks=masks),
        constant.reshape(shape),
        site.constants.layer(*map(_unrepeated, call.parameters)),
    )
    return site.wiring.affine(call, flow, affine)


def _unrepeated(node: fx.Node | None) -> fx.Node | None:
    """A parameter of an instance norm, which torch repeats for all samples, as it is."""
    repeated = node is not None and operator_of(node) is torch.ops.aten.repeat
    return node.args[0] if repeated else node  # type: ignore[union-attr, return-value]


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
    flow, dim = site.flow(), site.argument("dim")
    if not flow.varies(dim):
        return _normalised(site, flow, None, None)
    shape = list(flow.ids.shape)
    shape[dim] = 1
    return _normalised(site, flow, None, torch.arange(torch.Size(shape).numel()).reshape(shape))


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
    ids, member = (tensor.reshape(-1) for tensor in torch.broadcast_tensors(flow.ids, sets))
    members = ids[member.argsort(stable=True)].split(member.bincount().tolist())
    hubs = torch.cat([site.wiring.hub(channels) for channels in members])
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
