"""Following gates: where the elements of a tensor end up behind ops that only move values."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from cgmq_fx.passes.oplists import IN_PLACE, JOINS, PADS, ZERO_POOLS, overloads
from cgmq_fx.passes.optable import argument, is_view
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.passes.state import shape_of, sources

MOST = 1 << 25
"""Elements of the largest tensor that is followed: a file can ask for any size."""

_TRANSPOSES = ("permute", "transpose", "t", "movedim", "swapaxes", "swapdims", "numpy_T", "mT")
_LARGEST = overloads("amax")
_PARTS = overloads("slice narrow")


def pooled_axes(node: Node) -> int:
    """How many axes at the end an op of `ZERO_POOLS` works on: its name says it."""
    return int(str(node.target._opname)[-2])  # type: ignore[union-attr]


def numbered(gates: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """For every element of a tensor, the number of its gate; `gates` broadcasts to `shape`."""
    return torch.arange(prod(gates), dtype=torch.int32).reshape(gates).expand(shape)


def gate_numbers(module: GraphModule, factor: Node) -> Tensor | None:
    """The number of the gate of each element of a factor, in the shape of the factor.

    None where it cannot be told.
    """
    for source in sources(factor):
        if source.op == "call_module":
            quantizer, shape = module.get_submodule(str(source.target)), shape_of(source)
            if not isinstance(quantizer, Quantizer) or shape is None:
                return None
            gates = quantizer.spec.gate_shape
            if len(gates) > len(shape) or any(
                own not in (1, size)
                for own, size in zip(reversed(gates), reversed(shape), strict=False)
            ):
                return None
            return follow(numbered(gates, shape), source, factor)
    return None


def follow(numbers: Tensor, start: Node, end: Node) -> Tensor | None:
    """Send numbers that the elements of `start` have through what lies between, up to `end`.

    None where they cannot be told, or `end` does not take its values from `start`.
    """
    between = []
    for source in sources(end):
        if source is start or (source.op == "call_module" and start in source.args):
            break  # at the tensor or at its quantizer, once it has one
        between.append(source)
    else:
        return None
    if any(prod(shape_of(n) or ()) > MOST for n in (start, *between)):
        return None
    found: Any = numbers
    for step in reversed(between):
        if len(step.all_input_nodes) > 1 and not is_view(step):
            return None
        found, shape = _moved(found, step), shape_of(step)
        if found is None or (shape is not None and tuple(found.shape) != shape):
            return None
    return found if isinstance(found, Tensor) else None


def before(numbers: Tensor, step: Node, source: Node) -> Tensor | None:
    """The numbers that the elements of `source` need for an op to give `numbers`: `follow` undone.

    What the op drops has the number of what lies beside it. None where it cannot be told, or
    elements would need several numbers.
    """
    shape = shape_of(source)
    if shape is None or prod(shape) > MOST or source not in (*step.args[:1], *_joined(step)):
        return None
    if step.op == "call_module" or step.target in IN_PLACE:  # element by element
        return numbers if numbers.shape == shape else None
    if step.target in ZERO_POOLS:
        return _resized(numbers, shape, range(len(shape) - pooled_axes(step), len(shape)))
    if step.target in PADS:
        return _resized(numbers, shape, _padded_axes(step, len(shape)))
    if step.target in _PARTS:
        sizes = zip(numbers.shape, shape, strict=False)
        return _resized(numbers, shape, [i for i, (cut, size) in enumerate(sizes) if cut != size])
    if step.target in _LARGEST:
        axes = {axis % max(len(shape), 1) for axis in argument(step, "dim") or range(len(shape))}
        kept = [1 if axis in axes else size for axis, size in enumerate(shape)]
        return numbers.reshape(kept).expand(shape) if numbers.numel() == prod(kept) else None
    places: Any = torch.arange(prod(shape), dtype=torch.int32).reshape(shape)
    if parts := _joined(step):
        others = torch.full((), -1, dtype=torch.int32)
        places = [places if n is source else others.expand(shape_of(n) or ()) for n in parts]
    places = _moved(places, step)
    return _put(numbers, places, shape) if isinstance(places, Tensor) else None


def _joined(step: Node) -> list[Node]:
    """The parts of a join; none for any other op."""
    parts = step.args[0] if step.op == "call_function" and step.target in JOINS else ()
    return [n for n in parts if isinstance(n, Node)] if isinstance(parts, list | tuple) else []


def _put(numbers: Tensor, places: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The tensor whose elements at `places` are `numbers`; None if any has none, or several."""
    if places.shape != numbers.shape:
        return None
    inside = places >= 0
    taken, wanted = places[inside].long(), numbers[inside]
    found = torch.full((prod(shape),), -1, dtype=numbers.dtype)
    found[taken] = wanted
    known = bool((found >= 0).all()) and torch.equal(found[taken], wanted)
    return found.reshape(shape) if known else None


def _moved(numbers: Any, step: Node) -> Any:
    """The output of an op that moves values; shapes come from the graph, where they are known.

    None where it cannot be told: graphs that are read from files lack arguments.
    """
    shape, name = shape_of(step), getattr(step.target, "_opname", "")
    if shape is not None and name in ("expand", "expand_as"):
        return numbers.expand(shape)
    if shape is not None and is_view(step) and name not in _TRANSPOSES:
        return numbers.reshape(shape)
    if shape is not None and step.target in ZERO_POOLS:
        axes = range(len(shape) - pooled_axes(step), len(shape))
        return _resized(numbers, shape, axes)
    if shape is not None and step.target in PADS:
        return _resized(numbers, shape, _padded_axes(step, len(shape)))
    if _lacks_arguments(step):
        return None
    operation: Any = step.target
    try:
        found = operation(numbers, *step.args[1:], **step.kwargs)
        if step.target in _LARGEST:
            least = -operation(-numbers, *step.args[1:], **step.kwargs)
            return found if torch.equal(found, least) else None
    except (RuntimeError, IndexError, TypeError, ValueError):  # what a damaged file asks for
        return None
    return found


def _padded_axes(step: Node, rank: int) -> Collection[int]:
    """The axes that are padded or cut, all if it cannot be told; the last axis comes first.

    What pads belongs to what lies beside it.
    """
    amounts = argument(step, "pad")
    if not isinstance(amounts, list | tuple) or len(amounts) > 2 * rank:
        return range(rank)
    return {rank - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}


def _resized(numbers: Tensor, shape: tuple[int, ...], axes: Collection[int]) -> Tensor | None:
    """Numbers that are the same along some axes, with other sizes of these."""
    if numbers.dim() != len(shape):
        return None
    first = numbers
    for axis in axes:
        first = first.narrow(axis, 0, 1)
    kept = [size if i not in axes else 1 for i, size in enumerate(shape)]
    if list(first.shape) != kept:
        return None
    return first.expand(shape) if bool((numbers == first).all()) else None


def _lacks_arguments(step: Node) -> bool:
    """Whether a node has no value for an argument that its op requires."""
    if not isinstance(step.target, torch._ops.OpOverload):
        return False
    required = [
        index
        for index, declared in enumerate(step.target._schema.arguments)
        if not declared.has_default_value() and declared.name not in step.kwargs
    ]
    return any(index >= len(step.args) for index in required)
