"""Small tools over a graph's nodes and the tensors that they read from the module."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import SymInt, Tensor, nn
from torch.fx import Graph, GraphModule, Node

from cgmq_fx.cost_models.facts import FLOAT_BITS
from cgmq_fx.passes.aliases import last_write
from cgmq_fx.passes.oplists import FILLS
from cgmq_fx.passes.optable import argument, is_view, preserves_grid
from cgmq_fx.passes.quantizer import Quantizer


def tensor_at(module: nn.Module, target: Any) -> Tensor | None:
    """The parameter or buffer that a `get_attr` node names, or None if it names no tensor."""
    owner, _, name = str(target).rpartition(".")
    value = getattr(module.get_submodule(owner), name, None)
    return value if isinstance(value, Tensor) else None


def is_parameter(module: nn.Module, node: Node) -> bool:
    """Whether a node reads a parameter."""
    return node.op == "get_attr" and isinstance(tensor_at(module, node.target), nn.Parameter)


def set_tensor(module: nn.Module, target: str, tensor: Tensor) -> None:
    """Replace or add a tensor under a dotted name, as a parameter if `tensor` is one."""
    owner_name, _, name = target.rpartition(".")
    owner = module.get_submodule(owner_name)
    if name in owner._buffers:
        owner._buffers[name] = tensor
    elif isinstance(tensor, nn.Parameter) or isinstance(getattr(owner, name, None), nn.Parameter):
        owner.register_parameter(name, nn.Parameter(tensor.data, tensor.requires_grad))
    else:
        owner.register_buffer(name, tensor)


def drop_unused_state(module: GraphModule) -> bool:
    """Delete parameters and buffers that no node reads; True if there were any."""
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    called = tuple(f"{n.target}." for n in module.graph.nodes if n.op == "call_module")
    changed = False
    for table in ("_parameters", "_buffers"):
        for path, owner in list(module.named_modules()):
            for name in list(getattr(owner, table)):
                full = f"{path}.{name}" if path else name
                if full not in used and not full.startswith(called):
                    del getattr(owner, table)[name]
                    changed = True
    return changed


def bits_of(tensor: Tensor) -> int:
    """Bits per element where no quantizer sets them.

    Real numbers count as 32 bits whatever their precision: that is what a quantizer at its highest
    passes, and what is deployed.
    """
    return FLOAT_BITS if tensor.is_floating_point() else tensor.element_size() * 8


def value_of(node: Node) -> Any:
    """What shape propagation recorded for a node: a fake tensor, a number, a tuple."""
    return node.meta.get("val")


def shape_of(node: Node) -> tuple[int, ...] | None:
    """The shape of a node's output with the example batch, or None if it is no tensor."""
    value = value_of(node)
    return tuple(int(s) for s in value.shape) if isinstance(value, Tensor) else None


def is_float(node: Node) -> bool:
    """Whether a node's output is a real floating-point tensor."""
    value = value_of(node)
    return isinstance(value, Tensor) and value.is_floating_point()


def reachable_from_inputs(graph: Graph) -> set[Node]:
    """The nodes whose value or size depends on the model's input."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(parent in found for parent in node.all_input_nodes):
            found.add(node)
    return found


def computed_from_inputs(graph: Graph) -> set[Node]:
    """The nodes whose values follow from those of the model's input, not only from their sizes."""
    found: set[Node] = set()
    for node in graph.nodes:
        made = node.target in FILLS or isinstance(value_of(node), int | SymInt)
        if node.op == "placeholder" or not (made or found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def view_root(node: Node) -> Node:
    """The node whose tensor `node` is a view of, itself if it is no view, or written in place."""
    while is_view(node) and isinstance(node.args[0], Node) and last_write(node) is None:
        node = node.args[0]
    return node


def sources(node: Node) -> Iterator[Node]:
    """`node` and what it takes its values from, as long as a grid passes unchanged."""
    yield node
    while isinstance(parent := _same_grid(node), Node):
        yield parent
        node = parent


def _same_grid(node: Node) -> Any:
    if preserves_grid(node):
        return None if last_write(node) else node.args[0]
    return node.args[0] if node.op == "call_function" and node.target is operator.getitem else None


def quantizer_of(module: GraphModule, node: Node) -> tuple[str, Quantizer] | None:
    """The quantizer whose grid the values of `node` are on, with its name, or None."""
    for source in sources(node):
        if source.op == "call_module":
            found = module.get_submodule(str(source.target))
            return (quantizer_name(source), found) if isinstance(found, Quantizer) else None
    return None


def quantizer_name(node: Node) -> str:
    """The name of the quantizer that a `call_module` node calls: the last part of its path."""
    return str(node.target).rpartition(".")[2]


def groups_of(node: Node) -> int:
    """The groups of a convolution (for the example batch, if they vary), else 1."""
    groups = argument(node, "groups", 1)
    return int(value_of(groups) if isinstance(groups, Node) else groups)
