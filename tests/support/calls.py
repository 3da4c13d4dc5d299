"""Calls of every operator that has a rule: `CALLS`, `MOVEMENTS`, `FILLED` and `PADDINGS`."""

import torch

from tests.support.sites import Data, complexes, integers, place

aten = torch.ops.aten
LINE, IMAGE, VOLUME = Data((2, 4, 6)), Data((2, 4, 6, 6)), Data((2, 4, 4, 4, 4))
MATRIX = Data((3, 4))
SPECTRUM, WAVE = Data((2, 4, 6, 4), complexes), Data((2, 4, 6), complexes)
ONES, STATISTICS = torch.full((4,), 1.5), [torch.full((4,), 0.2), torch.full((4,), 1.2)]
NO_AFFINE = (None, None)
NORMALISED = [
    (aten._native_batch_norm_legit.default, (IMAGE, *NO_AFFINE, *STATISTICS, False, 0.1, 1e-5)),
    (aten._batch_norm_no_update.default, (IMAGE, *NO_AFFINE, *STATISTICS, 0.1, 1e-5)),
    (
        aten._native_batch_norm_legit_no_training.default,
        (IMAGE, ONES, ONES, *STATISTICS, 0.1, 1e-5),
    ),
    (aten.native_batch_norm.default, (IMAGE, ONES, None, *STATISTICS, False, 0.1, 1e-5)),
    (aten.batch_norm.default, (IMAGE, ONES, ONES, *STATISTICS, False, 0.1, 1e-5, False)),
    (aten.native_group_norm.default, (IMAGE, *NO_AFFINE, 2, 4, 36, 2, 1e-5)),
    (aten.native_group_norm.default, (IMAGE, ONES, ONES, 2, 4, 36, 4, 1e-5)),
    (aten.native_layer_norm.default, (IMAGE, (6,), *NO_AFFINE, 1e-5)),
    (aten.native_layer_norm.default, (Data((2, 3, 4)), (4,), ONES, ONES, 1e-5)),
    (aten._softmax.default, (IMAGE, 1, False)),
    (aten._log_softmax.default, (IMAGE, -1, False)),
    (aten._safe_softmax.default, (IMAGE, -1)),
]
WEIGHTED = [
    (
        aten.convolution.default,
        (IMAGE, torch.ones(2, 4, 3, 3), None, *[[1, 1]] * 3, False, [0, 0], 1),
    ),
    (aten.convolution.default, (LINE, torch.ones(4, 2, 3), None, [2], [1], [1], False, [0], 2)),
    (aten.convolution.default, (LINE, torch.ones(4, 3, 2), ONES[:3], [2], [0], [1], True, [1], 1)),
    (aten.convolution.default, (LINE, torch.ones(4, 3, 2), None, [2], [0], [1], True, [1], 2)),
    (aten.addmm.default, (ONES[:2], MATRIX, torch.ones(4, 2))),
    (aten.mm.default, (MATRIX, torch.ones(4, 2))),
    (aten.embedding.default, (torch.randn(9, 4), Data((2, 3), integers(9)))),
]
WINDOWED = [
    (aten.adaptive_avg_pool1d.default, (LINE, [3])),
    (aten.adaptive_max_pool1d.default, (LINE, [3])),
    (aten.avg_pool1d.default, (LINE, [2])),
    (aten.reflection_pad1d.default, (LINE, [1, 2])),
    (aten.replication_pad1d.default, (LINE, [1, 2])),
    (aten.upsample_linear1d.default, (LINE, [9], False)),
    (aten.upsample_nearest1d.default, (LINE, [9])),
    (aten._upsample_nearest_exact1d.default, (LINE, [9])),
    (aten._adaptive_avg_pool2d.default, (IMAGE, [2, 3])),
    (aten.adaptive_max_pool2d.default, (IMAGE, [2, 3])),
    (aten.avg_pool2d.default, (IMAGE, [3, 3], [2, 2], [1, 1])),
    (aten.fractional_max_pool2d.default, (IMAGE, [2, 2], [3, 3], torch.full((2, 4, 2), 0.4))),
    (aten.max_pool2d_with_indices.default, (IMAGE, [2, 2])),
    (aten.reflection_pad2d.default, (IMAGE, [1, 2, 0, 1])),
    (aten.replication_pad2d.default, (IMAGE, [1, 2, 0, 1])),
    (aten.upsample_bicubic2d.default, (IMAGE, [9, 9], False)),
    (aten.upsample_bilinear2d.default, (IMAGE, [9, 9], False)),
    (aten.upsample_nearest2d.default, (IMAGE, [9, 9])),
    (aten._upsample_bicubic2d_aa.default, (IMAGE, [3, 3], False)),
    (aten._upsample_bilinear2d_aa.default, (IMAGE, [3, 3], False)),
    (aten._upsample_nearest_exact2d.default, (IMAGE, [9, 9])),
    (aten._adaptive_avg_pool3d.default, (VOLUME, [2, 2, 2])),
    (aten.adaptive_max_pool3d.default, (VOLUME, [2, 2, 2])),
    (aten.avg_pool3d.default, (VOLUME, [2, 2, 2])),
    (aten.max_pool3d_with_indices.default, (VOLUME, [2, 2, 2])),
    (aten.reflection_pad3d.default, (VOLUME, [1] * 6)),
    (aten.replication_pad3d.default, (VOLUME, [1] * 6)),
    (aten.upsample_nearest3d.default, (VOLUME, [6, 6, 6])),
    (aten.upsample_trilinear3d.default, (VOLUME, [6, 6, 6], False)),
    (aten._upsample_nearest_exact3d.default, (VOLUME, [6, 6, 6])),
    (aten.col2im.default, (Data((2, 8, 9)), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1])),
    (aten.grid_sampler_2d.default, (IMAGE, Data((2, 3, 3, 2)), 0, 0, False)),
    (aten.grid_sampler_3d.default, (VOLUME, Data((2, 2, 2, 2, 3)), 0, 0, False)),
    (aten.im2col.default, (IMAGE, [2, 2], [1, 1], [1, 1], [2, 2])),
    (aten.max_unpool2d.default, (Data((2, 4, 2, 2)), Data((2, 4, 2, 2), integers(36)), [6, 6])),
]
REDUCED = [
    (operator, (IMAGE, *args))
    for dims in ([1], [2, 3], [0, 1, 2, 3])
    for keepdim in (True, False)
    for operator, args in [
        (aten.all.dims, (dims, keepdim)),
        (aten.any.dims, (dims, keepdim)),
        (aten.amax.default, (dims, keepdim)),
        (aten.amin.default, (dims, keepdim)),
        (aten.argmax.default, (dims[0], keepdim)),
        (aten.argmin.default, (dims[0], keepdim)),
        (aten.linalg_vector_norm.default, (2, dims, keepdim)),
        (aten.logsumexp.default, (dims, keepdim)),
        (aten.max.dim, (dims[0], keepdim)),
        (aten.mean.dim, (dims, keepdim)),
        (aten.median.dim, (dims[0], keepdim)),
        (aten.min.dim, (dims[0], keepdim)),
        (aten.nansum.default, (dims, keepdim)),
        (aten.prod.dim_int, (dims[0], keepdim)),
        (aten.std.correction, (dims,)),
        (aten.sum.dim_IntList, (dims, keepdim)),
        (aten.var.correction, (dims,)),
        (aten.var_mean.correction, (dims,)),
    ]
] + [(aten.aminmax.default, (IMAGE,)), (aten.max.default, (IMAGE,))]
MIXED = [
    (aten.cummax.default, (IMAGE, 1)),
    (aten.cummin.default, (IMAGE, 1)),
    (aten.cumprod.default, (IMAGE, 2)),
    (aten.cumsum.default, (IMAGE, 1)),
    (aten.sort.default, (IMAGE, 1)),
    (aten.topk.default, (IMAGE, 2, 1)),
]
TRANSFORMS = [
    (aten._fft_c2c.default, (WAVE, [2], 1, True)),
    (aten._fft_c2c.default, (WAVE, [1], 2, False)),
    (aten._fft_c2r.default, (SPECTRUM, [2, 3], 2, 6)),
    (aten._fft_c2r.default, (SPECTRUM, [3], 1, 7)),
    (aten._fft_r2c.default, (IMAGE, [2, 3], 0, True)),
    (aten._fft_r2c.default, (LINE, [1], 0, False)),
    (aten.view_as_complex.default, (Data((3, 4, 2)),)),
    (aten.view_as_real.default, (WAVE,)),
    (aten.complex.default, (IMAGE, IMAGE)),
    (aten.mul.Tensor, (WAVE, torch.full((6,), 1j))),
    (aten.abs.default, (WAVE,)),
]
PRODUCTS = [
    (aten.bmm.default, (Data((2, 3, 4)), Data((2, 4, 5)))),
    (aten.bmm.default, (Data((2, 3, 4)), torch.ones(2, 4, 5))),
    (
        aten.scaled_dot_product_attention.default,
        (Data((2, 5, 3)), Data((2, 4, 3)), Data((2, 4, 2))),
    ),
    (aten._scaled_dot_product_flash_attention_for_cpu.default, (Data((1, 2, 5, 4)),) * 3),
    (
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        (Data((2, 3, 5, 4)), torch.ones(2, 3, 6, 4), Data((2, 3, 6, 4))),
    ),
    (aten.bmm.default, (Data((1, 1, 1)), Data((1, 1, 5)))),
]
HALVES = torch.full((4, 1, 1), 0.5)
POINTWISE = [
    (aten._prelu_kernel.default, (IMAGE, HALVES)),
    (aten.hardswish.default, (IMAGE,)),
    (aten.leaky_relu.default, (IMAGE, 0.1)),
    (aten.glu.default, (IMAGE, 1)),
    (aten.log_sigmoid_forward.default, (IMAGE,)),
    (aten.rrelu_with_noise_functional.default, (IMAGE, IMAGE)),
    (aten.add.Tensor, (IMAGE, IMAGE)),
    (aten.add.Tensor, (IMAGE, 1.0)),
    (aten.sub.Tensor, (IMAGE, Data((4, 1, 6)))),
    (aten.mul.Tensor, (IMAGE, IMAGE)),
    (aten.mul.Tensor, (IMAGE, HALVES)),
    (aten.div.Tensor, (IMAGE, Data((2, 1, 1, 1)))),
    (aten.maximum.default, (IMAGE, IMAGE)),
    (aten.where.self, (Data((2, 4, 6, 6), integers(2)), IMAGE, IMAGE)),
    (aten.addcmul.default, (IMAGE, IMAGE, IMAGE)),
    (aten.lerp.Scalar, (IMAGE, IMAGE, 0.3)),
    (aten.atan2.default, (IMAGE, IMAGE)),
    (aten.relu.default, (IMAGE,)),
    (aten.exp.default, (IMAGE,)),
    (aten.gt.Scalar, (IMAGE, 0)),
]
CALLS = NORMALISED + WEIGHTED + WINDOWED + REDUCED + MIXED + TRANSFORMS + PRODUCTS + POINTWISE
ELSEWHERE = {
    aten.cudnn_batch_norm: "runs on CUDA only",
    aten.miopen_batch_norm: "runs on ROCm only",
    aten._scaled_dot_product_cudnn_attention: "runs on CUDA only",
    aten._scaled_dot_product_efficient_attention: "runs on CUDA only",
    aten._scaled_dot_product_flash_attention: "runs on CUDA only",
    aten._scaled_dot_product_fused_attention_overrideable: "runs on devices of others only",
    aten._batch_norm_with_update: "runs in training only, which is never traced",
}

