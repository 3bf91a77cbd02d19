"""What runtimes execute, and what they do not: ATen ops by name, as they were tried.

`python -m benchmarks.export_ops` says for every op what happens to it. An op that is not in a list
failed there, or was never tried; it is refused before a model is trained. That a runtime computes
some ops in float, and only rounds what comes out, is no reason to refuse them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch.fx import Node
from torch.utils import _pytree as pytree

from cgmq_fx.passes.optable import argument, compute_op
from cgmq_fx.passes.pools import is_padded, overhangs
from cgmq_fx.passes.state import shape_of

_IMAGE = 4
_GIVES_IMAGES = frozenset(
    {"conv2d", "conv_transpose2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"}
)

Rule: TypeAlias = Callable[[Node], str | None]
"""Why a node cannot be executed although its op can, or None."""

_SHAPES = (
    *("alias", "clone", "contiguous", "detach", "expand", "flatten", "permute", "reshape"),
    *("squeeze", "transpose", "unflatten", "unsqueeze", "view"),
)
"""Ops that only give a tensor another shape."""


def _of_rank(*ranks: int) -> Rule:
    """Only tensors of some number of dimensions."""

    def rule(node: Node) -> str | None:
        rank = len(shape_of(node) or ())
        return None if rank in ranks else f"on {rank} dimensions"

    return rule


def _not_of_images(node: Node) -> str | None:
    """Not over an axis of images: they have their channels last, and another axis is taken."""
    source: Any = node
    while isinstance(source, Node) and len(shape_of(source) or ()) == _IMAGE:
        name = getattr(source.target, "_opname", "")
        if name in _GIVES_IMAGES:
            return "of images"
        if name in _SHAPES or compute_op(source) is not None:
            return None
        source = source.args[0] if source.args else None
    return None


def _to_multiples(node: Node) -> str | None:
    """Only to sizes that the input is a multiple of."""
    source, made = node.args[0], argument(node, "output_size")
    sizes = (shape_of(source) or ())[-len(made) :] if isinstance(source, Node) else ()
    uneven = any(size % small for size, small in zip(sizes, made, strict=False))
    return f"of {list(sizes)} to {list(made)}, which is uneven" if uneven else None


def _averages(node: Node) -> str | None:
    """Not with windows that end outside of padding that counts, nor with a divisor of its own.

    Integer kernels divide by the whole of such windows, and files of ONNX have no place for the
    other.
    """
    if overhangs(node) and is_padded(node) and argument(node, "count_include_pad"):
        return "with ceil_mode and padding that counts (count_include_pad=False is taken)"
    divisor = argument(node, "divisor_override")
    return None if divisor is None else f"with divisor_override={divisor}"


def _switched_on(node: Node) -> str | None:
    """Not in evaluation mode: no two runtimes draw the same random numbers."""
    return "in evaluation mode, too" if argument(node, "train") is True else None


def _made_by_nodes(node: Node) -> str | None:
    """Not numbers, flags or text: a file of ONNX returns tensors, and sizes as such."""
    leaves = pytree.tree_leaves(node.args)
    others = [leaf for leaf in leaves if leaf is not None and not isinstance(leaf, Node)]
    return f"of {others[0]!r}, which is no tensor" if others else None


def _fixed_groups(node: Node) -> str | None:
    """Not with as many groups as there are samples, say: they are written as a number."""
    found = isinstance(argument(node, "groups"), Node)
    return "with a number of groups that depends on the inputs" if found else None


_CONVOLUTIONS: tuple[tuple[str, Rule], ...] = tuple(
    (f"conv{kind}{rank}d", _fixed_groups) for kind in ("", "_transpose") for rank in (1, 2, 3)
)

HLS4ML = (
    *("conv1d", "conv2d", "linear", "relu", "max_pool2d", "add", "cat", "dropout"),
    *("flatten", "view", "reshape", "alias", "detach", "clone", "contiguous"),
)
"""What hls4ml converts to C++ that was seen to be exact."""

HLS4ML_RULES: tuple[tuple[str, Rule], ...] = (
    *_CONVOLUTIONS,
    ("linear", _of_rank(2)),
    ("output", _made_by_nodes),
)

BYTE_RULES: tuple[tuple[str, Rule], ...] = (*_CONVOLUTIONS, ("softmax", _not_of_images))
"""What ExecuTorch and LiteRT compute along another axis, or were never seen to compute."""


def _words(names: str) -> tuple[str, ...]:
    return tuple(names.split())


_ALL = _words(
    """
    adaptive_avg_pool2d add amax cat clamp clone contiguous conv1d conv2d conv_transpose2d
    div dropout embedding flatten gelu hardsigmoid hardswish hardtanh layer_norm leaky_relu
    linear matmul max_pool2d mean mul pad permute relu relu6 reshape select sigmoid silu
    slice softmax split squeeze sub sum tanh transpose unbind unflatten unsqueeze
    upsample_nearest2d view
    """
)
"""What all of these execute; reshape and view are one to their converters."""

LITERT = (*_ALL, "batch_norm")
"""What LiteRT's converter takes and its interpreter computes."""

XNNPACK = _ALL + _words(
    """
    abs adaptive_avg_pool1d avg_pool1d avg_pool2d celu channel_shuffle chunk
    conv_transpose1d cos elu exp expand flip floor group_norm index instance_norm log
    log_softmax max_pool1d maximum minimum mish neg pixel_shuffle pixel_unshuffle pow prelu
    repeat rms_norm roll round rsqrt selu sign sin softplus sqrt square stack
    upsample_bilinear2d var where
    """
)
"""What ExecuTorch takes; what XNNPACK has no kernels for runs beside it."""

ONNXRUNTIME = _ALL + _words(
    """
    abs adaptive_avg_pool1d adaptive_max_pool1d adaptive_max_pool2d amin avg_pool1d
    avg_pool2d batch_norm bmm celu channel_shuffle chunk clamp_max clamp_min conv3d
    conv_transpose1d cos cumsum detach elu erf exp expand expand_as flip floor full_like
    gather glu group_norm hardshrink index index_put instance_norm linalg_vector_norm log
    log_sigmoid log_softmax masked_fill max_pool1d maximum minimum mish movedim narrow
    neg pixel_shuffle pixel_unshuffle pow prelu reciprocal repeat repeat_interleave
    rms_norm roll round rsqrt rsub select_scatter selu sign sin slice_scatter softplus
    softshrink sqrt square stack std threshold tile upsample_bicubic2d
    upsample_bilinear2d upsample_nearest1d var where zeros zeros_like
    """
)
"""What ONNX Runtime executes; a model with another op is tried as a whole, in float."""

ONNXRUNTIME_RULES: tuple[tuple[str, Rule], ...] = (
    *_CONVOLUTIONS,
    ("adaptive_max_pool1d", _to_multiples),
    ("adaptive_max_pool2d", _to_multiples),
    *((f"avg_pool{rank}d", _averages) for rank in (1, 2, 3)),
    ("dropout", _switched_on),
    ("output", _made_by_nodes),
)
"""What torch.onnx cannot write, and what no file computes alike twice."""
