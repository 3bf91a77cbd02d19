"""The table of ATen ops: what they multiply, and what they do to values, signs and grids.

One row per op, keyed by the op object itself. Counting convention: one multiply-accumulate is one
MAC, biases and element-wise work count nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Any, TypeAlias

import torch
from torch.fx import Node

Shape: TypeAlias = tuple[int, ...]
Macs: TypeAlias = Callable[[Shape, Shape, Shape], int]
"""MACs from the shapes of the activation (or first factor), the weight (or second), the output."""


class Layout(Enum):
    """How the two factors of a compute node meet.

    CONV: weight (out, in / groups, *kernel), input (batch, in, *space).
    CONV_TRANSPOSE: weight (in, out / groups, *kernel), input (batch, in, *space).
    LINEAR: weight (out, in), input (..., in).
    PRODUCT: input (..., n, k), second factor (..., k, m).
    """

    CONV = "conv"
    CONV_TRANSPOSE = "conv_transpose"
    LINEAR = "linear"
    PRODUCT = "product"

    @property
    def output_axis(self) -> int:
        """The axis of the weight that runs over output channels."""
        return {Layout.CONV: 0, Layout.CONV_TRANSPOSE: 1, Layout.LINEAR: 0, Layout.PRODUCT: -1}[self]


@dataclass(frozen=True, slots=True)
class ComputeOp:
    """An op that multiplies and accumulates.

    Attributes:
        layout: How its factors meet.
        macs: Its MACs for a whole batch.
        activation: Name of the argument that is the first factor.
        weight: Name of the argument that is the second factor.
        bias: Name of the argument that is added, if there is one.
    """

    layout: Layout
    macs: Macs
    activation: str = "input"
    weight: str = "weight"
    bias: str | None = "bias"


def _conv_macs(_: Shape, weight: Shape, output: Shape) -> int:
    """Each output element sums in / groups * kernel products."""
    return prod(output) * prod(weight[1:])


def _conv_transpose_macs(inputs: Shape, weight: Shape, _: Shape) -> int:
    """Each input element meets out / groups * kernel weights."""
    return prod(inputs) * prod(weight[1:])


def _product_macs(first: Shape, _: Shape, output: Shape) -> int:
    """Each output element sums over the contracted axis, the last of the first factor."""
    return prod(output) * (first[-1] if first else 1)



_ATEN = torch.ops.aten
_COMPUTE: dict[Any, ComputeOp] = {}


def register_compute(op: ComputeOp, overloads: Iterable[Any]) -> None:
    """Add rows to the table.

    Raises:
        ValueError: If an overload has a row already.
    """
    for overload in overloads:
        if overload in _COMPUTE:
            raise ValueError(f"{overload} is in the op table already")
        _COMPUTE[overload] = op


register_compute(
    ComputeOp(Layout.CONV, _conv_macs),
    [
        getattr(getattr(_ATEN, f"conv{n}d"), overload)
        for n in (1, 2, 3)
        for overload in ("default", "padding")
    ],
)
register_compute(
    ComputeOp(Layout.CONV_TRANSPOSE, _conv_transpose_macs),
    [_ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input, _ATEN.conv_transpose3d.input],
)
register_compute(ComputeOp(Layout.LINEAR, _product_macs), [_ATEN.linear.default])
register_compute(
    ComputeOp(Layout.PRODUCT, _product_macs, "self", "other", None), [_ATEN.matmul.default]
)
register_compute(
    ComputeOp(Layout.PRODUCT, _product_macs, "self", "mat2", None),
    [_ATEN.mm.default, _ATEN.bmm.default],
)
register_compute(
    ComputeOp(Layout.PRODUCT, _product_macs, "mat1", "mat2", "self"), [_ATEN.addmm.default]
)
register_compute(
    ComputeOp(Layout.PRODUCT, _product_macs, "batch1", "batch2", "self"), [_ATEN.baddbmm.default]
)


def _overloads(names: str) -> frozenset[Any]:
    found: set[Any] = set()
    for name in names.split():
        packet = getattr(_ATEN, name, None)
        if packet is not None:
            found.update(getattr(packet, overload) for overload in packet.overloads())
    return frozenset(found)


VIEWS = _overloads(
    "view reshape flatten unflatten permute transpose t squeeze unsqueeze contiguous clone alias "
    "detach movedim swapaxes swapdims numpy_T mT expand expand_as view_as reshape_as _unsafe_view "
    "lift_fresh_copy ravel"
)
"""Ops whose output is their first argument in another shape or place, element for element."""

GRID_PRESERVING = VIEWS | _overloads(
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "slice select narrow index_select gather relu amax pixel_shuffle pixel_unshuffle "
    "channel_shuffle upsample_nearest1d upsample_nearest2d upsample_nearest3d repeat "
    "repeat_interleave roll flip chunk split split_with_sizes unbind unfold tile"
)
"""Ops whose output values are values of their first argument (or 0): what is on a grid stays."""

_NON_NEGATIVE = _overloads(
    "relu relu6 sigmoid hardsigmoid softmax _softmax abs exp square softplus logsigmoid_backward "
    "exp2 var std norm linalg_vector_norm cosh one_hot sqrt rsqrt"
)
_NON_NEGATIVE_IF_INPUTS = GRID_PRESERVING | _overloads(
    "dropout feature_dropout avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d mean sum add mul div cat stack maximum upsample_bilinear2d "
    "upsample_linear1d upsample_trilinear3d constant_pad_nd pad hardswish_backward max min to _to_copy"
)
JOINS = _overloads("cat concat stack")
"""Ops that put tensors side by side: a grid of the output is a grid of every input."""

BINARY = _overloads("add sub mul maximum minimum")
"""Element-wise ops that an integer runtime executes on two quantized operands."""

INTEGER = GRID_PRESERVING | JOINS | BINARY | _overloads(
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "mean relu6 hardtanh clamp leaky_relu dropout constant_pad_nd pad"
)
"""Ops that an integer runtime executes between two grids."""

_FREE = (
    GRID_PRESERVING
    | _NON_NEGATIVE
    | _NON_NEGATIVE_IF_INPUTS
    | JOINS
    | BINARY
    | _overloads(
        "add_ sub_ relu_ relu6_ hardtanh hardtanh_ leaky_relu leaky_relu_ elu elu_ selu selu_ celu celu_ gelu silu "
        "silu_ mish mish_ hardswish hardswish_ hardsigmoid_ tanh tanh_ sigmoid_ softshrink hardshrink "
        "tanhshrink softsign threshold prelu rrelu rrelu_with_noise log_sigmoid logsigmoid glu log_softmax "
        "_log_softmax batch_norm layer_norm native_layer_norm group_norm instance_norm rms_norm "
        "local_response_norm native_batch_norm _native_batch_norm_legit cudnn_batch_norm normalize "
        "alpha_dropout feature_alpha_dropout dropout_ native_dropout bernoulli max_pool2d_with_indices "
        "lp_pool2d lp_pool1d embedding embedding_bag one_hot neg pow rsub reciprocal floor ceil round trunc "
        "sign sin cos tan asin acos atan atan2 sinh log log2 log10 log1p expm1 erf erfc clamp clamp_ "
        "clamp_min clamp_max clip where masked_fill masked_fill_ masked_select eq ne lt le gt ge "
        "logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not isnan isinf "
        "isfinite any all argmax argmin topk sort argsort cumsum cumprod tril triu arange full full_like "
        "zeros zeros_like ones ones_like new_zeros new_ones new_full new_empty empty empty_like "
        "scalar_tensor tensor linspace eye rand rand_like randn randn_like randint meshgrid index index_put "
        "index_put_ index_add index_add_ scatter scatter_ scatter_add scatter_add_ scatter_reduce gather "
        "take_along_dim fill fill_ copy copy_ zero_ mul_ div_ floor_divide remainder fmod "
        "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
        "replication_pad3d upsample_bicubic2d grid_sampler grid_sampler_2d affine_grid_generator "
        "im2col col2im median logsumexp var_mean std_mean prod addcmul addcdiv lerp sym_size sym_numel "
        "sym_stride sym_constrain_range_for_size _assert_scalar _assert_tensor_metadata size numel item "
        "_local_scalar_dense type_as dot_ diag diagonal diagonal_scatter select_scatter slice_scatter "
        "frobenius_norm rot90 nan_to_num polar view_as_real view_as_complex real imag complex "
        "fft_rfft fft_irfft fft_fft fft_ifft cosine_similarity pairwise_distance histc bincount unique_consecutive "
        "_unique2 nonzero broadcast_tensors broadcast_to atleast_1d atleast_2d hstack vstack square_ sqrt_ "
        "add_relu _weight_norm _weight_norm_interface max_unpool2d pad_sequence bucketize searchsorted "
        "log_sigmoid_forward is_floating_point sym_is_contiguous isclose count_nonzero std_ floor_ "
        "softmin heaviside amin aminmax cummax cummin logaddexp hypot square frac deg2rad rad2deg"
    )
)


def compute_op(node: Node) -> ComputeOp | None:
    """The row of a node that multiplies and accumulates, else None."""
    return _COMPUTE.get(node.target) if node.op == "call_function" else None


def is_view(node: Node) -> bool:
    """Whether the node's output is its first argument in another shape."""
    return node.op == "call_function" and node.target in VIEWS


