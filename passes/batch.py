"""Whether dimension 0 of the inputs is a batch, where torch.export could not leave its size free.

Some models fix the size of their batch (`x.reshape(4, -1)`), others get inputs that have no batch:
an image of shape (channels, height, width), whose channels are no samples. What multiplies tells
them apart. Samples are never multiplied with each other, so whatever a batch goes through does the
same for every sample: convolutions are applied to a multiple of so many images, linear layers to a
multiple of so many rows, and products of two activations are a multiple of so many matrices. If
that fails anywhere, dimension 0 is no batch, and costs are those of everything that was given.
"""

from __future__ import annotations

from math import prod

from torch import Tensor
from torch.fx import GraphModule, Node

from cgmq_fx.passes.inputs import ExampleInputs
from cgmq_fx.passes.insert import operands
from cgmq_fx.passes.optable import ComputeOp, Layout, compute_op
from cgmq_fx.passes.shapes import EXAMPLE
from cgmq_fx.passes.state import groups_of, shape_of


def fixed_axes(module: GraphModule, inputs: ExampleInputs) -> tuple[bool, ...]:
    """For each tensor of the inputs, whether its dimension 0 is a batch, of a fixed size.

    Args:
        module: A graph with the shapes that it has for the inputs.
        inputs: What it was captured with, for this batch size only.

    Returns:
        The axes that the sizes of the inputs tell, or none if an op contradicts them.
    """
    axes, batch = inputs.axes, inputs.batch
    fed = _fed(module, inputs, axes)
    ops = ((node, compute_op(node)) for node in module.graph.nodes)
    counts = [_repetitions(node, op, fed) for node, op in ops if op is not None and node in fed]
    if not batch or not inputs.agrees or any(count % batch for count in counts):
        return (False,) * len(axes)
    return axes


def _fed(module: GraphModule, inputs: ExampleInputs, axes: tuple[bool, ...]) -> set[Node]:
    """The nodes that depend on what may have a batch, up to where sizes depend on values."""
    placeholders = module.graph.find_nodes(op="placeholder")
    given = [n for n, x in zip(placeholders, inputs.leaves, strict=True) if isinstance(x, Tensor)]
    found = {node for node, batched in zip(given, axes, strict=True) if batched}
    for node in module.graph.nodes:
        known = node.op == "call_function" and EXAMPLE not in node.meta
        if known and any(parent in found for parent in node.all_input_nodes):
            found.add(node)
    return found


def _repetitions(node: Node, op: ComputeOp, fed: set[Node]) -> int:
    """How often an op does the same: for how many images, rows or pairs of matrices."""
    first, second = operands(node, op)
    shapes = shape_of(first) or (), shape_of(second) or ()
    if op.layout in (Layout.CONV, Layout.CONV_TRANSPOSE):
        images = shapes[0][0] if len(shapes[0]) == len(shapes[1]) else 1
        return images * groups_of(node) if second in fed else images  # a filter for every sample
    if first in fed and second in fed:
        return prod((shape_of(node) or ())[:-2])
    if first in fed:
        return prod(shapes[0][:-1])
    return prod(shapes[1][:-2]) * prod(shapes[1][-1:] if len(shapes[1]) > 1 else ())
