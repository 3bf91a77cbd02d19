"""Lists of ATen ops by what they do to values: views, grids that pass, signs, no products."""

from __future__ import annotations

from typing import Any

import torch

_ATEN = torch.ops.aten


def overloads(names: str) -> frozenset[Any]:
    """All overloads of ATen ops, by name; what this torch does not know is left out."""
    found: set[Any] = set()
    for name in names.split():
        packet = getattr(_ATEN, name, None)
        if packet is not None:
            found.update(getattr(packet, overload) for overload in packet.overloads())
    return frozenset(found)


VIEWS = overloads(
    """
    view reshape flatten unflatten permute transpose t squeeze unsqueeze contiguous clone alias
    detach movedim swapaxes swapdims numpy_T mT expand expand_as view_as reshape_as _unsafe_view
    lift_fresh_copy ravel
    """
)
"""Ops whose output is their first argument in another shape or place, element for element."""

GRID_PRESERVING = VIEWS | overloads(
    """
    max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    slice select narrow index_select gather relu amax pixel_shuffle pixel_unshuffle
    channel_shuffle upsample_nearest1d upsample_nearest2d upsample_nearest3d repeat
    repeat_interleave roll flip chunk unsafe_chunk split unsafe_split
    split_with_sizes unbind unfold tile
    """
)
"""Ops whose output values are values of their first argument (or 0): what is on a grid stays."""

SCATTERS = overloads("select_scatter slice_scatter diagonal_scatter")
"""Ops that put one tensor in the place of a part of another."""

NON_NEGATIVE = overloads(
    """
    relu relu6 sigmoid hardsigmoid softmax _safe_softmax _softmax abs exp square softplus exp2
    var std norm linalg_vector_norm cosh one_hot sqrt rsqrt
    zeros zeros_like new_zeros ones ones_like new_ones
    """
)
NON_NEGATIVE_IF_INPUTS = (
    GRID_PRESERVING
    | overloads(
        """
    dropout feature_dropout avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d mean sum add mul div cat stack maximum
    upsample_bilinear2d upsample_linear1d upsample_trilinear3d constant_pad_nd pad
    max min minimum to _to_copy
    """
    )
    | SCATTERS
)
NON_NEGATIVE_IF_ALL = overloads("add mul div cat stack minimum") | SCATTERS | {_ATEN.min.other}
"""Those of them that have several tensors, all of which have to be non-negative."""

NON_NEGATIVE_IF_ANY = overloads("maximum") | {_ATEN.max.other}
"""Those of them where one tensor that is non-negative suffices."""

JOINS = overloads("cat concat stack")
"""Ops that put tensors side by side: a grid of the output is a grid of every input."""

LOOKUPS = overloads("embedding embedding_bag")
"""Ops whose output is rows of a table, their weight, or what rows add up to."""

READS = overloads("index index_select gather take_along_dim")
"""Ops that pick from their first argument: lookups if that is state, and what is picked varies."""

BINARY = overloads("add sub mul maximum minimum")
"""Element-wise ops that an integer runtime executes on two quantized operands."""

AFFINE = overloads("add sub mul div rsub to _to_copy")
"""Ops that scale and shift a tensor, if their other operands are constants."""

FILLS = overloads("zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full")
"""Ops that take no more than sizes from the tensors that they are given."""

AVERAGES = overloads(
    """
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    mean
    """
)
"""Pools that an integer runtime executes on a quantized tensor, with a rescaled result."""

PADS = overloads("constant_pad_nd pad")
"""Ops that add values around a tensor; zeros are on every grid."""

MOVES = (
    (GRID_PRESERVING - overloads("relu"))
    | PADS
    | overloads(
        """
    im2col reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d index take_along_dim diagonal rot90
    """
    )
)
"""Ops whose output values are values of their first argument, moved, copied or padded."""

INTEGER = (
    GRID_PRESERVING
    | JOINS
    | BINARY
    | overloads(
        """
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    mean relu6 hardtanh clamp leaky_relu dropout constant_pad_nd pad
    """
    )
)
"""Ops that an integer runtime executes between two grids."""

