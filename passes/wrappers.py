"""Regions under a switch (autocast, no_grad), written out where the switch changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from cgmq_fx.passes.infra import Pass, PassResult
from cgmq_fx.passes.state import tensor_at, value_of

_HIGHER = torch.ops.higher_order


def _autocast_off(args: tuple[Any, ...]) -> int | None:
    """Where the region of a `wrap_with_autocast` stands in its arguments, if it switches off."""
    return 4 if args[2] is False else None


def _grad(args: tuple[Any, ...]) -> int | None:
    return 1


_REGIONS: dict[Any, Callable[[tuple[Any, ...]], int | None]] = {
    _HIGHER.wrap_with_autocast: _autocast_off,
    _HIGHER.wrap_with_set_grad_enabled: _grad,
}


def _inline(module: GraphModule, node: Node, place: int) -> bool:
    """Put the nodes of a region in the place of the node that calls it."""
    region = node.args[place]
    if not isinstance(region, Node):
        return False
    inner = module.get_submodule(str(region.target))
    if not isinstance(inner, GraphModule):
        return False
    stop = node.target is _HIGHER.wrap_with_set_grad_enabled and node.args[0] is False
    inputs = [n for n in inner.graph.nodes if n.op == "placeholder"]
    known: dict[Node, Any] = dict(zip(inputs, node.args[place + 1 :], strict=True))
    with module.graph.inserting_before(node):
        for own in inner.graph.nodes:
            if own.op == "get_attr":
                known[own] = _adopt(module, inner, own, f"{node.name}_{own.name}")
            elif own.op not in ("placeholder", "output"):
                known[own] = module.graph.node_copy(own, lambda n: known[n])
        output = next(n for n in inner.graph.nodes if n.op == "output").args[0]
        results = [known[o] for o in (output if isinstance(output, list | tuple) else [output])]
        if stop:
            results = [_detached(module, result) for result in results]
    for user in list(node.users):
        if isinstance(output, list | tuple):
            user.replace_all_uses_with(results[int(user.args[1])])  # type: ignore[arg-type]
            module.graph.erase_node(user)
        else:
            user.replace_input_with(node, results[0])
    module.graph.erase_node(node)
    return True


def _adopt(module: GraphModule, inner: GraphModule, node: Node, name: str) -> Node:
    """A tensor or a region of the inner graph, as one of the outer graph."""
    found = tensor_at(inner, node.target)
    if found is None:
        module.add_submodule(name, inner.get_submodule(str(node.target)))
    else:
        module.register_buffer(name, found)
    adopted = module.graph.get_attr(name)
    adopted.meta = dict(node.meta)
    return adopted


def _detached(module: GraphModule, node: Node) -> Node:
    detached = module.graph.call_function(torch.ops.aten.detach.default, (node,))
    detached.meta = {"val": value_of(node)}
    return detached


@dataclass(frozen=True)
class InlineRegions(Pass):
    """Write out regions without autocast and regions without gradients.

    Before: a captured graph. After: no such region is left but those that switch autocast on; what
    had no gradient is detached.
    """

    def run(self, module: GraphModule) -> PassResult:
        """Inline until no region is left: regions hold regions."""
        modified, again = False, True
        while again:
            again = False
            for node in list(module.graph.nodes):
                place = _REGIONS[node.target](node.args) if node.target in _REGIONS else None
                if place is not None:
                    again |= _inline(module, node, place)
            modified |= again
        return PassResult(module, modified)
