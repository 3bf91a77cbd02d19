"""Which gates meet which: the shapes of gates, and how those of two operands line up."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from cgmq_fx.passes.following import follow, gate_numbers, numbered
from cgmq_fx.passes.optable import ComputeOp, Layout, argument, compute_op
from cgmq_fx.passes.pairing import Factor, Met, pair, product_space
from cgmq_fx.passes.scheme import Granularity
from cgmq_fx.passes.state import groups_of, quantizer_of, shape_of, sources, view_root


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


def meeting(
    module: GraphModule, node: Node, op: ComputeOp, removable: int | None = None
) -> tuple[Met, Met]:
    """How the gates of the two factors of a compute node meet, in equal parts.

    Args:
        module: The graph's module.
        node: A compute node.
        op: Its row of the table.
        removable: How many channels of the activation can be removed, which run in order; None if
            it has no such channels.

    Returns:
        How those of the activation (or first factor) stand and how those of the weight (or second).
    """
    first, second = _factor(module, node, op.activation), _factor(module, node, op.weight)
    inputs = first.gates if removable is None else removable
    size, own = contracted_size(node, op), _gates_in_place(module, argument(node, op.weight))
    if size is not None and size % inputs == 0 and own is not None:
        lined_up = _line_up(op.layout, second.shape, own, size, inputs, groups_of(node))
        if lined_up and (removable is not None or _stand_in_order(node, op, first, size)):
            return Met(lined_up[1]), Met(lined_up[0])
    if removable is not None:
        return Met((1, inputs)), Met((second.gates, 1))
    return pair(op.layout, groups_of(node), first, second)


def _factor(module: GraphModule, node: Node, name: str) -> Factor:
    factor = argument(node, name)
    gates, shape = prod(_gates(module, factor)), shape_of(factor) or ()
    numbers = gate_numbers(module, factor) if gates > 1 else numbered((), shape)
    return Factor(gates, shape, numbers)


def _gates(module: GraphModule, factor: Node) -> tuple[int, ...]:
    found = quantizer_of(module, factor)
    return found[1].spec.gate_shape if found else ()


def _gates_in_place(module: GraphModule, factor: Node) -> tuple[int, ...] | None:
    """The shape of the gates along the axes of a factor; None if values have been moved."""
    gates, rank = _gates(module, factor), len(shape_of(factor) or ())
    if prod(gates) == 1:
        return (1,) * rank
    return gates if factor.op == "call_module" and len(gates) == rank else None


def _stand_in_order(node: Node, op: ComputeOp, first: Factor, size: int) -> bool:
    """Whether the contracted axis, of `size`, runs through the gates of the activation in order."""
    if first.gates == 1 or first.numbers is None:
        return first.gates == 1
    return _in_order(node, op, first.numbers, first.gates, size)


def _in_order(node: Node, op: ComputeOp, numbers: Tensor, count: int, size: int) -> bool:
    """Whether the numbers along the contracted axis are 0, 1, ... in equal parts."""
    rows = numbers.movedim(channels_at(node, op, argument(node, op.activation)), -1)
    if rows.shape[-1] != size or size % count:
        return False
    expected = torch.arange(count, dtype=torch.int32).repeat_interleave(size // count)
    return bool((rows == expected).all())


def runs_in_order(node: Node, op: ComputeOp, channels: int, size: int) -> bool:
    """Whether the contracted axis runs through so many channels of the activation in order.

    Found by sending the numbers of the channels through what lies in between: a flattened image
    has its channels in order, but the tokens that a mixer contracts are no channels.
    """
    *_, root = sources(argument(node, op.activation))
    axis, shape = channel_axis(node, op, root), shape_of(root)
    if axis is None or shape is None or shape[axis] != channels:
        return False
    return _runs_along(node, op, root, axis, size)


def _runs_along(node: Node, op: ComputeOp, root: Node, axis: int, size: int) -> bool:
    """Whether the contracted axis, of `size`, runs through `axis` of `root` in order."""
    shape = shape_of(root) or ()
    numbers = numbered(along(len(shape), axis, shape[axis]), shape)
    found = follow(numbers, root, argument(node, op.activation))
    return found is not None and _in_order(node, op, found, shape[axis], size)


def is_followed(root: Node, gates: tuple[int, ...]) -> bool:
    """Whether it can be told of all that multiplies a tensor which of its gates meets what.

    Args:
        root: The tensor that is to have gates.
        gates: Their shape.
    """
    numbers = numbered(gates, shape_of(root) or ())
    return all(
        (found := follow(numbers, root, factor)) is not None and _is_placed(node, op, factor, found)
        for node, op, factor in _readers(root)
    )


def _is_placed(node: Node, op: ComputeOp, factor: Node, numbers: Tensor) -> bool:
    pair = [
        numbers if own is factor else numbered((), shape_of(own) or ())
        for own in (argument(node, op.activation), argument(node, op.weight))
    ]
    return product_space(op.layout, groups_of(node), pair[0], pair[1]) is not None


def _readers(root: Node) -> Iterator[tuple[Node, ComputeOp, Node]]:
    """The compute nodes that read values of a tensor, and as which factor."""
    waiting, seen = [root], {root}
    while waiting:
        source = waiting.pop()
        for user in source.users:
            op = compute_op(user)
            if op and source in (argument(user, op.activation), argument(user, op.weight)):
                yield user, op, source
            elif user not in seen and source in list(sources(user))[1:2]:
                seen.add(user)
                waiting.append(user)


def _line_up(
    layout: Layout,
    shape: tuple[int, ...],
    gates: tuple[int, ...],
    size: int,
    inputs: int,
    groups: int,
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
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
