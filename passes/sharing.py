"""Layers that are applied several times: which of their inputs are one tensor at several times."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Mapping
from functools import reduce

from torch.fx import GraphModule, Node

from cgmq_fx.passes.oplists import MOVES
from cgmq_fx.passes.optable import argument, compute_op
from cgmq_fx.passes.state import (
    computed_from_inputs,
    is_parameter,
    reachable_from_inputs,
    view_root,
)


class _Names:
    """A bit for everything that has a name, so that sets of names are integers."""

    def __init__(self) -> None:
        self._places: dict[Hashable, int] = {}

    def bit(self, name: Hashable) -> int:
        return 1 << self._places.setdefault(name, len(self._places))


def steps(module: GraphModule) -> Iterator[tuple[Node, Node, Hashable]]:
    """Every application of a layer: its input, its weight, and what its inputs are kept apart by.

    A layer is a weight of the state with the kind of op that reads it. Two inputs of a layer are
    one tensor at several times, and have the same name here,

    - if both are computed from results of that layer, or one is and the other is a constant, such
      as the zeros that a recurrence starts from;
    - if the same ops and layers have made them of the same inputs, of whatever parts of those: the
      steps of a sequence, or the states of a recurrence in front of another layer.

    Others are tensors of their own: maps of several scales in front of one head, the two inputs of
    a siamese net, what is fed to the first of several equal blocks.
    """
    layers = _layers(module)
    again = _recurrent(module, layers)
    recurrent = set(again.values())
    made = _made(module, layers, recurrent)
    computed = computed_from_inputs(module.graph)
    inside = {(layer, made[_input(node)]) for node, layer in again.items()}
    for node, layer in layers.items():
        own = _input(node)
        name: Hashable = (layer, made[own])
        if name in inside or (layer in recurrent and own not in computed):
            name = (layer, None)
        yield view_root(own), layer[0], name


_Layer = tuple[Node, object]


def _input(node: Node) -> Node:
    op = compute_op(node)
    found: Node = argument(node, op.activation) if op else node
    return found


def _layers(module: GraphModule) -> dict[Node, _Layer]:
    """The layer that each compute node applies, for those with a weight of the state."""
    live, found = reachable_from_inputs(module.graph), {}
    for node in module.graph.nodes:
        op = compute_op(node)
        weight = argument(node, op.weight) if op else None
        if isinstance(weight, Node) and weight not in live:
            found[node] = (view_root(weight), node.target)
    return found


def _recurrent(module: GraphModule, layers: Mapping[Node, _Layer]) -> dict[Node, _Layer]:
    """The applications whose input is computed from a result of the same layer."""
    names, found = _Names(), {}
    behind: dict[Node, int] = {}
    for node in module.graph.nodes:
        behind[node] = reduce(operator.or_, (behind[n] for n in node.all_input_nodes), 0)
        if node in layers:
            own = names.bit(layers[node])
            if behind[_input(node)] & own:
                found[node] = layers[node]
            behind[node] |= own
    return found


def _made(
    module: GraphModule, layers: Mapping[Node, _Layer], recurrent: set[_Layer]
) -> dict[Node, int]:
    """What has made each tensor since the last layers: ops, layers, parameters and inputs, a set.

    Moving values makes nothing. A layer counts with what its own input is made of, but in a
    recurrence, where that would be another thing at each step.
    """
    names, made = _Names(), dict[Node, int]()
    computed = computed_from_inputs(module.graph)
    for node in module.graph.nodes:
        if node in layers:
            layer = layers[node]
            origin = None if layer in recurrent else made[_input(node)]
            made[node] = names.bit((layer, origin))
            continue
        read = [n for n in node.all_input_nodes if n not in computed or node in computed]
        made[node] = reduce(operator.or_, (made[n] for n in read), 0)
        moves = node.target in MOVES or node.target is operator.getitem
        if is_parameter(module, node) or (node in computed and not moves):
            made[node] |= names.bit((node.op, node.target))
    return made
