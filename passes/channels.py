"""Channels that pruning can remove: from the weight that makes them to the weights that read them.

A channel whose weights all have 0 bits is zero, bias included, and stays zero through ops that keep
zeros and channels. Where nothing but weights of other layers reads it in the end, it can be taken
out of the graph, and what reads it gets cheaper: costs are counted that way from the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from cgmq_fx.passes.following import pooled_axes
from cgmq_fx.passes.meeting import channels_at, contracted_size, runs_in_order, weight_axis
from cgmq_fx.passes.oplists import KEEP_ZEROS, ZERO_POOLS, overloads
from cgmq_fx.passes.optable import ComputeOp, Layout, argument, compute_op
from cgmq_fx.passes.quantizer import BiasQuantizer, Quantizer
from cgmq_fx.passes.state import groups_of, quantizer_of, shape_of

_FLATTEN = overloads("flatten")
SIZED = overloads("view reshape _unsafe_view")
"""Views whose sizes are written out."""

_MEANS = overloads("mean")
_COPIES = overloads("contiguous clone alias detach")


@dataclass(frozen=True, slots=True)
class Channels:
    """The output channels of one layer, as far as they can be removed.

    Attributes:
        maker: The compute node that makes them.
        weight: Name of its weight's quantizer.
        gates: The gates of the weight as (before, channels, after), channels in the middle.
        axis: The axis of the weight that runs over the channels.
        between: The nodes between, which keep zeros, in graph order.
        readers: The compute nodes that contract them, in graph order.
    """

    maker: Node
    weight: str
    gates: tuple[int, int, int]
    axis: int
    between: tuple[Node, ...]
    readers: tuple[Node, ...]

    @property
    def count(self) -> int:
        """Number of channels."""
        return self.gates[1]


def removable_channels(module: GraphModule) -> tuple[Channels, ...]:
    """Every layer whose channels can be removed once they are pruned.

    Its weight has gates per channel or per element that may be 0; it is used once and has its bias,
    if any, on a grid; its output reaches nothing but ungrouped layers that contract these channels
    in order, through element-wise ops and pools that keep zeros, quantizers and flattening. That
    another axis is as long as the channels makes it none of theirs.
    """
    found = []
    for node in module.graph.nodes:
        op = compute_op(node)
        channels = _channels(module, node, op) if op is not None else None
        if channels is not None:
            found.append(channels)
    return tuple(found)


def _channels(module: GraphModule, node: Node, op: ComputeOp) -> Channels | None:
    axis, weight = weight_axis(node, op), quantizer_of(module, argument(node, op.weight))
    if axis is None or weight is None or groups_of(node) != 1 or op.layout is Layout.PRODUCT:
        return None
    name, quantizer = weight
    shape = quantizer.spec.gate_shape
    size = (shape_of(argument(node, op.weight)) or ())[axis : axis + 1]
    if not shape or shape[axis : axis + 1] != size or quantizer.spec.bit_widths[0] != 0:
        return None
    if not (_used_once(argument(node, op.weight)) and _bias_follows(module, node, op)):
        return None
    walk = _Walk(module, node, op, shape[axis])
    if not walk.reaches_readers_only():
        return None
    gates = (_product(shape[:axis]), shape[axis], _product(shape[axis + 1 :]))
    between = tuple(n for n in module.graph.nodes if n in walk.between)
    readers = tuple(n for n in module.graph.nodes if n in walk.readers)
    return Channels(node, name, gates, axis, between, readers)


def _product(sizes: tuple[int, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _used_once(factor: Node) -> bool:
    """Whether a weight is a tensor of the state that nothing else reads, quantizer included."""
    while factor.op == "call_module" and len(factor.users) == 1:
        factor = factor.all_input_nodes[0]
    return factor.op == "get_attr" and len(factor.users) == 1


def _bias_follows(module: GraphModule, node: Node, op: ComputeOp) -> bool:
    """Whether the bias, if there is one, is zero where the weight is pruned."""
    bias = argument(node, op.bias) if op.bias else None
    if bias is None:
        return True
    if bias.op != "call_module" or len(bias.users) != 1 or not _used_once(bias.args[0]):
        return False
    return isinstance(module.get_submodule(str(bias.target)), BiasQuantizer)


class _Walk:
    """Follows the channels of a layer to everything that reads them.

    What lies between leaves the channels on the axis on which the layer has made them.
    """

    def __init__(self, module: GraphModule, maker: Node, op: ComputeOp, count: int) -> None:
        self.module, self.maker, self.count = module, maker, count
        self.axis = channels_at(maker, op, maker)
        self.image = op.layout is not Layout.LINEAR
        self.between: set[Node] = set()
        self.readers: set[Node] = set()

    def reaches_readers_only(self) -> bool:
        """Whether there is at least one reader, and nothing else at the end."""
        waiting = [self.maker]
        while waiting:
            node = waiting.pop()
            for user in node.users:
                if user in self.readers or user in self.between:
                    continue
                if self._keeps_zeros(user, node):
                    self.between.add(user)
                    waiting.append(user)
                elif self._reads(user, node):
                    self.readers.add(user)
                else:
                    return False
        return bool(self.readers)

    def _keeps_zeros(self, node: Node, source: Node) -> bool:
        """Whether a node passes channels of zeros on as such."""
        if node.args[:1] != (source,) or source in node.args[1:]:
            return False
        if node.op == "call_module":
            return isinstance(self.module.get_submodule(str(node.target)), Quantizer)
        if node.target in KEEP_ZEROS or node.target in _COPIES:
            return True
        if not self.image or len(shape_of(source) or ()) < 3:
            return False
        if node.target in ZERO_POOLS:
            return self.axis < len(shape_of(source) or ()) - pooled_axes(node)
        return _averages_space(node, self.axis) or (self.axis == 1 and _flattens(node))

    def _reads(self, node: Node, source: Node) -> bool:
        op = compute_op(node)
        if op is None or op.layout is Layout.PRODUCT or groups_of(node) != 1:
            return False
        size, weight = contracted_size(node, op), argument(node, op.weight)
        return (
            argument(node, op.activation) is source
            and channels_at(node, op, source) == self.axis
            and size is not None
            and _used_once(weight)
            and runs_in_order(node, op, self.count, size)
        )


def _averages_space(node: Node, axis: int) -> bool:
    """Whether a node is the mean over everything behind the channels."""
    shape = shape_of(node.args[0]) if isinstance(node.args[0], Node) else None
    if node.target not in _MEANS or shape is None or len(node.args) < 2:
        return False
    dims: Any = node.args[1]
    space = set(range(axis + 1, len(shape)))
    return isinstance(dims, list | tuple) and {d % len(shape) for d in dims} == space


def _flattens(node: Node) -> bool:
    """Whether a node makes one axis of channels and space, in a way that can be shortened."""
    before, after = (
        shape_of(node.args[0]) if isinstance(node.args[0], Node) else None,
        shape_of(node),
    )
    if before is None or after is None or len(after) != 2 or before[0] != after[0]:
        return False
    return node.target in _FLATTEN or (node.target in SIZED and _last_size(node) in (-1, after[1]))


def _last_size(node: Node) -> object:
    """The last of two sizes that a view is given; as recorded, in a graph that lacks them."""
    if len(node.args) < 2:
        return (shape_of(node) or (None,))[-1]
    sizes = node.args[1]
    return sizes[-1] if isinstance(sizes, list | tuple) and len(sizes) == 2 else None