def preserves_grid(node: Node) -> bool:
    """Whether the node's output values are values of its first argument, or 0."""
    return node.op == "call_function" and node.target in GRID_PRESERVING


def is_known(node: Node) -> bool:
    """Whether the table knows what the node multiplies, be it nothing."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return True
    return node.target in _COMPUTE or node.target in _FREE or node.target.namespace == "cgmq_fx"


def non_negative(node: Node) -> bool:
    """Whether the node's output is proved never to be negative."""
    seen: dict[Node, bool] = {}
    stack = [node]
    while stack:  # post-order without recursion: graphs are deeper than Python's stack
        current = stack[-1]
        parents = _inherits_sign(current)
        open_parents = [p for p in parents or () if p not in seen]
        if open_parents and current not in seen:
            stack.extend(open_parents)
            continue
        stack.pop()
        seen[current] = _own_sign(current) or (bool(parents) and all(seen[p] for p in parents or ()))
    return seen[node]


def _own_sign(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target in _NON_NEGATIVE:
        return True
    name = getattr(node.target, "_opname", "")
    if name in ("hardtanh", "clamp", "clamp_min", "clamp_max"):
        low = argument(node, "min_val") if name == "hardtanh" else argument(node, "min")
        return name != "clamp_max" and isinstance(low, int | float) and low >= 0
    return name == "pow" and argument(node, "exponent") in (2, 2.0, 4, 4.0)


def _inherits_sign(node: Node) -> Sequence[Node] | None:
    """The nodes that must all be non-negative for this one to be, or None if that proves nothing."""
    if node.op != "call_function":
        return None
    if getattr(node.target, "__name__", "") == "getitem":
        return node.all_input_nodes
    if node.target not in _NON_NEGATIVE_IF_INPUTS:
        return None
    numbers = [a for a in node.args[:2] if isinstance(a, int | float)]
    name = getattr(node.target, "_opname", "")
    if name in ("add", "mul", "div", "constant_pad_nd", "pad"):
        if any(n < 0 for n in numbers) or argument(node, "value", 0) not in (0, 0.0, None):
            return None
        if name == "add" and argument(node, "alpha", 1) != 1:
            return None
        return node.all_input_nodes
    return node.all_input_nodes if name in ("cat", "stack", "maximum") else node.all_input_nodes[:1]


def argument(node: Node, name: str, default: Any = None) -> Any:
    """An argument of an ATen node by its name in the schema.

    Args:
        node: A `call_function` node of an ATen op.
        name: Name of the argument.
        default: What to return if the schema has no such argument.

    Returns:
        The value given, else the schema's default, else `default`.
    """
    index, declared = _schema_argument(node.target, name)
    if index is None:
        return default
    if index < len(node.args):
        return node.args[index]
    if name in node.kwargs:
        return node.kwargs[name]
    return declared


def set_argument(node: Node, name: str, value: Any) -> None:
    """Give an ATen node a new value for an argument, by its name in the schema."""
    index, _ = _schema_argument(node.target, name)
    if index is not None and index < len(node.args):
        node.update_arg(index, value)
    else:
        node.update_kwarg(name, value)


def _schema_argument(target: Any, name: str) -> tuple[int | None, Any]:
    for index, declared in enumerate(target._schema.arguments):
        if declared.name == name:
            return index, declared.default_value
    return None, None