FREE = (
    GRID_PRESERVING
    | NON_NEGATIVE
    | NON_NEGATIVE_IF_INPUTS
    | JOINS
    | BINARY
    | overloads(
        """
    add_ sub_ relu_ relu6_ hardtanh hardtanh_ leaky_relu leaky_relu_ elu elu_ selu selu_ celu
    celu_ gelu silu silu_ mish mish_ hardswish hardswish_ hardsigmoid_ tanh tanh_ sigmoid_
    softshrink hardshrink tanhshrink softsign threshold prelu rrelu rrelu_with_noise log_sigmoid
    logsigmoid glu log_softmax _log_softmax batch_norm layer_norm native_layer_norm group_norm
    instance_norm rms_norm local_response_norm native_batch_norm _native_batch_norm_legit
    _native_batch_norm_legit_no_training
    cudnn_batch_norm normalize alpha_dropout feature_alpha_dropout dropout_ native_dropout
    bernoulli max_pool2d_with_indices lp_pool2d lp_pool1d embedding embedding_bag one_hot neg pow
    rsub reciprocal floor ceil round trunc sign sin cos tan asin acos atan atan2 sinh log log2
    log10 log1p expm1 erf erfc clamp clamp_ clamp_min clamp_max clip where masked_fill
    masked_fill_ masked_select eq ne lt le gt ge logical_and logical_or logical_not logical_xor
    bitwise_and bitwise_or bitwise_not isnan isinf isfinite any all argmax argmin topk sort
    argsort cumsum cumprod tril triu arange full full_like new_full new_empty empty empty_like
    scalar_tensor tensor linspace eye rand rand_like randn randn_like randint meshgrid index
    index_put index_put_ index_add index_add_ scatter scatter_ scatter_add scatter_add_
    scatter_reduce gather take_along_dim fill fill_ copy copy_ zero_ mul_ div_ floor_divide
    remainder fmod reflection_pad1d reflection_pad2d
    reflection_pad3d replication_pad1d replication_pad2d replication_pad3d upsample_bicubic2d
    grid_sampler grid_sampler_2d affine_grid_generator im2col col2im median logsumexp var_mean
    std_mean prod addcmul addcdiv lerp sym_size sym_numel sym_stride sym_constrain_range_for_size
    _assert_scalar _assert_tensor_metadata size numel item _local_scalar_dense type_as dot_ diag
    diagonal frobenius_norm rot90 nan_to_num polar
    view_as_real view_as_complex real imag complex fft_rfft fft_irfft fft_fft fft_ifft
    cosine_similarity pairwise_distance histc bincount unique_consecutive _unique2 nonzero
    broadcast_tensors broadcast_to atleast_1d atleast_2d hstack vstack square_ sqrt_ add_relu
    _weight_norm _weight_norm_interface max_unpool2d pad_sequence bucketize searchsorted
    log_sigmoid_forward is_floating_point sym_is_contiguous isclose count_nonzero std_ floor_
    softmin hardswish_backward __and__ __or__ __xor__ __lshift__ __rshift__
    kron cross linalg_cross
    heaviside amin aminmax cummax cummin logaddexp hypot square frac deg2rad rad2deg
    """
    )
)

IN_PLACE = overloads(
    """
    relu relu6 hardtanh clamp clamp_min clamp_max leaky_relu elu selu celu gelu silu mish hardswish
    hardsigmoid sigmoid tanh dropout batch_norm softplus abs neg exp sqrt square maximum minimum
    """
) | {_ATEN.max.other, _ATEN.min.other}
"""Element-wise ops; of one tensor that varies, runtimes fuse them into its producer or run them in
place. Of several, they wait for the last, and write a tensor of their own."""

KEEP_ZEROS = overloads(
    """
    relu relu6 relu_ relu6_ leaky_relu leaky_relu_ elu elu_ selu selu_ celu celu_ gelu silu silu_
    mish mish_ hardswish hardswish_ tanh tanh_ softshrink hardshrink tanhshrink softsign dropout
    dropout_ feature_dropout abs sign square sin
    """
)
"""Element-wise ops of one tensor whose output is 0 where their input is."""

ZERO_POOLS = overloads(
    """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    """
)
"""Ops over space, each channel on its own, that give 0 for a channel of zeros."""
