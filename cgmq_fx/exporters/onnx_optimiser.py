"""Clean-up of what torch.onnx translates, by the passes of onnxscript, without some of its habits.

A file holds what the model holds. Whatever can be computed from that (positions, masks, tables of
indices) is computed when the file is loaded: folding must not make a file larger. No op is fused
whose new constants are named after its input: a second one on the same input would take the name,
and with it the constant, of the first. And what the model computes twice is computed twice: one
value for both would have to be kept in between, which the peak of activations does not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any

_NAMED_AFTER_INPUTS = (
    *("FuseSuccessiveMin", "FuseSuccessiveMax", "FuseMinMaxToClip", "FuseMaxMinToClip"),
    *("FuseSuccessiveClip", "FuseSuccessiveClipRelu", "FuseSuccessiveReluClip"),
    *("FuseBatchNormIntoConv", "FuseBatchNormIntoConvTranspose", "FuseBatchNormIntoGemm"),
)
_MOST_ROUNDS = 2
_MAKERS = frozenset({"Range", "Expand", "Tile", "ConstantOfShape", "EyeLike", "OneHot"})
"""Ops that make tables from a few numbers."""

_BIAS = 2
"""The number of a convolution's input that is its bias."""

_MEASURES = frozenset({"Shape", "Size"})
_ROUNDS = frozenset({"QuantizeLinear", "DequantizeLinear", "Quant"})


def optimise(model: Any) -> None:
    """Simplify a model of onnx_ir, in place.

    Args:
        model: What torch.onnx gave when told not to optimise.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter

    rules = [r for r in rewriter._DEFAULT_REWRITE_RULES if r.name not in _NAMED_AFTER_INPUTS]
    common.InlinePass()(model)
    own = frozenset(model.graph.initializers)
    for _ in range(_MOST_ROUNDS):
        optimizer.fold_constants(
            model, onnx_shape_inference=True, should_fold=partial(_may_fold, own)
        )
        rewriter.rewrite(model, rules)
    _without_axes(own, model)
    for step in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
    ):
        step(model)
    _without_zero_biases(model.graph)
    _merge(model)
    for step in (common.RemoveUnusedNodesPass(), common.OutputFixPass(), common.NameFixPass()):
        step(model)


def _without_zero_biases(graph: Any) -> None:
    """Take away the zeros that convolutions without a bias are written with."""
    for node in graph:
        if node.op_type not in ("Conv", "ConvTranspose") or len(node.inputs) < _BIAS + 1:
            continue
        maker = node.inputs[_BIAS] and node.inputs[_BIAS].producer()
        if maker is not None and maker.op_type == "Expand":
            value = maker.inputs[0].const_value
            if value is not None and not value.numpy().any():
                node.resize_inputs(_BIAS)


def _merge(model: Any) -> None:
    """Make one of nodes that compute the same, unless they are the model's."""
    from onnx_ir.passes import common

    apart = list(_activations(model.graph))
    for number, node in enumerate(apart):
        node.overload = str(number)  # nodes of different ops are not merged
    common.CommonSubexpressionEliminationPass()(model)
    for node in apart:
        node.overload = ""


def _activations(graph: Any) -> Iterator[Any]:
    """The nodes that make tensors of a model: not codes, sizes, or what depends on no input."""
    data: set[Any] = set(graph.inputs)
    sizes: set[Any] = set()
    codes: set[Any] = set()
    for node in graph:
        reads_data = not data.isdisjoint(node.inputs)
        if not reads_data and sizes.isdisjoint(node.inputs):
            continue
        measures = not reads_data or node.op_type in _MEASURES
        (sizes if measures else data).update(node.outputs)
        if node.op_type in _ROUNDS or (node.op_type == "Clip" and node.inputs[0] in codes):
            codes.update(node.outputs)
        elif not (measures and all(_is_integer(value) for value in node.outputs)):
            yield node


def _is_integer(value: Any) -> bool:
    return value.dtype is not None and bool(value.dtype.is_integer())


def _without_axes(own: frozenset[str], model: Any) -> None:
    """Let the numbers that are expanded be numbers: one in a list is stored as a tensor."""
    import onnx_ir as ir

    for node in list(model.graph):
        if node.op_type != "Expand" or node.inputs[0].name in own:
            continue
        tensor = ir.convenience.get_const_tensor(node.inputs[0])
        if tensor is not None and tensor.size == 1 and tensor.shape.rank():
            number = ir.tensor(tensor.numpy().reshape(()))
            constant = ir.node("Constant", [], {"value": number})
            model.graph.insert_before(node, constant)
            node.replace_input_with(0, constant.outputs[0])


def _may_fold(own: frozenset[str], node: Any) -> bool | None:
    """False if a file would hold more with the result of a node than with what it is made from.

    What the model holds itself (`own`) stays in the file, whoever else reads it.
    """
    given = [value for value in node.inputs if value is not None]
    sizes = [_size(value) for value in (*given, *node.outputs)]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes) or node.op_type in _MAKERS:
        return False
    made = sum(known[len(given) :])
    pairs = zip(given, known, strict=False)
    spent = sum(size for value, size in pairs if size == 1 or value.name not in own)
    return False if made > spent else None


def _size(value: Any) -> int | None:
    """The elements of a value, None if they cannot be told."""
    shape = value.shape
    if shape is None or not all(isinstance(size, int) for size in shape):
        return None
    return prod(int(size) for size in shape)
