"""Weights that are computed from parameters alone: weight norm, masks, products of factors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from cgmq_fx.passes.aliases import aliases, writes
from cgmq_fx.passes.infra import Pass, PassResult
from cgmq_fx.passes.oplists import GRID_PRESERVING
from cgmq_fx.passes.optable import compute_op
from cgmq_fx.passes.state import drop_unused_state, reachable_from_inputs, set_tensor, tensor_at

_OWNED = re.compile(r"parametrizations\.([^.]+)\..*$|(weight|bias)_(orig|mask|g|v|u)$")
"""What PyTorch calls the parts that it computes a parameter from."""


@dataclass(frozen=True)
class FoldWeights(Pass):
    """Compute weights once.

    Before: a graph with shapes. After: what a layer multiplies by, or adds, and what takes
    multiplications of parameters to compute, is a parameter where it depends on parameters and
    buffers alone. That is what is deployed: no runtime computes a weight anew for every sample, and
    no cost counts that it does. Views of parameters (tied weights, transposed) stay.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Replace every such tensor by its value."""
        graph, live = module.graph, reachable_from_inputs(module.graph)
        found = False
        for node in [n for n in graph.nodes if n not in live and any(u in live for u in n.users)]:
            region = set(_region(node))
            if _is_computed(module, node, region):
                _fold(module, node, region)
                found = True
        if found:
            graph.eliminate_dead_code()
            drop_unused_state(module)
        return PassResult(module, modified=found)


def _region(node: Node) -> Iterator[Node]:
    """A node and all that it is computed from."""
    waiting, seen = [node], {node}
    while waiting:
        yield (current := waiting.pop())
        waiting += [n for n in current.all_input_nodes if n not in seen]
        seen.update(waiting)


def _is_computed(module: GraphModule, node: Node, region: set[Node]) -> bool:
    """Whether a constant is a weight, or multiplied from parameters, and has a value to take."""
    leaves = [tensor_at(module, n.target) for n in region if n.op == "get_attr"]
    if not any(isinstance(leaf, nn.Parameter) for leaf in leaves):
        return False
    calls = [n for n in region if n.op == "call_function"]
    if len(calls) + len(leaves) < len(region) or not isinstance(node.meta.get("val"), Tensor):
        return False
    if all(n.target in GRID_PRESERVING for n in calls) or not all(map(_is_pure, region)):
        return False
    products = any(compute_op(n) is not None for n in calls)
    return products or any(compute_op(user) is not None for user in node.users)


def _is_pure(node: Node) -> bool:
    """Whether a node gives the same whenever it is run, and nobody writes into what it gives."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        return False
    return not any(map(writes, aliases(node)))


def _fold(module: GraphModule, node: Node, region: set[Node]) -> None:
    values: dict[Node, Any] = {}
    trained = False
    with torch.no_grad():
        for own in (n for n in module.graph.nodes if n in region):
            if own.op == "get_attr":
                values[own] = tensor_at(module, own.target)
                trained |= values[own].requires_grad
            else:
                args, kwargs = map_arg((own.args, own.kwargs), values.__getitem__)
                values[own] = own.target(*args, **kwargs)
    folded = nn.Parameter(values[node].clone(), trained and values[node].is_floating_point())
    target = _name(module, next(n for n in module.graph.nodes if n in region))
    set_tensor(module, target, folded)
    with module.graph.inserting_before(next(n for n in module.graph.nodes if n in region)):
        new = module.graph.get_attr(target)
    new.meta.update(node.meta, val=folded)
    node.replace_all_uses_with(new)


def _name(module: GraphModule, leaf: Node) -> str:
    """A name that is free, after the parameter of the user's that is computed."""
    target = _OWNED.sub(lambda match: match[1] or match[2], str(leaf.target))
    while tensor_at(module, target) is not None:
        target += "_folded"
    return target
