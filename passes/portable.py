"""Graphs that can be pickled.

Torch pickles the source code of a graph and traces it again on loading. With the tracer of
torch.export that fails, and so it does with any other where a size is computed. Here the nodes
themselves are pickled: calls by name, and of what is known about a node what no pass finds again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from cgmq_fx.passes.infra import module_path
from cgmq_fx.passes.shapes import EXAMPLE

_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


@dataclass(frozen=True)
class _NodeName:
    """Stands for a node among arguments."""

    name: str


@dataclass(frozen=True)
class _Op:
    """Stands for an ATen op or a custom one; `name` is as in "aten.add.Tensor"."""

    name: str


@dataclass(frozen=True)
class _Spec:
    """Stands for a `TreeSpec`, which warns when torch unpickles it; a leaf has no `kind`."""

    kind: Any = None
    context: Any = None
    children: tuple[_Spec, ...] = ()


class QuantizedGraph(GraphModule):
    """A `GraphModule` that pickles, and so do copies of it."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        codegen = self.graph._codegen
        info = codegen.pytree_info if isinstance(codegen, _PyTreeCodeGen) else None
        state = {name: vars(self)[name] for name in _STATE}
        rows = [_row(node) for node in self.graph.nodes]
        return _restored, (state, self.training, rows, info and _packed(info))


def portable(root: nn.Module, graph: Graph) -> QuantizedGraph:
    """A graph module that pickles, of the tensors and modules of `root`."""
    return QuantizedGraph(root, graph, class_name="QuantizedGraph")


def _row(node: Node) -> dict[str, Any]:
    target = node.target
    return {
        "op": node.op,
        "name": node.name,
        "target": _Op(str(target)) if isinstance(target, torch._ops.OpOverload) else target,
        "arguments": map_aggregate((node.args, node.kwargs), _without_node),
        "module": module_path(node),
        "place": node.meta.get("stack_trace"),
        "example": node.meta.get(EXAMPLE),
    }


def _without_node(value: Any) -> Any:
    return _NodeName(value.name) if isinstance(value, Node) else value


def _restored(
    state: Mapping[str, Any], training: bool, rows: list[dict[str, Any]], info: Any
) -> QuantizedGraph:
    root, graph = nn.Module(), Graph()
    vars(root).update(state)
    made: dict[str, Node] = {}
    for row in rows:
        args, kwargs = map_aggregate(
            row["arguments"], lambda v: made[v.name] if isinstance(v, _NodeName) else v
        )
        node = graph.create_node(row["op"], _target(row["target"]), args, kwargs, row["name"])
        node.meta["nn_module_stack"] = {"": (row["module"], "")}
        known = {"stack_trace": row["place"], EXAMPLE: row["example"]}
        node.meta.update({k: v for k, v in known.items() if v is not None})
        made[node.name] = node
    if info is not None:
        graph.set_codegen(_PyTreeCodeGen(_unpacked(*info)))
    module = portable(root, graph)
    vars(module).update(state, training=training)  # with modules that no node calls
    return module


def _target(target: Any) -> Any:
    if not isinstance(target, _Op):
        return target
    library, packet, overload = target.name.split(".")
    return getattr(getattr(getattr(torch.ops, library), packet), overload)


def _packed(info: _PyTreeInfo) -> tuple[list[str], _Spec, _Spec | None]:
    returned = None if info.out_spec is None else _packed_spec(info.out_spec)
    return info.orig_args, _packed_spec(info.in_spec), returned


def _unpacked(names: list[str], taken: _Spec, returned: _Spec | None) -> _PyTreeInfo:
    given = None if returned is None else _unpacked_spec(returned)
    return _PyTreeInfo(names, _unpacked_spec(taken), given)


def _packed_spec(spec: pytree.TreeSpec) -> _Spec:
    if spec.is_leaf():
        return _Spec()
    return _Spec(spec.type, spec.context, tuple(map(_packed_spec, spec.children())))


def _unpacked_spec(spec: _Spec) -> pytree.TreeSpec:
    if spec.kind is None:
        return pytree.tree_structure(0)
    return pytree.TreeSpec(spec.kind, spec.context, list(map(_unpacked_spec, spec.children)))
