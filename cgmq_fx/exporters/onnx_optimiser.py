"""Clean-up of what torch.onnx translates, by the passes of onnxscript, without two of its habits.

A file holds what the model holds. Whatever can be computed from that (positions, masks, tables of
indices) is computed when the file is loaded: folding must not make a file larger. And no op is
fused whose new constants are named after its input: a second one on the same input would take the
name, and with it the constant, of the first.
"""

from __future__ import annotations

from math import prod
from typing import Any

_NAMED_AFTER_INPUTS = (
    *("FuseSuccessiveMin", "FuseSuccessiveMax", "FuseMinMaxToClip", "FuseMaxMinToClip"),
    *("FuseSuccessiveClip", "FuseSuccessiveClipRelu", "FuseSuccessiveReluClip"),
    *("FuseBatchNormIntoConv", "FuseBatchNormIntoConvTranspose", "FuseBatchNormIntoGemm"),
)
_MOST_ROUNDS = 2


def optimise(model: Any) -> None:
    """Simplify a model of onnx_ir, in place.

    Args:
        model: What torch.onnx gave when told not to optimise.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter

    rules = [r for r in rewriter._DEFAULT_REWRITE_RULES if r.name not in _NAMED_AFTER_INPUTS]
    common.InlinePass()(model)
    for _ in range(_MOST_ROUNDS):
        optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=_may_fold)
        rewriter.rewrite(model, rules)
    for step in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        step(model)


def _may_fold(node: Any) -> bool | None:
    """False if a file would hold more with the result of a node than with what it is made from."""
    given = [value for value in node.inputs if value is not None]
    own = [_size(value) for value in given if not value.is_initializer()]
    stored = [_size(value) for value in given if value.is_initializer()]
    made = [_size(value) for value in node.outputs]
    if any(size is None for size in (*own, *stored, *made)):
        return False
    larger = sum(made) > sum(own) + sum(size for size in stored if size == 1)
    return False if larger else None


def _size(value: Any) -> int | None:
    """The elements of a value, None if they cannot be told."""
    shape = value.shape
    if shape is None or not all(isinstance(size, int) for size in shape):
        return None
    return prod(shape)
