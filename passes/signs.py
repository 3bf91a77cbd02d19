"""Which values are never negative, proved from the graph."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch.fx import Node

from cgmq_fx.passes.aliases import last_write
from cgmq_fx.passes.oplists import (
    NON_NEGATIVE,
    NON_NEGATIVE_IF_ALL,
    NON_NEGATIVE_IF_ANY,
    NON_NEGATIVE_IF_INPUTS,
)
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
        enough = any if current.target in NON_NEGATIVE_IF_ANY else all
        proved = _own_sign(current) or (bool(parents) and enough(seen[p] for p in parents or ()))
        seen[current] = proved and last_write(current) is None  # else it may be overwritten
    return seen[node]


def _own_sign(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target in NON_NEGATIVE:
        return True
    name = getattr(node.target, "_opname", "")
    if name in ("hardtanh", "clamp", "clamp_min", "clamp_max"):
        ends = ("min_val", "max_val") if name == "hardtanh" else ("min", "max")
        low, high = (argument(node, end) for end in ends)
        numbers = isinstance(low, int | float) and isinstance(high, int | float | None)
        return numbers and low >= 0 and (high is None or high >= 0)
    if name in ("full", "full_like", "new_full"):
        value = argument(node, "fill_value")
        return isinstance(value, int | float) and value >= 0
    return name == "pow" and argument(node, "exponent") in (2, 2.0, 4, 4.0)


def _inherits_sign(node: Node) -> Sequence[Node] | None:
    """The nodes that this one is non-negative with, if all of them are, or one where one suffices.

    None if they prove nothing.
    """
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return node.all_input_nodes
    if node.target not in NON_NEGATIVE_IF_INPUTS or _has_negative_number(node):
        return None
    several = node.target in NON_NEGATIVE_IF_ALL or node.target in NON_NEGATIVE_IF_ANY
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
