"""Where ONNX ops move values: the ATen ops that do the same, with what says how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from cgmq_fx.exporters.code_bits import Array, Shape
from cgmq_fx.exporters.onnx_values import attributes

Constant: TypeAlias = Callable[[str], Array | None]
"""The value of an input that can be told without running anything."""

_ATEN = torch.ops.aten
_TOLD = ("Transpose", "ReduceMean", "ReduceMax", "Split", "Slice", "Gather", "Pad", "Concat")


def moved(
    node: Any,
    output: str,
    target: Any,
    given: Sequence[Any],
    constant: Constant,
    described: Callable[[str], tuple[Shape, torch.dtype]],
) -> tuple[Any, tuple[Any, ...]]:
    """The op that makes one output of a node, and its arguments as far as the file states them.

    Args:
        node: A node of an ONNX graph.
        output: The name of the output.
        target: The op that costs the same.
        given: Its data.
        constant: Gives the values of inputs.
        described: Gives the shapes of values.
    """
    if node.op_type not in _TOLD:
        return target, tuple(given)
    options = attributes(node)
    rest = [constant(name) if name else None for name in list(node.input)[1:]]
    axis = int(options.get("axis", 0))
    if node.op_type == "Concat":
        return target, (*given, axis)
    if node.op_type == "Transpose":
        return target, (*given, list(options["perm"]))
    if node.op_type in ("ReduceMean", "ReduceMax") and rest and rest[0] is not None:
        axes = [int(i) for i in rest[0].ravel()]
        return target, (*given, axes, bool(options.get("keepdims", 1)))
    if node.op_type == "Split":
        before = list(node.output)[: list(node.output).index(output)]
        start = sum(described(name)[0][axis] for name in before)
        return _ATEN.slice.Tensor, (given[0], axis, start, start + described(output)[0][axis])
    if node.op_type == "Slice":
        return target, (*given, *_slice(rest))
    if node.op_type == "Pad":
        return target, (*given, *_amounts(rest))
    place = rest[0] if target is _ATEN.index_select.default else None
    if place is not None and place.ndim == 0:
        return _ATEN.select.int, (given[0], axis, int(place))
    return target, tuple(given)


def _slice(rest: Sequence[Array | None]) -> tuple[int, ...]:
    """Axis, start, end and step of a slice along one axis, forwards; else nothing."""
    found = [[int(i) for i in values.ravel()] for values in rest if values is not None]
    if len(found) != len(rest) or len(rest) < 3 or any(len(values) != 1 for values in found):
        return ()
    (start,), (end,), (axis,), (step,) = (*found, [1])[:4]
    return (axis, start, end, step) if step > 0 else ()


def _amounts(rest: Sequence[Array | None]) -> tuple[list[int], ...]:
    """What a node adds before and behind every axis, the last axis first; else nothing."""
    amounts = rest[0] if 0 < len(rest) < 3 else None  # the third names the axes
    if amounts is None:
        return ()
    numbers = [int(n) for n in amounts.ravel()]
    rank = len(numbers) // 2
    return ([n for i in reversed(range(rank)) for n in (numbers[i], numbers[rank + i])],)
