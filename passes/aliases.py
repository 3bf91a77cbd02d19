"""Memory that nodes share: who sees what an in-place op writes."""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Node


def may_alias(node: Node) -> bool:
    """Whether a node's output can share memory with its first argument."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return isinstance(node.args[0], Node) and may_alias(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    declared = any(r.alias_info is not None for r in node.target._schema.returns)
    return declared or node.target._opname.endswith("dropout")  # which passes its input in eval


def aliases(node: Node) -> set[Node]:
    """All nodes whose output can share memory with that of `node`, itself included."""
    root = memory_path(node)[-1]
    found, stack = {root}, [root]
    while stack:
        parent = stack.pop()
        views = [u for u in parent.users if may_alias(u) and parent in u.args[:1]]
        stack.extend(v for v in views if v not in found)
        found.update(views)
    return found


def memory_path(node: Node) -> list[Node]:
    """`node`, what it is a view of, and so on to the node that made the memory."""
    path = [node]
    while may_alias(node) and isinstance(node.args[0], Node):
        node = node.args[0]
        path.append(node)
    return path


def writes(node: Node) -> bool:
    """Whether a node writes into its first argument."""
    return node.op == "call_function" and _writes_first(node.target)


@lru_cache(maxsize=4096)
def _writes_first(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    info = target._schema.arguments[0].alias_info if target._schema.arguments else None
    return info is not None and info.is_write


def last_write(node: Node) -> Node | None:
    """The last in-place op on the memory of `node` after it (or `node` itself), or None."""
    writers = [n for n in node.graph.nodes if writes(n)]
    memory = memory_path(node)[-1] if writers else None
    found = [n for n in writers if not n < node and memory_path(n)[-1] is memory]
    return max(found, default=None)
