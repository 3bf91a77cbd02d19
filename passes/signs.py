"""Which values are never negative, proved from the graph."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch.fx import Node

from cgmq_fx.passes.oplists import NON_NEGATIVE, NON_NEGATIVE_IF_INPUTS
from cgmq_fx.passes.optable import argument


def non_negative(node: Node) -> bool:
    """Whether the node's output is proved never to be negative."""
    seen: dict[Node, bool] = {}
    stack = [node]
    while stack:  # post-order without recursion: graphs are deeper than Python's stack
        current = stack[-1]
        parents = _inherits_sign(current)
        open_parents = [p for p in parents or () if p not in seen]
        if open_parents and current not in seen:
            stack.extend(open_parents)
            continue
        stack.pop()
        seen[current] = _own_sign(current) or (
            bool(parents) and all(seen[p] for p in parents or ())
        )
    return seen[node]


def _own_sign(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target in NON_NEGATIVE:
        return True
    name = getattr(node.target, "_opname", "")
    if name in ("hardtanh", "clamp", "clamp_min", "clamp_max"):
        low = argument(node, "min_val") if name == "hardtanh" else argument(node, "min")
        return name != "clamp_max" and isinstance(low, int | float) and low >= 0
    return name == "pow" and argument(node, "exponent") in (2, 2.0, 4, 4.0)


def _inherits_sign(node: Node) -> Sequence[Node] | None:
    """The nodes that must all be non-negative for this one to be; None if that proves nothing."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return node.all_input_nodes
    if node.target not in NON_NEGATIVE_IF_INPUTS or _has_negative_number(node):
        return None
    name = getattr(node.target, "_opname", "")
    several = name in ("add", "mul", "div", "cat", "stack", "maximum")
    return node.all_input_nodes if several else node.all_input_nodes[:1]


def _has_negative_number(node: Node) -> bool:
    """Whether a number among the arguments can make the result negative."""
    numbers = [a for a in node.args[:2] if isinstance(a, int | float)]
    name = getattr(node.target, "_opname", "")
    if name in ("add", "mul", "div") and any(n < 0 for n in numbers):
        return True
    if name == "add" and argument(node, "alpha", 1) != 1:
        return True
    return name in ("constant_pad_nd", "pad") and argument(node, "value", 0) not in (0, 0.0, None)
