"""Composite ops that multiply inside, written out as the products that they are.

Recurrent layers become their cells, unrolled over the time steps of the example inputs; `einsum`,
`bilinear`, `tensordot` and their like become matrix products. Each op's own decomposition in torch,
or the one of `products`, is traced and put in its place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from cgmq_fx.passes.infra import Pass, PassResult
from cgmq_fx.passes.optable import argument
from cgmq_fx.passes.products import WRITTEN_OUT
from cgmq_fx.passes.state import tensor_at, value_of

_ATEN = torch.ops.aten
COMPOSITE = frozenset(
    {
        _ATEN.lstm.input,
        _ATEN.gru.input,
        _ATEN.rnn_tanh.input,
        _ATEN.rnn_relu.input,
        _ATEN.lstm_cell.default,
        _ATEN.gru_cell.default,
        _ATEN.rnn_tanh_cell.default,
        _ATEN.rnn_relu_cell.default,
        _ATEN.einsum.default,
        _ATEN.tensordot.default,
        _ATEN.linalg_multi_dot.default,
        _ATEN.chain_matmul.default,
        _ATEN.matrix_power.default,
        _ATEN.linalg_matrix_power.default,
        *WRITTEN_OUT,
    }
)


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    """Like `torch.backends.mkldnn.flags`, which warns of TF32 because it sets that flag too."""
    set_flags: Any = torch.backends.mkldnn.set_flags
    enabled, *_ = set_flags(_enabled=False, _fp32_precision=None)
    try:
        yield
    finally:
        set_flags(_enabled=enabled, _fp32_precision=None)


def _layer_by_layer(decomposition: Callable[..., Any]) -> Callable[..., Any]:
    """A recurrent stack with the dropout between its layers, off, where `SwitchModes` finds it.

    Torch's decomposition of a whole stack has no dropout in evaluation mode, nor in training mode.
    """

    def run(
        x: Tensor,
        states: Any,
        parameters: Sequence[Tensor],
        biases: bool,
        layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Any, ...]:
        per_layer, directions = len(parameters) // layers, 2 if bidirectional else 1
        last = []
        for layer in range(layers):
            rows = slice(layer * directions, (layer + 1) * directions)
            own = states[rows] if isinstance(states, Tensor) else [state[rows] for state in states]
            weights = parameters[layer * per_layer : (layer + 1) * per_layer]
            x, *ends = decomposition(
                x, own, weights, biases, 1, 0.0, False, bidirectional, batch_first
            )
            last.append(ends)
            if layer < layers - 1:
                x = torch.dropout(x, dropout, train)
        return (x, *(torch.cat(states) for states in zip(*last, strict=True)))

    return run


def _traced(node: Node) -> tuple[GraphModule, list[Node]]:
    """The decomposition of a node as a graph of its tensors, and the nodes that give them."""
    leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Node)]
    target: Any = node.target
    in_python = target in decomposition_table or target in WRITTEN_OUT
    function: Callable[..., Any] = target.decompose
    if in_python:
        function = WRITTEN_OUT.get(target) or decomposition_table[target]
    if argument(node, "dropout", 0.0) and not argument(node, "train", True):
        function = _layer_by_layer(function)
    values = [value_of(leaf) if isinstance(leaf, Node) else leaf for leaf in leaves]

    def call(*tensors: Any) -> Any:
        filled = list(values)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return function(*args, **kwargs)

    # Without mkldnn, recurrent layers are not fused again; the dispatcher keeps sizes symbolic.
    with torch.no_grad(), _without_mkldnn(), enable_python_dispatcher():
        graph = make_fx(call, pre_dispatch=in_python)(*[values[i] for i in places])
    return graph, [leaves[i] for i in places]


def _splice(module: GraphModule, node: Node) -> None:
    """Put the decomposition of `node` in its place."""
    traced, sources = _traced(node)
    inputs = [n for n in traced.graph.nodes if n.op == "placeholder"]
    known: dict[Node, Any] = dict(zip(inputs, sources, strict=True))
    kept = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    with module.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "get_attr":
                known[inner] = _constant(module, node, tensor_at(traced, inner.target))
            elif inner.op not in ("placeholder", "output"):
                known[inner] = module.graph.node_copy(inner, lambda n: known[n])
                known[inner].meta = {"val": value_of(inner), **kept}
    output = next(n for n in traced.graph.nodes if n.op == "output").args[0]
    _replace(node, pytree.tree_map(lambda n: known.get(n, n), output))
    module.graph.erase_node(node)


def _constant(module: GraphModule, node: Node, tensor: Tensor | None) -> Node:
    """A constant of the decomposition, as a buffer of the module."""
    name = f"{node.name}_constant"
    while hasattr(module, name):
        name += "_"
    module.register_buffer(name, tensor)
    constant = module.graph.get_attr(name)
    constant.meta["val"] = tensor
    return constant


def _replace(node: Node, output: Any) -> None:
    """Let the readers of `node` read what its decomposition returns."""
    if isinstance(output, Node):
        node.replace_all_uses_with(output)
        return
    flat = pytree.tree_leaves(output)
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(flat[cast(int, user.args[1])])
            user.graph.erase_node(user)


@dataclass(frozen=True)
class DecomposeComposite(Pass):
    """Write out recurrent layers, `einsum`, `bilinear` and their like as matrix products.

    Before: a captured graph with the values that torch.export recorded. After: none of these ops is
    left; the values are equal to rounding. The number of time steps is that of the example inputs.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Replace every composite op."""
        found = [n for n in module.graph.nodes if n.target in COMPOSITE]
        for node in found:
            _splice(module, node)
        return PassResult(module, bool(found))
