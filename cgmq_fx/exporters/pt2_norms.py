"""Batch norm of an exported program as the one op that it was.

A program has it as an op of three results, of which one counts. Liveness would take that for a
tensor beside what is normalised, and a file would need more memory than the graph that it was
written from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

_ATEN = torch.ops.aten


def _with_statistics(inputs: Any, weight: Any, bias: Any, mean: Any, variance: Any, *n: Any) -> Any:
    return (inputs, weight, bias, mean, variance, False, *n, False)


def _of_the_batch(inputs: Any, weight: Any, bias: Any, *numbers: Any) -> Any:
    return (inputs, weight, bias, None, None, *numbers, False)


_NORMS: dict[Any, Any] = {
    _ATEN._native_batch_norm_legit_no_training.default: _with_statistics,
    _ATEN._native_batch_norm_legit.no_stats: _of_the_batch,
}
"""The ops that batch norm becomes, and the arguments of `aten.batch_norm` from theirs."""


def compose_norms(module: GraphModule) -> None:
    """Replace them where nothing but the normalised tensor is read."""
    for node in list(module.graph.nodes):
        parts = list(node.users) if node.target in _NORMS else []
        if not parts or any(part.args[1] != 0 and part.users for part in parts):
            continue
        with module.graph.inserting_after(node):
            arguments = _NORMS[node.target](*node.args)
            whole = module.graph.call_function(_ATEN.batch_norm.default, arguments)
        for part in parts:
            part.replace_all_uses_with(whole)
            module.graph.erase_node(part)
        module.graph.erase_node(node)
    module.recompile()
