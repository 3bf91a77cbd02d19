"""Functionalise: what the model writes in place becomes values that later readers read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from cgmq_fx.passes.aliases import aliases, writes
from cgmq_fx.passes.infra import Pass, PassResult
from cgmq_fx.passes.oplists import overloads
from cgmq_fx.passes.state import value_of
from cgmq_fx.passes.views import (
    OF_SHAPE,
    Inverse,
    call_like,
    certain_path,
    inverse_of,
    is_certain_view,
    place_of,
    result_of,
    viewed,
)

_ATEN = torch.ops.aten
_FILLS = overloads("copy_ fill_ zero_")


def _functional_twin(node: Node) -> Any:
    """The out-of-place overload of an in-place op, or None."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._opname
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    for overload in () if packet is None else packet.overloads():
        twin = getattr(packet, overload)
        if _arguments(twin) == _arguments(target) and not twin._schema.is_mutable:
            return twin
    return None


def _arguments(overload: torch._ops.OpOverload) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in overload._schema.arguments]


def _copies_nothing(node: Node) -> bool:
    """Whether a tensor is copied to where it is, as in the last step of `x[:, 1] += 1`."""
    if node.target is not _ATEN.copy_.default or not all(isinstance(a, Node) for a in node.args):
        return False
    places = [place_of(a) for a in node.args if isinstance(a, Node)]
    return places[0] is not None and len(places) == 2 and places[0] == places[1]


def _has_shape_of(first: Tensor, second: Tensor) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow

    return first.dim() == second.dim() and all(
        statically_known_true(a == b) for a, b in zip(first.shape, second.shape, strict=True)
    )


@dataclass(frozen=True)
class _Write:
    """An in-place op that can be expressed without one.

    Attributes:
        node: The op.
        path: What it writes into, what that is a view of, and so on, to the tensor from which on
            nobody else can see the write.
        inverses: How to get from each of the path to the next.
        readers: Whoever shares that memory, each with those that read it later.
    """

    node: Node
    path: tuple[Node, ...]
    inverses: tuple[Inverse, ...] = ()
    readers: dict[Node, list[Node]] = field(default_factory=dict)


def _planned(node: Node) -> _Write | None:
    """How a write can be expressed, or None."""
    written = node.args[0] if node.args else None
    if not writes(node) or not isinstance(written, Node):
        return None
    up = {a: certain_path(a) for a in aliases(written)}
    up = {a: path for a, path in up.items() if path[-1] is up[written][-1]}
    if any(a.op == "get_attr" for a in up[written]):
        return None
    late = {a: [u for u in a.users if node < u] for a in up if a < node}
    late = {a: users for a, users in late.items() if users}
    path, inverses = [written], []
    while any(path[-1] not in up[a] for a in late):
        inverse = inverse_of(path[-1]) if is_certain_view(path[-1]) else None
        if inverse is None:
            return None
        inverses.append(inverse)
        path.append(viewed(path[-1]))
    if inverses and path[-1].op == "placeholder":
        return None
    for alias in late:
        between = up[alias][: up[alias].index(path[-1])]
        if not all(map(is_certain_view, between)):
            return None
    if node.target in OF_SHAPE and (inverses or late.keys() - {written}):
        return None
    return _Write(node, tuple(path), tuple(inverses), late)


def _cast(graph: Graph, node: Node, value: Tensor, like: Node) -> Node:
    """A tensor with the dtype and on the device of another."""
    wanted = value_of(like)
    options: dict[str, Any] = {}
    if value.dtype != wanted.dtype:
        options["dtype"] = wanted.dtype
    if value.device != wanted.device:
        options["device"] = wanted.device
    if not options:
        return node
    made = call_like(graph, node, _ATEN._to_copy.default, node, **options)
    made.meta["val"] = value.to(**options)
    return made


def _filled(graph: Graph, write: _Write) -> Node | None:
    """What is written by an op that overwrites all, or None if its values are not known."""
    node, written = write.node, write.path[0]
    if node.target is _ATEN.zero_.default:
        return call_like(graph, node, _ATEN.zeros_like.default, written)
    if node.target is _ATEN.fill_.Scalar:
        return call_like(graph, node, _ATEN.full_like.default, written, node.args[1])
    source: Any = node.args[1]
    if not isinstance(source, Node) or not isinstance(value_of(source), Tensor):
        return None
    new = _cast(graph, source, value_of(source), written)
    if not _has_shape_of(value_of(source), value_of(written)):
        new = call_like(graph, node, _ATEN.expand_as.default, new, written)
    if not write.inverses:  # which would read the memory of what was copied
        new = call_like(graph, node, _ATEN.clone.default, new)
    return new


def _computed(graph: Graph, write: _Write, twin: Any) -> Node | None:
    """What is written by an op that has a twin, which takes its place."""
    node, written = write.node, write.path[0]
    value = None if node.target in OF_SHAPE else result_of(node, twin)
    if value is not None and not _has_shape_of(value, value_of(written)):
        return None
    if value is None and write.inverses:
        return None
    node.target = twin
    if value is None or value.dtype == value_of(written).dtype:
        return node
    own, node.meta["val"] = value_of(node), value
    made = _cast(graph, node, value, written)
    made.meta["val"] = own
    return made


def _express(graph: Graph, write: _Write) -> bool:
    """Replace an in-place op; False if its values cannot be told."""
    node = write.node
    twin = None if node.target in _FILLS else _functional_twin(node)
    if twin is None and node.target not in _FILLS:
        return False
    if not isinstance(value_of(write.path[0]), Tensor) and (write.inverses or twin is None):
        return False
    users = list(node.users)
    with graph.inserting_before(node.next):
        new = _filled(graph, write) if twin is None else _computed(graph, write, twin)
        if new is None:
            return False
        renewed = {write.path[-1]: new}
        for inverse in write.inverses:
            renewed[write.path[-1]] = inverse(graph, renewed[write.path[-1]])
        for alias, readers in write.readers.items():
            for reader in readers:
                reader.replace_input_with(alias, _renewed(graph, alias, renewed))
        for user in users:
            user.replace_input_with(node, _renewed(graph, write.path[0], renewed))
    if new is not node and twin is None:
        graph.erase_node(node)
    return True


def _renewed(graph: Graph, alias: Node, renewed: dict[Node, Node]) -> Node:
    """A view of what its tensor has become."""
    missing = []
    while alias not in renewed:
        missing.append(alias)
        alias = alias.args[0]  # type: ignore[assignment]  # what is viewed
    for view in reversed(missing):
        source = renewed[alias]
        if writes(view):
            renewed[view] = source
        else:
            renewed[view] = call_like(
                graph, view, view.target, source, *view.args[1:], **view.kwargs
            )
        alias = view
    return renewed[missing[0]] if missing else renewed[alias]


def functionalise(graph: Graph, nodes: Iterable[Node]) -> bool:
    """Express those of the nodes that write in place without that, where it can be done."""
    modified = False
    for node in nodes:
        if _copies_nothing(node):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]  # a node
            graph.erase_node(node)
            modified = True
            continue
        write = _planned(node)
        modified |= write is not None and _express(graph, write)
    return modified


@dataclass(frozen=True)
class Functionalise(Pass):
    """Replace what is written in place by values: into tensors, into slices and other views.

    A part that is written is `slice_scatter` and its like of the whole, and what shares its memory
    is viewed again behind that.

    Before: a captured graph. After: neither an input nor an activation is overwritten where that
    could be avoided, and what was written is what later readers read; buffers that the model
    updates are left alone.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Edit every in-place node whose write can be expressed."""
        return PassResult(module, functionalise(module.graph, list(module.graph.nodes)))