X = Data((2, 4, 3, 3))
FLAT = Data((3, 4))
ODD = torch.tensor([2, 0, 2])
BUFFER = torch.tensor([0.0, 0.0, 1.0, 0.0]).reshape(1, 4, 1, 1).expand(2, 4, 3, 3)

MOVEMENTS = [
    (aten.alias.default, (X,)),
    (aten.clone.default, (X,)),
    (aten.contiguous.default, (X,)),
    (aten.detach.default, (X,)),
    (aten.expand.default, (Data((4, 1, 3)), (2, 4, 5, 3))),
    (aten._to_copy.default, (X,)),
    (aten.lift_fresh.default, (X,)),
    (aten.lift_fresh_copy.default, (X,)),
    (aten.view.default, (X, (2, 2, 2, 9))),
    (aten.view.default, (X, (8, 3, 3))),
    (aten.view.default, (Data((2, 6, 3, 2)), (2, 2, 3, 3, 2))),
    (aten.view.default, (Data((1, 6, 1, 2)), (3, 4, 1))),
    (aten.view.default, (Data((0, 6)), (3, 0, 2))),
    (aten._unsafe_view.default, (X, (2, 36))),
    (aten.reshape.default, (X, (-1, 3))),
    (aten.squeeze.dims, (Data((2, 1, 3, 1)), (1, 3))),
    (aten.flatten.using_ints, (X, 1)),
    (aten.permute.default, (X, (0, 2, 3, 1))),
    (aten.transpose.int, (X, 1, -1)),
    (aten.t.default, (FLAT,)),
    (aten.unsqueeze.default, (X, -1)),
    (aten.movedim.int, (X, 1, 3)),
    (aten.stack.default, ([X, X, X], 1)),
    (aten.cat.default, ([X, Data((2, 1, 3, 3)), BUFFER, Data((2, 0, 3, 3))], 1)),
    (aten.cat.default, ([X, X], -1)),
    (aten.flip.default, (X, (1, 3))),
    (aten.narrow.default, (X, 1, 1, 2)),
    (aten.select.int, (X, 1, -1)),
    (aten.slice.Tensor, (X, 1, 0, 9, 2)),
    (aten.slice.Tensor, (X, -1, -2, 9)),
    (aten.slice_scatter.default, (X, Data((2, 2, 3, 3)), 1, 1, 3)),
    (aten.slice_scatter.default, (BUFFER, Data((2, 2, 3, 3)), 1, 1, 3)),
    (aten.slice_scatter.default, (X, BUFFER[:, :, 1:], 2, 1)),
    (aten.split.Tensor, (X, 3, 1)),
    (aten.split.Tensor, (X, 2, 1)),
    (aten.split_with_sizes.default, (X, (1, 3), 1)),
    (aten.unsafe_split.Tensor, (X, 3, 1)),
    (aten.unsafe_split_with_sizes.default, (X, (1, 3), 1)),
    (aten.unbind.int, (X, 1)),
    (aten.unfold.default, (X, 1, 2, 1)),
    (aten.index.Tensor, (X, [None, ODD])),
    (aten.gather.default, (X, 1, torch.tensor([[[[3, 0, 3]]]]).expand(2, 1, 3, 3))),
    (aten.index_select.default, (X, 1, ODD)),
    (aten._unsafe_index.Tensor, (X, [None, None, ODD[:, None], ODD])),
    (aten.index_put.default, (X, [None, ODD[:2]], Data((2, 2, 3, 3)))),
    (aten.index_put.default, (BUFFER, [None, ODD[:2]], Data((2, 2, 3, 3)))),
    (aten.channel_shuffle.default, (X, 2)),
    (aten.native_channel_shuffle.default, (X, 2)),
    (aten.diagonal.default, (X, 0, 2, 3)),
    (aten.pixel_shuffle.default, (X, 2)),
    (aten.pixel_unshuffle.default, (Data((1, 2, 4, 4)), 2)),
    (aten.repeat.default, (X, (1, 2, 1, 3))),
    (aten.roll.default, (X, (1,), (1,))),
    (aten.rot90.default, (X, 1, (2, 3))),
    (aten.select_scatter.default, (X, Data((2, 3, 3)), 1, 2)),
    (aten.tril.default, (X,)),
    (aten.triu.default, (X, 1)),
    (aten.as_strided.default, (X, (2, 3, 4), (9, 1, 3), 5)),
    (aten.as_strided.default, (Data((2, 4, 1, 1)), (2, 4, 1, 1), (4, 1, 4, 4))),
    (aten.as_strided_.default, (X, (2, 3, 4), (9, 1, 3), 5)),
    (aten.copy.default, (X, Data((4, 1, 3)))),
    (aten.copy.default, (BUFFER, Data((4, 1, 3)))),
]

