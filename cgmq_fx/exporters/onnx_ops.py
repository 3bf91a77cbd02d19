"""ONNX ops as the ATen ops that count them: what moves, joins or overwrites values costs alike."""

from __future__ import annotations

from typing import Any

import torch

_ATEN = torch.ops.aten

COMPUTE: dict[str, dict[int, Any]] = {
    "Conv": {n: getattr(_ATEN, f"conv{n}d").default for n in (1, 2, 3)},
    "ConvTranspose": {
        1: _ATEN.conv_transpose1d.default,
        2: _ATEN.conv_transpose2d.input,
        3: _ATEN.conv_transpose3d.input,
    },
    "Gemm": {},
    "MatMul": {},
}
"""Ops that multiply and accumulate, by the number of spatial dimensions where they have any."""

POOLS: dict[str, dict[int, Any]] = {
    name: {n: getattr(getattr(_ATEN, packet.format(n)), overload) for n in (1, 2, 3)}
    for name, packet, overload in (
        ("MaxPool", "max_pool{}d", "default"),
        ("GlobalMaxPool", "adaptive_max_pool{}d", "default"),
        ("AveragePool", "avg_pool{}d", "default"),
        ("GlobalAveragePool", "adaptive_avg_pool{}d", "default"),
        ("Resize", "upsample_nearest{}d", "vec"),
    )
}
"""Ops over space, by the number of its dimensions."""

