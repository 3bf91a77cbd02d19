"""The table of ATen ops that multiply and accumulate.

One row per op, keyed by the op object itself. Counting convention: one multiply-accumulate is one
MAC, biases and element-wise work count nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from cgmq_fx.passes.oplists import FREE, GRID_PRESERVING, LOOKUPS, PADS, READS, VIEWS

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
        return {Layout.CONV: 0, Layout.CONV_TRANSPOSE: 1, Layout.LINEAR: 0, Layout.PRODUCT: -1}[
            self
        ]


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


def compute_op(node: Node) -> ComputeOp | None:
    """The row of a node that multiplies and accumulates, else None."""
    return _COMPUTE.get(node.target) if node.op == "call_function" else None


def is_view(node: Node) -> bool:
    """Whether the node's output is its first argument in another shape."""
    return node.op == "call_function" and node.target in VIEWS


def looked_up(node: Node) -> Node | None:
    """The table that a node looks something up in, or None.

    What is read from parameters and buffers at places that depend on the model's input is looked
    up; at places that are fixed, it is only put in another order.
    """
    if node.op != "call_function":
        return None
    if node.target in LOOKUPS:
        table = argument(node, "weight")
        return table if isinstance(table, Node) else None
    if node.target not in READS or not isinstance(node.args[0], Node):
        return None
    table, places = node.args[0], [n for n in node.all_input_nodes if n is not node.args[0]]
    return table if _is_state(table) and any(map(_varies, places)) else None


def _is_state(node: Any) -> bool:
    """Whether a node is a parameter or a buffer, behind views and its quantizer."""
    while isinstance(node, Node) and node.args:
        own = getattr(node.target, "namespace", "") == "cgmq_fx" or node.op == "call_module"
        if not own and not is_view(node):
            return False
        node = node.args[0]
    return isinstance(node, Node) and node.op == "get_attr"


def _varies(node: Node) -> bool:
    """Whether a node depends on the model's input."""
    waiting, seen = [node], {node}
    while waiting:
        current = waiting.pop()
        if current.op == "placeholder":
            return True
        waiting += [n for n in current.all_input_nodes if n not in seen]
        seen.update(waiting)
    return False


def looked_up_axis(node: Node) -> int | None:
    """The axis of a table that a lookup picks whole slices along; None if it picks elements."""
    if node.target in LOOKUPS:
        return 0
    if node.target is _ATEN.index_select.default:
        return int(argument(node, "dim"))
    if node.target is not _ATEN.index.Tensor:
        return None
    given = [(axis, n) for axis, n in enumerate(argument(node, "indices")) if n is not None]
    numbers = all(n.meta["val"].dtype is not torch.bool for _, n in given)
    return given[0][0] if len(given) == 1 and numbers else None


def preserves_grid(node: Node) -> bool:
    """Whether the node's output values are values of its first argument, or 0.

    What is looked up in a table is not: its rows have grids of their own.
    """
    if node.op != "call_function" or node.target not in PADS:
        passes = node.op == "call_function" and node.target in GRID_PRESERVING
        return passes and (node.target not in READS or looked_up(node) is None)
    constant = argument(node, "mode", "constant") == "constant"
    return constant and argument(node, "value", 0) in (0, 0.0, None)


def is_whole_slice(node: Node) -> bool:
    """Whether a node is a slice of all that there is."""
    if node.target is not _ATEN.slice.Tensor:
        return False
    start, end, step = (argument(node, name) for name in ("start", "end", "step"))
    return start in (None, 0) and end in (None, sys.maxsize) and step == 1


def is_known(node: Node) -> bool:
    """Whether the table knows what the node multiplies, be it nothing."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return True
    return node.target in _COMPUTE or node.target in FREE or node.target.namespace == "cgmq_fx"


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