FILLED = [
    (aten.full_like.default, (X, 2.0)),
    (aten.ones_like.default, (X,)),
    (aten.zeros_like.default, (X,)),
]

PADDINGS = [
    (aten.constant_pad_nd.default, (X, [1, 0], 0.0)),
    (aten.constant_pad_nd.default, (X, [1, 0], 2.0)),
    (aten.constant_pad_nd.default, (X, [0, 0, 0, 0, 1, 2], 0.0)),
    (aten.constant_pad_nd.default, (X, [0, 0, 0, 0, 1, 2], 2.0)),
    (aten.constant_pad_nd.default, (X, [0, 1, 0, 0, -1, 2], 0.0)),
]


def with_conditions(operator, args):
    """The arguments, with truth values where the operator wants them."""
    if operator is not aten.where.self:
        return args
    return (
        Data(args[0].shape, lambda s, generator: torch.randn(s, generator=generator) > 0),
        *args[1:],
    )


def call(operator, args, generator):
    return place(operator, with_conditions(operator, args), generator)


def sparse(*shape, seed=0):
    """Numbers, some of them zero, with whole rows and columns among them."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator)
    for dim in range(min(len(shape), 2)):
        size = [shape[dim] if d == dim else 1 for d in range(len(shape))]
        tensor *= torch.rand(size, generator=generator) < 0.7
    return tensor
