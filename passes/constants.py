"""Weights that are computed from parameters or numbers alone: weight norm, masks, averaging."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from cgmq_fx.passes.aliases import aliases, writes
from cgmq_fx.passes.infra import Pass, PassResult
from cgmq_fx.passes.oplists import GRID_PRESERVING, LOOKUPS
from cgmq_fx.passes.optable import argument, compute_op, is_view
from cgmq_fx.passes.state import (
    drop_unused_state,
    is_float,
    reachable_from_inputs,
    set_tensor,
    tensor_at,
)

_OWNED = re.compile(r"parametrizations\.([^.]+)\..*$|(weight|bias)_(orig|mask|g|v|u)$")
"""What PyTorch calls the parts that it computes a parameter from."""


@dataclass(frozen=True)
class FoldWeights(Pass):
    """Compute weights once.

    Before: a graph with shapes. After: what a layer multiplies by, adds or looks up, be it through
    views, is a parameter where it depends on parameters and buffers alone, and a buffer where it is
    made of buffers and numbers alone; so is what takes multiplications of parameters to compute.
    That is what is deployed: no runtime computes a weight anew for every sample, and no cost counts
    that it does. Views of parameters (tied weights, transposed) stay.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Replace every such tensor by its value."""
        graph, live = module.graph, reachable_from_inputs(module.graph)
        found = False
        for node in [n for n in graph.nodes if n not in live and _is_wanted(n, live)]:
            region = _region(node)
            if live.isdisjoint(region) and _is_computed(module, node, region):
                _fold(module, node, region)
                found = True
        if found:
            graph.eliminate_dead_code()
            drop_unused_state(module)
        return PassResult(module, modified=found)


def _is_wanted(node: Node, live: set[Node]) -> bool:
    """Whether it is the last that does not depend on inputs, or a weight that is not viewed."""
    return any(u in live for u in node.users) or (not is_view(node) and _is_weight(node))


def _is_weight(node: Node) -> bool:
    """Whether a layer multiplies by a tensor, adds it or looks it up, as it is or viewed."""
    return any(
        compute_op(user) is not None
        or (user.target in LOOKUPS and argument(user, "weight") is node)
        or (is_view(user) and user.args[0] is node and _is_weight(user))
        for user in node.users
    )


def _region(node: Node) -> set[Node]:
    """A node, all that it is computed from, and all that writes into the memory of these."""
    waiting, seen = [node], {node}
    while waiting:
        current = waiting.pop()
        writers = [n for n in aliases(current) if writes(n)]
        waiting += [n for n in (*current.all_input_nodes, *writers) if n not in seen]
        seen.update(waiting)
    return seen


def _is_computed(module: GraphModule, node: Node, region: set[Node]) -> bool:
    """Whether a constant is a weight, or multiplied from parameters, and has a value to take."""
    leaves = [tensor_at(module, n.target) for n in region if n.op == "get_attr"]
    calls = [n for n in region if n.op == "call_function"]
    if len(calls) + len(leaves) < len(region) or not isinstance(node.meta.get("val"), Tensor):
        return False
    if all(n.target in GRID_PRESERVING for n in calls) or not _is_pure(node, region):
        return False
    if not any(isinstance(leaf, nn.Parameter) for leaf in leaves):
        return is_float(node) and _is_weight(node)
    return _is_weight(node) or any(compute_op(n) is not None for n in calls)


def _is_pure(node: Node, region: set[Node]) -> bool:
    """Whether a node gives the same whenever it is run, and nobody else sees what is written."""
    if any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in region):
        return False
    written = {n for writer in filter(writes, region) for n in aliases(writer)}
    readers = {user for n in written for user in n.users} - region
    if any(n.op == "get_attr" for n in written) or readers - set(node.users):
        return False
    return not any(reader < writer for reader in readers for writer in filter(writes, region))


def _fold(module: GraphModule, node: Node, region: set[Node]) -> None:
    values: dict[Node, Any] = {}
    parameters = []
    ordered = [n for n in module.graph.nodes if n in region]
    with torch.no_grad():
        for own in ordered:
            if own.op == "get_attr":
                values[own] = tensor_at(module, own.target)
                parameters += [values[own]] if isinstance(values[own], nn.Parameter) else []
            else:
                args, kwargs = map_arg((own.args, own.kwargs), values.__getitem__)
                values[own] = own.target(*args, **kwargs)
    folded: Tensor = values[node].clone()
    if parameters:
        trained = any(parameter.requires_grad for parameter in parameters)
        folded = nn.Parameter(folded, trained and folded.is_floating_point())
    target = _name(module, node, ordered)
    set_tensor(module, target, folded)
    with module.graph.inserting_before(ordered[0]):
        new = module.graph.get_attr(target)
    new.meta.update(node.meta, val=folded)
    node.replace_all_uses_with(new)
    for own in reversed(ordered):
        if not own.users:
            module.graph.erase_node(own)


def _name(module: GraphModule, node: Node, region: list[Node]) -> str:
    """A name that is free, after the parameter of the user's that is computed, if there is one."""
    leaf = next((str(n.target) for n in region if n.op == "get_attr"), f"{node.name}_constant")
    target = _OWNED.sub(lambda match: match[1] or match[2], leaf)
    while tensor_at(module, target) is not None:
        target += "_folded"
    return target
