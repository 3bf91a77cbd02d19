"""Products of codes with float weights, written so that the weights stay float.

Where a convolution or a Gemm reads codes, and its result is rounded to codes, onnxruntime rounds a
float weight to 8 bits on its own, and the bias with it (its optimizer `WeightBiasQuantization`,
which a file cannot forbid). Nobody trained for that. But it looks for the rounding behind a Relu or
a Clip only: a LeakyRelu with a slope of one, which changes nothing, hides it. Kernels of
convolutions and Gemms compute that on the way.
"""

from __future__ import annotations

from typing import Any

from cgmq_fx.exporters.onnx_products import MOVES, dequantized

_MATRIX = 2
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_FOLDED = frozenset({"Add", "Mul", "BatchNormalization"})
"""Ops that onnxruntime folds into the product in front of them, if their other inputs are fixed."""

_PASSED = MOVES | {"Relu", "Clip"}
"""Ops behind which onnxruntime finds the rounding of a product."""

_MEASURES = frozenset({"Shape", "Size"})


def keep_float_weights(model: Any) -> None:
    """Hide the roundings of products of codes with float weights, in place.

    Args:
        model: A model of onnx_ir in QDQ form.
    """
    from onnx_ir.passes.common import NameFixPass

    for node in list(model.graph):
        if node.op_type not in _PRODUCTS or not _reads_codes(node) or not _is_fixed(node.inputs[1]):
            continue
        last = _last_folded(node)
        if node.op_type == "MatMul" and (last is node or not _becomes_gemm(node)):
            continue
        if _is_rounded(last.outputs[0]):
            _hide_readers(model.graph, last)
    NameFixPass()(model)


def _reads_codes(node: Any) -> bool:
    """Whether a product reads codes that have one step."""
    maker = dequantized(node.inputs[0])
    step = None if maker is None else maker.inputs[1].const_value
    return step is not None and step.size == 1


def _is_fixed(value: Any) -> bool:
    """Whether a value can be computed when a file is loaded: from constants, but from no codes."""
    if value is None or value.const_value is not None:
        return True
    maker = value.producer()
    return (
        maker is not None
        and maker.op_type != "DequantizeLinear"
        and all(map(_is_fixed, maker.inputs))
    )


def _last_folded(node: Any) -> Any:
    """The last of the nodes that are folded into a product, one after another; or the product."""
    made = node.outputs[0]
    readers = [reader for reader, _ in made.uses()]
    if len(readers) != 1 or made.is_graph_output() or readers[0].op_type not in _FOLDED:
        return node
    others = [value for value in readers[0].inputs if value is not made]
    return _last_folded(readers[0]) if others and all(map(_is_fixed, others)) else node


def _becomes_gemm(node: Any) -> bool:
    """Whether onnxruntime makes a Gemm of a MatMul and an Add: not with a batch of any size."""
    shape = node.inputs[0].shape
    return shape is not None and (shape.rank() == _MATRIX or shape.is_static())


def _is_rounded(value: Any) -> bool:
    """Whether all that reads a value rounds it to codes."""
    readers = [reader for reader, _ in value.uses() if reader.op_type not in _MEASURES]
    return bool(readers) and all(
        reader.op_type == "QuantizeLinear"
        or (reader.op_type in _PASSED and _is_rounded(reader.outputs[0]))
        for reader in readers
    )


def _hide_readers(graph: Any, node: Any) -> None:
    """Put a LeakyRelu that changes nothing between a node and all that reads it."""
    import onnx_ir as ir

    made = node.outputs[0]
    same = ir.node("LeakyRelu", [made], {"alpha": 1.0})
    value = same.outputs[0]
    value.name, value.shape, value.type = f"{made.name}_float", made.shape, made.type
    ir.convenience.replace_all_uses_with(made, value)
    same.replace_input_with(0, made)
    graph.insert_after(node, same)
