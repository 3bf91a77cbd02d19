"""Which gates meet which: the shapes of gates, and how those of two operands line up."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.fx import Node

from cgmq_fx.passes.oplists import ZERO_POOLS
from cgmq_fx.passes.optable import ComputeOp, Layout, argument, is_view
from cgmq_fx.passes.scheme import Granularity
from cgmq_fx.passes.state import groups_of, shape_of, sources, view_root

_TRANSPOSES = ("permute", "transpose", "t", "movedim", "swapaxes", "swapdims", "numpy_T", "mT")
_MOST = 1 << 25
"""Elements of the largest tensor whose channels are followed: a file can ask for any size."""


def weight_axis(node: Node, op: ComputeOp) -> int | None:
    """The axis of the weight that runs over output channels, if each has values of its own.

    None where it cannot be told: the weight reaches the op through a view, has another rank than
    the op's usual one, or is a grouped transposed convolution's.
    """
    weight = argument(node, op.weight)
    if view_root(weight) is not weight:
        return None
    rank = len(shape_of(weight) or ())
    if op.layout in (Layout.LINEAR, Layout.PRODUCT):
        return op.layout.output_axis % rank if rank == 2 else None
    if op.layout is Layout.CONV_TRANSPOSE and groups_of(node) != 1:
        return None
    return op.layout.output_axis


def channel_axis(node: Node, op: ComputeOp, root: Node) -> int | None:
    """The axis of `root` whose channels the op contracts, or None if there is none to tell.

    Args:
        node: A compute node.
        op: Its row of the table.
        root: The tensor that its activation is a view of.
    """
    shape, contracted = shape_of(root), contracted_size(node, op)
    if shape is None or contracted is None or len(shape) < 2:
        return None
    if op.layout in (Layout.CONV, Layout.CONV_TRANSPOSE):
        return 1 if shape[1] == contracted else None
    if len(shape) > 2 and shape[-1] != contracted:
        fits = contracted % shape[1] == 0
        return 1 if fits and _runs_along(node, op, root, 1, contracted) else None
    return len(shape) - 1 if shape[-1] == contracted else None


def contracted_size(node: Node, op: ComputeOp) -> int | None:
    """How many channels of the activation the op sums over, all groups together."""
    weight = shape_of(argument(node, op.weight))
    if weight is None or len(weight) < 2:
        return None
    if op.layout is Layout.CONV:
        return weight[1] * groups_of(node)
    return {
        Layout.CONV_TRANSPOSE: weight[0],
        Layout.LINEAR: weight[-1],
        Layout.PRODUCT: weight[-2],
    }[op.layout]


def channels_at(node: Node, op: ComputeOp, tensor: Node) -> int:
    """The axis of channels in a tensor that the op reads as its activation, or makes.

    The last one, or for a convolution, be it with a batch or not, the one in front of the space.
    """
    convolved = op.layout in (Layout.CONV, Layout.CONV_TRANSPOSE)
    spatial = len(shape_of(argument(node, op.weight)) or ()) - 2 if convolved else 0
    return len(shape_of(tensor) or ()) - 1 - spatial


def pooled_axes(node: Node) -> int:
    """How many axes at the end an op of `ZERO_POOLS` works on: its name says it."""
    return int(str(node.target._opname)[-2])  # type: ignore[union-attr]


def along(rank: int, axis: int, size: int) -> tuple[int, ...]:
    """The shape with `size` at `axis` and 1 elsewhere."""
    return tuple(size if i == axis else 1 for i in range(rank))


def gate_shape(
    granularity: Granularity, shape: tuple[int, ...], axis: int | None
) -> tuple[int, ...]:
    """The shape of the gates of a tensor; one gate where the channel axis is unknown."""
    if granularity == "element":
        return shape
    if granularity == "channel" and axis is not None:
        return along(len(shape), axis, shape[axis])
    return ()


Meeting = tuple[tuple[int, ...], tuple[int, ...]]


def meeting(node: Node, op: ComputeOp, weight_gates: tuple[int, ...], input_gates: int) -> Meeting:
    """Shapes in which the gates of weight and activation broadcast, element meeting element.

    Args:
        node: A compute node.
        op: Its row of the table.
        weight_gates: The gate shape of the weight's quantizer, () for one gate.
        input_gates: Number of gates of the activation's quantizer.

    Returns:
        The shape for the weight's gates and the one for the activation's. Where the two cannot be
        lined up (a view in between), every gate meets every gate in equal parts.
    """
    count, size = prod(weight_gates), contracted_size(node, op)
    shape = shape_of(argument(node, op.weight))
    independent = ((count, 1), (1, input_gates))
    if (
        shape is None
        or size is None
        or size % input_gates
        or len(weight_gates) not in (0, len(shape))
        or (input_gates > 1 and not runs_in_order(node, op, input_gates, size))
    ):
        return independent
    dims = weight_gates or (1,) * len(shape)
    lined_up = _line_up(op.layout, shape, dims, size, input_gates, groups_of(node))
    return lined_up or independent


def runs_in_order(node: Node, op: ComputeOp, gates: int, size: int) -> bool:
    """Whether the contracted axis runs through the channels that have gates in order.

    Found by sending the numbers of the channels through what lies in between: a flattened image
    has its channels in order, but the tokens that a mixer contracts are no channels.
    """
    *_, root = sources(argument(node, op.activation))
    axis, shape = channel_axis(node, op, root), shape_of(root)
    if axis is None or shape is None or shape[axis] != gates:
        return False
    return _runs_along(node, op, root, axis, size)


def _runs_along(node: Node, op: ComputeOp, root: Node, axis: int, size: int) -> bool:
    """Whether the contracted axis, of `size`, runs through `axis` of `root` in order."""
    between, shape = [], shape_of(root)
    for source in sources(argument(node, op.activation)):
        if source is root or (source.op == "call_module" and root in source.args):
            break  # at the tensor or at its quantizer, once it has one
        between.append(source)
    else:
        return False  # `root` is the other factor
    if shape is None or any(prod(shape_of(n) or ()) > _MOST for n in (root, *between)):
        return False
    gates = shape[axis]
    channels = torch.arange(gates, dtype=torch.float32)
    numbers: Any = channels.reshape(along(len(shape), axis, -1)).expand(shape)
    for step in reversed(between):
        if len(step.all_input_nodes) > 1 and not is_view(step):
            return False
        numbers = _moved(numbers, step)
        if numbers is None:
            return False
    numbers = numbers.movedim(channels_at(node, op, argument(node, op.activation)), -1)
    if numbers.shape[-1] != size:
        return False
    return bool((numbers == channels.repeat_interleave(size // gates)).all())


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
        return _pooled(numbers, shape, pooled_axes(step))
    operation: Any = step.target
    if _lacks_arguments(step):
        return None
    return operation(numbers, *step.args[1:], **step.kwargs)


def _pooled(numbers: Any, shape: tuple[int, ...], axes: int) -> Any:
    """Numbers that are the same over all of the space, over a space of another size."""
    if numbers.dim() != len(shape) or tuple(numbers.shape[:-axes]) != shape[:-axes]:
        return None
    first = numbers[(..., *(slice(0, 1) for _ in range(axes)))]
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


def _line_up(
    layout: Layout,
    shape: tuple[int, ...],
    gates: tuple[int, ...],
    size: int,
    inputs: int,
    groups: int,
) -> Meeting | None:
    if layout is Layout.CONV and inputs in (1, size):  # (group, out, in, kernel)
        split = groups if gates[0] != 1 else 1
        weight = (split, gates[0] // split, gates[1], prod(gates[2:]))
        return weight, (groups, 1, inputs // groups, 1) if inputs > 1 else (1, 1, 1, 1)
    if layout is Layout.CONV_TRANSPOSE and inputs in (1, size):  # (in, out, kernel)
        return (gates[0], gates[1], prod(gates[2:])), (inputs, 1, 1)
    repeat = size // inputs
    if layout is Layout.LINEAR and len(shape) == 2:  # (out, channel, repeat)
        split_in = (inputs, repeat) if gates[1] != 1 else (1, 1)
        return (gates[0], *split_in), (1, inputs, 1)
    if layout is Layout.PRODUCT and len(shape) == 2:  # (channel, repeat, out)
        split_in = (inputs, repeat) if gates[0] != 1 else (1, 1)
        return (*split_in, gates[1]), (inputs, 1, 1)
    return None
