"""Values of ONNX files: types, attributes, zero points, and the shapes of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cgmq_fx.cost_models.errors import ArtifactError
from cgmq_fx.exporters.code_bits import Array, Shape

_TYPES: dict[str, torch.dtype] = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
    "DOUBLE": torch.float64,
    "BOOL": torch.bool,
    **{f"INT{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    "COMPLEX64": torch.complex64,
    "COMPLEX128": torch.complex128,
}
"""Types of elements by the names that ONNX has for them."""


def dtype_of(element: int) -> torch.dtype:
    """The dtype of a type of elements; float32 for one that PyTorch does not compute with."""
    from onnx import TensorProto

    return _TYPES.get(TensorProto.DataType.Name(element), torch.float32)


def single_zero(zero: Array, name: str) -> int:
    """The zero point of a weight: one number, however often it is written."""
    if zero.size == 0 or (zero != zero.flat[0]).any():
        raise ArtifactError(f"{name} reads a weight with several zero points")
    return int(zero.flat[0])


def attributes(node: Any) -> dict[str, Any]:
    """The attributes of a node by name."""
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def along(steps: Sequence[int], rank: int, axis: int) -> Shape:
    """The shape of steps along an axis of a tensor."""
    count = int(np.prod(steps))
    if count == 1:
        return ()
    return tuple(count if i == axis % rank else 1 for i in range(rank))
