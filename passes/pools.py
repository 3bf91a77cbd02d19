"""Pools over everything, written as the means that they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from cgmq_fx.passes.infra import Pass, PassResult
from cgmq_fx.passes.optable import argument

_ATEN = torch.ops.aten
_POOLS = {
    _ATEN.adaptive_avg_pool1d.default: 1,
    _ATEN.adaptive_avg_pool2d.default: 2,
    _ATEN.adaptive_avg_pool3d.default: 3,
}
"""Op -> the number of dimensions that it pools over."""


def _is_global(node: Node) -> bool:
    return node.target in _POOLS and set(argument(node, "output_size")) == {1}


@dataclass(frozen=True)
class PoolsAsMeans(Pass):
    """Write adaptive averages of output size 1 as means.

    Before: a graph. After: no such pool is left; values are equal to rounding. PyTorch writes out
    the pool of an image with channels last as a mean that is strided by hand, and the shape of that
    cannot be told from a file.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Replace every global pool."""
        found = [node for node in module.graph.nodes if _is_global(node)]
        for node in found:
            axes = list(range(-_POOLS[node.target], 0))
            node.args, node.kwargs = (node.args[0], axes, True), {}
            node.target = _ATEN.mean.dim
        return PassResult(module, bool(found))
