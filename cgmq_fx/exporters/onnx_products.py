"""Products of float activations with quantized weights, written so that they stay exact.

Where a dequantized weight is a factor of a MatMul or of a Gemm that turns nothing, and the other
factor is float, onnxruntime replaces both by `MatMulNBits`, which rounds the activations to 8 bits
while it runs (`session.qdq_matmulnbits_accuracy_level`). Nobody trained for that, and a file cannot
forbid it. But only matrices are replaced: a weight that is stored turned is left to a Gemm, and
another gets a leading dimension of one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_VIEWS = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"})
MOVES = _VIEWS | {"Slice", "MaxPool"}
"""Ops that onnxruntime computes on codes, so that a product behind them has integer factors."""

_MATRIX = 2
_PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}


def is_float(activation: Any) -> bool:
    """Whether a factor of a product is no code: neither dequantized nor picked from what is."""
    return dequantized(activation) is None


def dequantized(activation: Any) -> Any | None:
    """The node that makes a factor of a product from codes, None if the factor is no code."""
    maker = activation.producer()
    while maker is not None and maker.op_type in MOVES:
        maker = maker.inputs[0].producer()
    return maker if maker is not None and maker.op_type == "DequantizeLinear" else None


def keep_float_products(model: Any) -> None:
    """Rewrite the products of float activations with quantized weights, in place.

    Args:
        model: A model of onnx_ir in QDQ form.
    """
    from onnx_ir.passes.common import NameFixPass

    for node in list(model.graph):
        if node.op_type not in ("MatMul", "Gemm") or not _is_plain(node):
            continue
        activation, weight = node.inputs[:2]
        if activation.shape is None or not _is_quantized_matrix(weight) or not is_float(activation):
            continue
        if activation.shape.rank() == _MATRIX and weight.producer().op_type == "Transpose":
            _with_turned_weight(model.graph, node)
        else:
            _with_leading_dimension(model.graph, node)
    NameFixPass()(model)


def _is_plain(node: Any) -> bool:
    """Whether a product neither turns nor scales anything; others are not replaced."""
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    return all(given.get(name, value) == value for name, value in _PLAIN.items())


def _is_quantized_matrix(weight: Any) -> bool:
    """Whether a factor has two dimensions, and is made of a stored weight alone."""
    maker = weight.producer()
    while maker is not None and maker.op_type in _VIEWS:
        maker = maker.inputs[0].producer()
    if maker is None or maker.op_type != "DequantizeLinear":
        return False
    stored = maker.inputs[0].const_value is not None
    return stored and weight.shape is not None and weight.shape.rank() == _MATRIX


def _with_turned_weight(graph: Any, node: Any) -> None:
    """A Gemm that turns the weight itself, as linear layers are written."""
    import onnx_ir as ir

    activation, weight, *bias = node.inputs
    turn = weight.producer()
    options = {**node.attributes, "transB": 1}
    gemm = ir.node("Gemm", [activation, turn.inputs[0], *bias], options, name=node.name)
    _put(graph, node, gemm, node.outputs[0].name)
    _replace(graph, node, gemm)
    if not weight.uses():
        graph.remove(turn, safe=True)


def _with_leading_dimension(graph: Any, node: Any) -> None:
    """A MatMul; the dimension goes again where a vector or a matrix is multiplied."""
    import onnx_ir as ir

    activation, weight, *bias = node.inputs
    made = node.outputs[0]
    wide = _put(graph, node, ir.node("Unsqueeze", [weight, _first_axis(graph)]), f"{made.name}_w")
    last = ir.node("MatMul", [activation, wide], name=node.name)
    if activation.shape.rank() <= _MATRIX:
        found = _put(graph, node, last, f"{made.name}_wide")
        last = ir.node("Squeeze", [found, _first_axis(graph)])
    if bias:
        last = ir.node("Add", [_put(graph, node, last, f"{made.name}_sum"), *bias])
    _put(graph, node, last, made.name)
    _replace(graph, node, last)


def _put(graph: Any, place: Any, node: Any, name: str) -> Any:
    """Put a node in front of another, and name what it makes."""
    graph.insert_before(place, node)
    node.outputs[0].name = name
    return node.outputs[0]


def _replace(graph: Any, node: Any, other: Any) -> None:
    """Let a node make what another made."""
    import onnx_ir as ir

    old, new = node.outputs[0], other.outputs[0]
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _first_axis(graph: Any) -> Any:
    """The constant that names the leading dimension."""
    import onnx_ir as ir

    name = "first_axis"
    if name not in graph.initializers:
        tensor = ir.tensor(np.zeros(1, np.int64), name=name)
        kind = ir.TensorType(ir.DataType.INT64)
        value = ir.Value(name=name, type=kind, shape=ir.Shape([1]), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]
