"""Complex products: four real ones, so that they are quantized and counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from cgmq_fx.passes.infra import Pass, PassResult
from cgmq_fx.passes.optable import ComputeOp, Layout, argument, compute_op, set_argument
from cgmq_fx.passes.state import value_of

_ATEN = torch.ops.aten


def _is_complex(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.is_complex()


def _splits(node: Node) -> ComputeOp | None:
    """The row of a product of two complex tensors without a bias, else None."""
    op = compute_op(node)
    if op is None or op.layout not in (Layout.PRODUCT, Layout.LINEAR):
        return None
    if op.bias and argument(node, op.bias) is not None:
        return None
    factors = (argument(node, op.activation), argument(node, op.weight))
    return op if all(isinstance(f, Node) and _is_complex(f) for f in factors) else None


def _write(graph: Graph, node: Node, op: ComputeOp) -> Node:
    """`(a + bi)(c + di) = (ac - bd) + (ad + bc)i`."""
    kept = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}

    def call(target: Any, *args: Any) -> Node:
        made = graph.call_function(target, args)
        made.meta = dict(kept)
        return made

    def product(first: Node, second: Node) -> Node:
        made = graph.node_copy(node)
        made.meta = dict(kept)
        set_argument(made, op.activation, first)
        set_argument(made, op.weight, second)
        return made

    first, second = argument(node, op.activation), argument(node, op.weight)
    a, b = call(_ATEN.real.default, first), call(_ATEN.imag.default, first)
    c, d = call(_ATEN.real.default, second), call(_ATEN.imag.default, second)
    real = call(_ATEN.sub.Tensor, product(a, c), product(b, d))
    imaginary = call(_ATEN.add.Tensor, product(a, d), product(b, c))
    return call(_ATEN.complex.default, real, imaginary)


@dataclass(frozen=True)
class DecomposeComplex(Pass):
    """Write products of complex tensors as four products of real ones.

    Before: a graph with shapes, without composite ops. After: no such product is left, but those
    that add a bias in the same op; the values are equal to rounding. One complex multiplication is
    then counted as the four real ones that it is.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Replace every complex product."""
        modified = False
        for node in list(module.graph.nodes):
            op = _splits(node)
            if op is not None:
                with module.graph.inserting_before(node):
                    node.replace_all_uses_with(_write(module.graph, node, op))
                module.graph.erase_node(node)
                modified = True
        return PassResult(module, modified)
