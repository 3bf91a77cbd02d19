"""Which outputs of a network integer kernels make, once they are rounded."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch.fx import Graph, GraphModule, Node

from cgmq_fx.passes.aliases import last_write
from cgmq_fx.passes.oplists import BINARY, INTEGER, JOINS, MOVES, overloads
from cgmq_fx.passes.optable import argument, compute_op
from cgmq_fx.passes.state import is_float, quantizer_of, reachable_from_inputs, view_root

_CASTS = overloads("to _to_copy")
_PASSING = (INTEGER - JOINS - BINARY) | _CASTS | {operator.getitem}
"""Ops of one tensor that integer kernels execute, or that follow behind them."""


def integer_outputs(module: GraphModule) -> list[Node]:
    """What the network returns, before views and casts, that integer kernels can make.

    A runtime executes an op in integers if its operands are codes and its result is rounded. What
    it computes in float (activation functions, arithmetic with constants, joins of numbers) gains
    nothing from that, and would only lose accuracy. Of a join, the parts are listed: each has a
    scale of its own (coordinates beside probabilities, say), which one grid would not serve.

    Args:
        module: A graph with shapes, with quantizers on the factors of its layers.
    """
    live, integer = reachable_from_inputs(module.graph), _in_integers(module)
    parts = (n for n in _parts(module.graph) if n in live and n in integer and is_float(n))
    return list(dict.fromkeys(map(_root, parts)))


def _in_integers(module: GraphModule) -> set[Node]:
    """What is on a grid, the products of that, and what integer kernels make of either."""
    found: set[Node] = set()
    for node in module.graph.nodes:
        if _is_integer(module, node, found) and last_write(node) is None:
            found.add(node)
    return found


def _is_integer(module: GraphModule, node: Node, found: set[Node]) -> bool:
    """Whether integer kernels make a node of what they were found to make."""
    op = compute_op(node)
    if op is not None:
        factors = (argument(node, name) for name in (op.activation, op.weight))
        return all(quantizer_of(module, factor) for factor in factors)
    if node.op == "call_module":
        return quantizer_of(module, node) is not None
    if node.target in BINARY:
        return found.issuperset(node.args[:2])
    return node.target in _PASSING and node.args[0] in found


def _parts(graph: Graph) -> Iterator[Node]:
    """What is returned; of a join, and of what is moved or picked from one, what is joined."""
    waiting = graph.output_node().all_input_nodes
    seen = set(waiting)
    while waiting:
        node = waiting.pop(0)
        source = node
        while isinstance(parent := _moved(source), Node):
            source = parent
        if source.target not in JOINS or last_write(source) is not None:
            yield node
            continue
        waiting += [n for n in source.all_input_nodes if n not in seen]
        seen.update(waiting)


def _moved(node: Node) -> object:
    """What a node only gives another place, shape or precision, or None."""
    moves = node.target in MOVES | _CASTS or node.target is operator.getitem
    return node.args[0] if moves and last_write(node) is None else None


def _root(node: Node) -> Node:
    """What is viewed or cast."""
    while (root := view_root(node)).target in _CASTS and isinstance(root.args[0], Node):
        node = root.args[0]
    return root
