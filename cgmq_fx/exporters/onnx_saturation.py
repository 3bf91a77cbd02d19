"""Integer products that are exact on every processor.

x86 processors with AVX2 or AVX-512 but without VNNI multiply unsigned by signed bytes in pairs, and
add each pair in 16 bits, where large sums saturate (`vpmaddubsw`). onnxruntime uses that for UINT8
activations and INT8 weights: a file with large codes on both sides gives other numbers there than
on processors that add in 32 bits. With UINT8 weights it widens both factors first, which is always
exact, but slower. So only weights whose products can saturate are written as UINT8, with a
zero point of 128.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cgmq_fx.exporters.code_bits import Array
from cgmq_fx.exporters.onnx_products import is_float

_SUM = np.iinfo(np.int16)
_OFFSET = 128
_MOST = np.iinfo(np.uint8).max
_OUTPUTS = {"Conv": 0, "Gemm": 0, "MatMul": -1}
"""Ops with integer kernels, and the axis of their weight that runs over the outputs."""


def can_saturate(codes: Array, axis: int, largest: int) -> bool:
    """Whether two products that are added for the same output can exceed 16 bits.

    Which weights are a pair depends on the kernel, so all pairs of an output count.

    Args:
        codes: A weight in signed bytes.
        axis: Its axis over outputs.
        largest: The largest byte that stands for an activation, the zero point included.
    """
    rows = np.moveaxis(codes.astype(np.int64), axis, 0).reshape(codes.shape[axis], -1)
    pairs = np.sort(np.pad(rows, ((0, 0), (2, 2))), axis=1) * largest
    highest, lowest = pairs[:, -2:].sum(1), pairs[:, :2].sum(1)
    return bool((highest > _SUM.max).any() or (lowest < _SUM.min).any())


def avoid_saturation(model: Any) -> None:
    """Give weights whose products can saturate a type that kernels multiply in 32 bits, in place.

    Args:
        model: A model of onnx_ir in QDQ form, with weights in signed bytes.
    """
    import onnx_ir as ir

    for node in model.graph:
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.const_value is None or codes.dtype != ir.DataType.INT8:
            continue
        values = codes.const_value.numpy()
        found = (can_saturate(values, axis, most) for axis, most in _products(node.outputs[0]))
        if any(found):
            _store_unsigned(model, node, values)


def unsigned_weights(path: Path) -> int:
    """How many weights `avoid_saturation` stored unsigned in a file."""
    import onnx_ir as ir

    graph = ir.load(path).graph
    return sum(
        node.op_type == "DequantizeLinear"
        and node.inputs[0].const_value is not None
        and node.inputs[0].dtype == ir.DataType.UINT8
        for node in graph
    )


def _products(weight: Any, turned: bool = False) -> list[tuple[int, int]]:
    """For every op that multiplies a weight by codes: the axis over outputs, the largest byte."""
    rows = []
    for reader, index in weight.uses():
        if reader.op_type == "Transpose":
            rows += _products(reader.outputs[0], turned=not turned)
        elif reader.op_type in _OUTPUTS and index == 1 and not is_float(reader.inputs[0]):
            axis = 0 if turned else _OUTPUTS[reader.op_type]
            rows.append((axis, _largest_byte(reader.inputs[0])))
    return rows


def _largest_byte(activation: Any) -> int:
    """The largest code of an activation, as it is stored; that of its type where none is told."""
    maker = activation.producer()
    clip = maker.inputs[0].producer() if maker and maker.op_type == "DequantizeLinear" else None
    if clip is None or clip.op_type != "Clip" or clip.inputs[2].const_value is None:
        return _MOST
    return int(clip.inputs[2].const_value.numpy())


def _store_unsigned(model: Any, node: Any, values: Array) -> None:
    """Codes with a zero point of 128, which their readers have to know of."""
    import onnx_ir as ir

    codes = node.inputs[0]
    stored = (values.astype(np.int16) + _OFFSET).astype(np.uint8)
    codes.const_value = ir.tensor(stored, name=codes.name)
    codes.dtype = ir.DataType.UINT8
    for reader, _ in codes.uses():
        steps = reader.inputs[1].const_value.numpy().shape
        reader.resize_inputs(3)
        reader.replace_input_with(2, _zero_point(model, steps))


def _zero_point(model: Any, shape: tuple[int, ...]) -> Any:
    """The constant 128, one for each shape."""
    import onnx_ir as ir

    name = "_".join(["weight_zero_point", *map(str, shape)])
    if name not in model.graph.initializers:
        tensor = ir.tensor(np.full(shape, _OFFSET, np.uint8), name=name)
        kind = ir.TensorType(ir.DataType.UINT8)
        value = ir.Value(name=name, type=kind, shape=ir.Shape(shape), const_value=tensor)
        model.graph.register_initializer(value)
    return model.graph.initializers[name]
