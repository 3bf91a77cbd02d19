"""Liveness: which tensors a runtime keeps, from when to when, and on whose grid.

Steps are the ops that write a tensor of their own, in the order of the graph. Views are not tensors
of their own; neither are element-wise ops on one tensor that nobody else reads (runtimes fuse them
or work in place), nor quantizers, unless a layer that is not quantized reads the tensor as it was.
Asking for a size is not reading.

A tensor has the bits of its quantizer; one that only reaches quantizers through ops that keep a
grid (max-pool before the quantizer, say) has theirs, because a runtime quantizes before such ops.
What has only some of the channels of its quantizer, a part of a join or a slice, has their bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.fx import GraphModule, Node

from cgmq_fx.cost_models.facts import FLOAT_BITS, TensorFacts
from cgmq_fx.passes.aliases import last_write
from cgmq_fx.passes.following import before, gate_numbers
from cgmq_fx.passes.oplists import IN_PLACE, JOINS
from cgmq_fx.passes.optable import is_view, preserves_grid
from cgmq_fx.passes.quantizer import Quantizer
from cgmq_fx.passes.state import bits_of, quantizer_of, shape_of, value_of

_LAST = 1 << 60


@dataclass(frozen=True, slots=True)
class _Grid:
    """The grid that a tensor is on.

    Attributes:
        quantizer: The name of its quantizer.
        gates: How many gates that has.
        numbers: The number of the gate of each element; None where that cannot be told.
    """

    quantizer: str
    gates: int
    numbers: Tensor | None

    @property
    def shares(self) -> tuple[int, ...] | None:
        """How many elements each gate stands for, see `TensorFacts`."""
        if self.gates == 1 or self.numbers is None:
            return () if self.gates == 1 else None
        counts = torch.bincount(self.numbers.flatten(), minlength=self.gates)
        unit = gcd(*counts.tolist()) or 1
        return () if bool((counts == counts[0]).all()) else tuple((counts // unit).tolist())

    def at(self, root: Node, node: Node) -> _Grid:
        """The grid of `root`, if this is the one of a node that uses its memory."""
        numbers = self.numbers
        while numbers is not None and node is not root:
            source: Any = node.args[0]
            numbers, node = before(numbers, node, source), source
        return replace(self, numbers=numbers)


def liveness(
    module: GraphModule, live: set[Node], elements: Callable[[Node], int]
) -> tuple[TensorFacts, ...]:
    """The tensors that depend on the model's input, with their lifetimes.

    Args:
        module: A graph with shapes.
        live: The nodes that depend on the input.
        elements: The elements of a node that one sample has.

    Returns:
        The tensors in the order in which they are written.
    """
    storage = _storages(module, live)
    members: dict[Node, list[Node]] = {}
    for node, root in storage.items():
        members.setdefault(root, []).append(node)
    steps = {root: step for step, root in enumerate(members)}
    grids = _grids(module, members)
    return tuple(
        TensorFacts(
            name=root.name,
            elements=elements(root),
            first=0 if root.op == "placeholder" else steps[root],
            last=min(_last_use(nodes, storage, steps), len(steps) - 1),
            quantizer=grids[root].quantizer if root in grids else None,
            bits=_bits(root),
            copy=_is_quantizer(module, root),
            shares=grids[root].shares if root in grids else (),
        )
        for root, nodes in members.items()
    )


def _storages(module: GraphModule, live: set[Node]) -> dict[Node, Node]:
    """For every node that holds activations, the node whose memory it uses."""
    storage: dict[Node, Node] = {}
    for node in module.graph.nodes:
        if node not in live or shape_of(node) is None or node.op == "output":
            continue
        source = node.args[0] if node.args else None
        shared = (
            isinstance(source, Node)
            and source in storage
            and _shares(module, node, source, storage, live)
        )
        storage[node] = storage[source] if shared and isinstance(source, Node) else node
    return storage


def _shares(
    module: GraphModule, node: Node, source: Node, storage: dict[Node, Node], live: set[Node]
) -> bool:
    if is_view(node):
        return shape_of(node) is None or _size(node) == _size(source)
    if node.op == "call_module":
        return _is_quantizer(module, node) and not (
            _rounds(module, node) and _read_in_float(module, node, source)
        )
    alone = live.intersection(node.all_input_nodes) == {source}  # else it waits for the others
    fused = node.target in IN_PLACE and alone and _size(node) == _size(source)
    return fused and _unread(source, storage)


def _read_in_float(module: GraphModule, quantized: Node, source: Node) -> bool:
    """Whether a node reads what is rounded as it was before: a skipped layer."""
    written = last_write(source)
    readers = [u for u in _data_users(source) if u is not quantized and u is not written]
    late = [u for u in readers if written is None or written < u]
    return any(not _rounds(module, user) for user in late)


def _unread(node: Node, storage: dict[Node, Node]) -> bool:
    """Whether the memory that holds `node` has no other reader than the one of `node`."""
    while len(_data_users(node)) == 1:
        if storage[node] is node:
            return True
        node = node.args[0]  # type: ignore[assignment]  # what is shared is the first argument
    return False


def _data_users(node: Node) -> list[Node]:
    """The nodes that read the values of `node`, not only its size."""
    return [u for u in node.users if not _reads_size(u, node)]


def _reads_size(user: Node, node: Node) -> bool:
    """Whether a reader is a size, or a view in the shape of `node` of another tensor."""
    return isinstance(value_of(user), int | SymInt) or (is_view(user) and user.args[0] is not node)


def _size(node: Node) -> int:
    return prod(shape_of(node) or ())


def _bits(root: Node) -> int:
    value = value_of(root)
    return FLOAT_BITS if value is None else bits_of(value)


def _last_use(nodes: list[Node], storage: dict[Node, Node], steps: dict[Node, int]) -> int:
    """The last step that reads any view of a tensor; outputs are kept to the end."""
    last = steps[storage[nodes[0]]]
    for node in nodes:
        for user in _data_users(node):
            if user.op == "output":
                return _LAST
            for reached in _readers(user, storage):
                last = max(last, steps[storage[reached]])
    return last


def _readers(user: Node, storage: dict[Node, Node]) -> list[Node]:
    """`user`, or what it feeds if it is no tensor itself (a tuple of chunks, say)."""
    if user in storage:
        return [user]
    return [node for node in user.users if node in storage]


def _grids(module: GraphModule, members: dict[Node, list[Node]]) -> dict[Node, _Grid]:
    """The grid of every tensor: its own, else the one that all its readers lead to."""
    import networkx as nx  # slow

    found: dict[Node, _Grid] = {}
    root_of = {node: root for root, nodes in members.items() for node in nodes}
    flow = nx.DiGraph()
    flow.add_nodes_from(members)
    for root, nodes in members.items():
        last = next((n for n in reversed(nodes) if _is_quantizer(module, n)), root)
        own = _grid(module, last)
        if own is not None:
            found[root] = own.at(root, last)
        reached = {root_of[u] for n in nodes for u in _data_users(n) if u in root_of} - {root}
        flow.add_edges_from((root, other) for other in reached)
    for root in reversed(list(nx.topological_sort(flow))):
        if root in found:
            continue
        readings = [(u, n) for n in members[root] for u in _data_users(n)]
        grids = [
            _passed_on(user, node, root, root_of, found)
            for user, node in readings
            if root_of.get(user) is not root
        ]
        if (common := _common(grids)) is not None:
            found[root] = common
    return found


def _grid(module: GraphModule, node: Node) -> _Grid | None:
    """The grid that the values of a node are on."""
    found = quantizer_of(module, node)
    if found is None:
        return None
    gates = prod(found[1].spec.gate_shape)
    return _Grid(found[0], gates, gate_numbers(module, node) if gates > 1 else None)


def _passed_on(
    user: Node, node: Node, root: Node, root_of: dict[Node, Node], found: dict[Node, _Grid]
) -> _Grid | None:
    """The grid of a tensor by a reader of `node` in its memory that keeps grids, else None."""
    keeps = preserves_grid(user) or (user.op == "call_function" and user.target in JOINS)
    grid = found.get(root_of[user]) if keeps and user in root_of else None
    if grid is None or grid.numbers is None:
        return grid
    return replace(grid, numbers=before(grid.numbers, user, node)).at(root, node)


def _common(grids: list[_Grid | None]) -> _Grid | None:
    """The grid that all of them are; without numbers, where these differ."""
    first = grids[0] if grids else None
    if first is None or any(g is None or g.quantizer != first.quantizer for g in grids):
        return None
    same = all(g is not None and _equal(g.numbers, first.numbers) for g in grids)
    return first if same else replace(first, numbers=None)


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def _is_quantizer(module: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and isinstance(_owner(module, node), Quantizer)


def _rounds(module: GraphModule, node: Node) -> bool:
    owner = _owner(module, node) if node.op == "call_module" else None
    return isinstance(owner, Quantizer) and not owner.passes_all


def _owner(module: GraphModule, node: Node) -> nn.Module:
    return module.get_submodule(str(node.target))
