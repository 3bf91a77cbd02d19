"""Absorbing: clamps in front of a rounding become limits of its codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from cgmq_fx.passes.codes import is_quantize
from cgmq_fx.passes.infra import Pass, PassResult
from cgmq_fx.passes.optable import argument
from cgmq_fx.passes.state import tensor_at

_ATEN = torch.ops.aten
Ends: TypeAlias = tuple[float | None, float | None]

_CLAMPS: dict[object, Callable[[Node], Ends]] = {
    _ATEN.relu.default: lambda node: (0.0, None),
    _ATEN.relu6.default: lambda node: (0.0, 6.0),
    _ATEN.hardtanh.default: lambda node: (argument(node, "min_val"), argument(node, "max_val")),
    _ATEN.clamp.default: lambda node: (argument(node, "min"), argument(node, "max")),
    _ATEN.clamp_min.default: lambda node: (argument(node, "min"), None),
    _ATEN.clamp_max.default: lambda node: (None, argument(node, "max")),
}


def _ends(node: Node) -> Ends | None:
    """Between what numbers a node clamps its argument, or None if it is no clamp."""
    clamp = _CLAMPS.get(node.target) if node.op == "call_function" else None
    found = clamp(node) if clamp else None
    return None if found is None or any(isinstance(end, Node) for end in found) else found


def _limits(step: Tensor, ends: Ends, low: list[int], high: list[int]) -> tuple[list[int], ...]:
    """The limits of codes when values are clamped as well."""
    rows = ends[0], ends[1]
    codes = [None if end is None else (end / step).round().reshape(-1).tolist() for end in rows]
    count = max(len(low), step.numel())
    lows, highs = (list(v) * (count // len(v)) for v in (low, high))
    if codes[0] is not None:
        lows = [int(max(a, b)) for a, b in zip(lows, codes[0], strict=True)]
    if codes[1] is not None:
        highs = [int(min(a, b)) for a, b in zip(highs, codes[1], strict=True)]
    return lows, highs


def _absorb(module: GraphModule, clamp: Node, ends: Ends) -> bool:
    """Move a clamp into the quantize nodes that are all that read it."""
    absorbed = []
    for user in clamp.users:
        step = tensor_at(module, user.args[1].target) if is_quantize(user) else None  # type: ignore[union-attr]
        if step is None:
            return False
        lows, highs = _limits(step, ends, user.args[3], user.args[4])  # type: ignore[arg-type]
        if any(a > b for a, b in zip(lows, highs, strict=True)):
            return False
        absorbed.append((user, lows, highs))
    for user, lows, highs in absorbed:
        user.args = (clamp.args[0], *user.args[1:3], lows, highs, *user.args[5:])
    return bool(absorbed)


@dataclass(frozen=True)
class AbsorbClamps(Pass):
    """Turn clamps of values that are only rounded into limits of the codes.

    Before: a lowered graph. After: no ReLU or other clamp stands between an op and the rounding of
    its result, where runtimes would keep it as an op of its own. Rounding is monotone, so rounding
    a clamped value is clamping the rounded value: exact.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Absorb every clamp that only quantize nodes read."""
        modified = False
        for node in reversed(list(module.graph.nodes)):
            ends = _ends(node)
            if ends is not None and _absorb(module, node, ends):
                module.graph.erase_node(node)
                modified = True
        return PassResult(module, modified)