OPS: dict[str, tuple[Any, int | None]] = {
    **{name: (None, None) for name in COMPUTE},
    **{name: (targets[2], 1) for name, targets in POOLS.items()},
    **{name: (None, 1) for name in ("QuantizeLinear", "DequantizeLinear")},
    # views: the first input in another shape
    "Flatten": (_ATEN.reshape.default, 1),
    "Reshape": (_ATEN.reshape.default, 1),
    "Squeeze": (_ATEN.reshape.default, 1),
    "Unsqueeze": (_ATEN.reshape.default, 1),
    "Identity": (_ATEN.alias.default, 1),
    "Transpose": (_ATEN.permute.default, 1),
    "Expand": (_ATEN.expand.default, 1),
    # values that are picked from the first input
    "ReduceMax": (_ATEN.amax.default, 1),
    "Slice": (_ATEN.slice.Tensor, 1),
    "Pad": (_ATEN.pad.default, 1),
    "Tile": (_ATEN.repeat.default, 1),
    "Gather": (_ATEN.index_select.default, 2),
    "Split": (_ATEN.split.Tensor, 1),
    "GridSample": (_ATEN.grid_sampler.default, 2),
    "ReduceMin": (_ATEN.amin.default, 1),
    "GatherElements": (_ATEN.gather.default, 2),
    "GatherND": (_ATEN.index.Tensor, 2),
    "TopK": (_ATEN.topk.default, 1),
    "CumSum": (_ATEN.cumsum.default, 1),
    "OneHot": (_ATEN.one_hot.default, 1),
    "ArgMax": (_ATEN.argmax.default, 1),
    "ArgMin": (_ATEN.argmin.default, 1),
    # sizes, and what is made from nothing else
    "Shape": (_ATEN.scalar_tensor.default, 0),
    "Size": (_ATEN.scalar_tensor.default, 0),
    "Range": (_ATEN.arange.default, 0),
    "ConstantOfShape": (_ATEN.full.default, 0),
    "DepthToSpace": (_ATEN.pixel_shuffle.default, 1),
    "SpaceToDepth": (_ATEN.pixel_unshuffle.default, 1),
    # means, joins, and element by element
    "ReduceMean": (_ATEN.mean.dim, 1),
    "ReduceSum": (_ATEN.sum.dim_IntList, 1),
    "ReduceL1": (_ATEN.norm.ScalarOpt_dim, 1),
    "ReduceL2": (_ATEN.norm.ScalarOpt_dim, 1),
    "ReduceProd": (_ATEN.prod.dim_int, 1),
    "ReduceSumSquare": (_ATEN.sum.dim_IntList, 1),
    "ReduceLogSumExp": (_ATEN.logsumexp.default, 1),
    "Concat": (_ATEN.cat.default, None),
    **{
        name: (target, None)
        for name, target in {
            "Add": _ATEN.add.Tensor,
            "Sub": _ATEN.sub.Tensor,
            "Mul": _ATEN.mul.Tensor,
            "Div": _ATEN.div.Tensor,
            "Pow": _ATEN.pow.Tensor_Tensor,
            "Max": _ATEN.maximum.default,
            "Min": _ATEN.minimum.default,
            "Mod": _ATEN.remainder.Tensor,
            "Xor": _ATEN.logical_xor.default,
            "Where": _ATEN.where.self,
            "And": _ATEN.logical_and.default,
            "Or": _ATEN.logical_or.default,
            "Not": _ATEN.logical_not.default,
            "Equal": _ATEN.eq.Tensor,
            "Greater": _ATEN.gt.Tensor,
            "GreaterOrEqual": _ATEN.ge.Tensor,
            "Less": _ATEN.lt.Tensor,
            "LessOrEqual": _ATEN.le.Tensor,
            "LayerNormalization": _ATEN.layer_norm.default,
            "BatchNormalization": _ATEN.batch_norm.default,
            "GroupNormalization": _ATEN.group_norm.default,
            "InstanceNormalization": _ATEN.instance_norm.default,
            "RMSNormalization": _ATEN.rms_norm.default,
            "PRelu": _ATEN.prelu.default,
            "ScatterND": _ATEN.copy.default,
            "ScatterElements": _ATEN.copy.default,
        }.items()
    },
    **{
        name: (target, 1)
        for name, target in {
            "Relu": _ATEN.relu.default,
            "Clip": _ATEN.clamp.default,
            "LeakyRelu": _ATEN.leaky_relu.default,
            "Elu": _ATEN.elu.default,
            "Selu": _ATEN.selu.default,
            "Celu": _ATEN.celu.default,
            "Gelu": _ATEN.gelu.default,
            "Sigmoid": _ATEN.sigmoid.default,
            "HardSigmoid": _ATEN.hardsigmoid.default,
            "HardSwish": _ATEN.hardswish.default,
            "Mish": _ATEN.mish.default,
            "Softplus": _ATEN.softplus.default,
            "Softmax": _ATEN.softmax.int,
            "LogSoftmax": _ATEN.log_softmax.int,
            "Tanh": _ATEN.tanh.default,
            "Abs": _ATEN.abs.default,
            "Neg": _ATEN.neg.default,
            "Exp": _ATEN.exp.default,
            "Log": _ATEN.log.default,
            "Sqrt": _ATEN.sqrt.default,
            "Reciprocal": _ATEN.reciprocal.default,
            **{
                name.capitalize(): getattr(_ATEN, name).default
                for name in ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "sign")
            },
            "ThresholdedRelu": _ATEN.threshold.default,
            "IsInf": _ATEN.isinf.default,
            "Erf": _ATEN.erf.default,
            "Floor": _ATEN.floor.default,
            "Ceil": _ATEN.ceil.default,
            "Round": _ATEN.round.default,
            "IsNaN": _ATEN.isnan.default,
            "Cast": (_ATEN._to_copy.default),
            "Trilu": _ATEN.tril.default,
        }.items()
    },
}
"""Op -> the ATen op, and how many of its inputs are data (None for all); the rest say how."""

UNKNOWN = _ATEN.where.self
"""What an op without a row is taken for: it writes a tensor of its own, from all its inputs."""

PLACES = {"ScatterND": 1, "ScatterElements": 1}
"""Op -> the input among its data that only says where: it counts if it is always the same."""

SIZED = frozenset({"Expand", "Tile", "ConstantOfShape", "Range"})
"""Ops whose inputs behind the data are the size of what they make."""
