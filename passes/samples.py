"""What one sample has of what is counted: costs are per sample, whatever the example is.

A count is taken at the batch of the example and at twice that (`CompareBatches`). What stays the
same belongs to all samples and costs each of them in full; what grows belongs to the samples. No
size is taken for the batch because it happens to be as large. Only where a graph cannot be had with
another batch, sizes have to tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import torch
from torch import SymInt
from torch.fx import Graph, Node

from cgmq_fx.passes.optable import argument
from cgmq_fx.passes.shapes import DOUBLED
from cgmq_fx.passes.state import reachable_from_inputs, shape_of, value_of

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Samples:
    """What depends on the input, and what of it is there once per sample.

    Attributes:
        live: The nodes whose value or size depends on the model's input.
        batch: The batch size of the example.
        doubled: The shapes of all live nodes at twice that, or None if they are not known.
        growing: Where they are not, the nodes whose tensors hold something of every sample.
    """

    live: set[Node]
    batch: int
    doubled: Mapping[Node, Shape] | None
    growing: set[Node]

    @staticmethod
    def of(graph: Graph, batch: int) -> Samples:
        """What the shapes in a graph tell.

        Args:
            graph: A graph with shapes, be it of one batch size or of two.
            batch: The batch size of the example.
        """
        live = reachable_from_inputs(graph)
        if all(DOUBLED in node.meta for node in live if shape_of(node) is not None):
            doubled = {node: node.meta[DOUBLED] for node in live if DOUBLED in node.meta}
            return Samples(live, batch, doubled, set())
        return Samples(live, batch, None, grows_with_batch(graph, batch))

    def elements(self, node: Node) -> int:
        """The elements of a tensor that one sample has."""
        return self.count(prod, node)

    def count(self, formula: Callable[..., int], *nodes: Node) -> int:
        """What one sample has of a count: what it costs alone, or its share, whichever is more.

        Alone it costs what is there for all samples and what is there for one. Its share is more
        where samples are compared with each other, or some are left out.

        Args:
            formula: Counts, from the shapes of the nodes, what all samples have together.
            nodes: The nodes; of a product, both factors come first.
        """
        shapes = [shape_of(node) or () for node in nodes]
        total = formula(*shapes)
        if self.doubled is None:
            grows = any(node in self.growing for node in nodes[:2])
            return total // self.batch if grows else total
        known = zip(nodes, shapes, strict=True)
        more = formula(*(self.doubled.get(node, shape) for node, shape in known)) - total
        alone = self.batch * total - (self.batch - 1) * more  # times the batch
        return -(-max(alone, total) // self.batch)


def grows_with_batch(graph: Graph, batch: int) -> set[Node]:
    """The nodes whose tensors hold something of every sample, by the shapes of the example alone.

    What is made from another size than that of the batch (a causal mask, a table of positions) is
    there once for all samples, and so is an input without a batch and what is made from it alone.

    Args:
        graph: A graph with shapes.
        batch: The batch size that they were taken with.
    """
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            grows = (shape_of(node) or (0,))[0] == batch
        elif isinstance(value_of(node), int | SymInt):
            grows = _counts_samples(node, found, batch)
        else:
            grows = not found.isdisjoint(node.all_input_nodes) and not _is_one_for_all(node, batch)
        if grows:
            found.add(node)
    return found


def _counts_samples(node: Node, found: set[Node], batch: int) -> bool:
    """Whether a number is the batch size, or computed from it."""
    if node.target is not torch.ops.aten.sym_size.int:
        return not found.isdisjoint(node.all_input_nodes)
    tensor, axis = node.all_input_nodes[0], int(argument(node, "dim"))
    if tensor not in found:
        return False
    shape = shape_of(tensor) or (batch,)
    if shape[0] == batch:  # else time is first, and the batch is elsewhere
        return axis in (0, -len(shape))
    return shape[axis] == batch


def _is_one_for_all(node: Node, batch: int) -> bool:
    """Whether an op takes one sample out of the batch, or leaves no place for one."""
    shape = shape_of(node)
    if node.target is torch.ops.aten.select.int and len(node.args) > 1:  # a file may not say which
        given = shape_of(node.all_input_nodes[0]) or (0,)
        if node.args[1] in (0, -len(given)) and given[0] == batch:
            return True
    return shape is not None and prod(shape) % batch != 0
