"""Average pools, written so that runtimes compute what they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from cgmq_fx.passes.infra import Pass, PassResult
from cgmq_fx.passes.optable import argument, set_argument

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


AVERAGES = frozenset({_ATEN.avg_pool1d.default, _ATEN.avg_pool2d.default, _ATEN.avg_pool3d.default})
"""Average pools with windows."""


def overhangs(node: Node) -> bool:
    """Whether an average pool may have windows that end outside of its input and its padding."""
    return node.target in AVERAGES and bool(argument(node, "ceil_mode"))


def is_padded(node: Node) -> bool:
    """Whether an average pool has padding."""
    padding = argument(node, "padding")
    return any(padding) if isinstance(padding, list | tuple) else padding != 0


@dataclass(frozen=True)
class PoolsWithoutPadding(Pass):
    """Let average pools that overhang say that no padding counts, where there is none.

    Before: a graph. After: such a pool divides by what of its window is in the input, as before.
    If padding counts, integer kernels of onnxruntime divide by the whole window (seen in 1.31).
    """

    def run(self, module: GraphModule) -> PassResult:
        """Change the argument."""
        found = [n for n in module.graph.nodes if overhangs(n) and not is_padded(n)]
        for node in found:
            set_argument(node, "count_include_pad", False)
        return PassResult(module, bool(found))
